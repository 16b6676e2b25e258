"""Names of images: URLs, paths and base64, which must lead nowhere but where the policy allows.

``{ROOT}`` stands for the only folder that may be read, for a corpus that fits every machine.
"""

from pathlib import Path

from segrpc.service.images.decode import ImageLimits, format_of
from segrpc.service.images.fetch import fetch
from segrpc.service.images.look_ups import LookUps
from segrpc.service.images.sources import SourcePolicy, read_source, read_uri
from tests.fuzz.refusals import refusals

ROOT = Path(__file__).parents[1] / "data" / "photos"
LIMITS = ImageLimits(max_bytes=2**20)
FILES = SourcePolicy(media_roots=(ROOT,))
HOSTS = SourcePolicy(allowed_hosts=("images.example.org", "*.example.com:8080", "[2001:db8::1]"))


def run(data: bytes) -> None:
    """Read what a text names."""
    text = data.decode("utf-8", errors="ignore").replace("{ROOT}", str(ROOT))  # no more than a protobuf string can hold
    if text[:4].lower() == "http":
        with refusals():
            fetch(text, HOSTS, LIMITS, LookUps(resolve=_resolve))
            raise AssertionError("fetched without an address")
        return
    with refusals():
        found = read_uri(text, FILES, LIMITS)
        assert text[:5].lower() == "data:" or found in _allowed()
    with refusals():
        found = read_source(text, FILES, LIMITS)
        assert text[:5].lower() == "data:" or format_of(found) or found in _allowed()


def _resolve(host: str, port: int) -> list[str]:
    """Look up nothing, but check that the policy was asked."""
    name = host.lower().rstrip(".")
    allowed = (
        (name, port) in (("images.example.org", 80), ("images.example.org", 443))
        or (name.endswith(".example.com") and port == 8080)
        or (name == "2001:db8::1" and port in (80, 443))
    )
    if not allowed:
        raise AssertionError(f"{host}:{port} is not allowed")
    raise OSError("there is no network here")


def _allowed() -> list[bytes]:
    return [file.read_bytes() for file in ROOT.iterdir() if file.is_file()]
