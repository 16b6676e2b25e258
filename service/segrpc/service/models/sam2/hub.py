"""Fetching published checkpoints from the Hugging Face hub."""

import hashlib
import re
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from segrpc.service.errors import ModelLoadError
from segrpc.service.models.sam2.catalog import Variant

_SHA256 = re.compile(r"[0-9a-f]{64}")


def find(variant: Variant, hub_id: str = "") -> Path | None:
    """Find a checkpoint that was fetched before, without asking the network."""
    cached = try_to_load_from_cache(hub_id or variant.hub_id, variant.filename)
    return Path(cached) if isinstance(cached, str) else None


def pull(variant: Variant, hub_id: str = "") -> Path:
    """Fetch a checkpoint, with a progress bar on standard error, unless it is at hand; compare its digest.

    Args:
        variant: The model.
        hub_id: A repository that holds a checkpoint of the same size under the same file name. Default: the published.

    Returns:
        The file in the hub's cache (moved by ``HF_HOME``).

    Raises:
        ModelLoadError: If the hub does not answer, has no such file, or sent other bytes than it announced.
    """
    repository = hub_id or variant.hub_id
    try:
        announced = get_hf_file_metadata(hf_hub_url(repository, variant.filename)).etag or ""
        file = Path(hf_hub_download(repository, variant.filename))
    except (HfHubHTTPError, OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelLoadError(f"{repository}/{variant.filename} cannot be fetched from the hub: {cause}") from error
    # Large files are announced by their SHA-256; the hub's client checks their size only.
    if _SHA256.fullmatch(announced) and _sha256(file) != announced:
        file.resolve().unlink()
        file.unlink(missing_ok=True)
        raise ModelLoadError(f"{repository}/{variant.filename} arrived damaged and was removed: fetch it again")
    return file


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
