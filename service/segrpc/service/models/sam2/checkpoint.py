"""Reading a SAM 2 checkpoint: what is in it, and whether it is whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch

# Imported for its side effect as well: sam2 registers its configurations with hydra.
from sam2.build_sam import build_sam2
from sam2.modeling.sam2_base import SAM2Base
from torch.overrides import TorchFunctionMode

from segrpc.service.errors import ModelLoadError
from segrpc.service.models.sam2.catalog import VARIANTS, Variant

StateDict = Mapping[str, torch.Tensor]

_PATCH_EMBED = "image_encoder.trunk.patch_embed.proj.weight"


def read_checkpoint(file: Path) -> StateDict:
    """Read the weights in a checkpoint file; no code in it is run.

    Raises:
        ModelLoadError: If there is no such file, or it is no SAM 2 checkpoint.
    """
    if not file.is_file():
        raise ModelLoadError(
            f"checkpoint {str(file)!r} is not a file; give the path of a .pt file, or fetch a published one with "
            "`segrpc-server pull`"
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file trips torch in many ways, IndexError and AssertionError among them
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelLoadError(
            f"checkpoint {str(file)!r} cannot be read ({cause}); it is corrupt, incomplete or no PyTorch checkpoint"
        ) from error
    state = content.get("model") if isinstance(content, dict) else None
    if not _are_weights(state):
        raise ModelLoadError(f"checkpoint {str(file)!r} has no SAM 2 weights under the key 'model'")
    return state


def _are_weights(state: object) -> TypeGuard[StateDict]:
    if not isinstance(state, dict) or _PATCH_EMBED not in state:
        return False
    named = all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items())
    return named and state[_PATCH_EMBED].ndim == 4


def identify(state: StateDict) -> Variant | None:
    """Tell from its weights which published size a checkpoint is of, or None if it is of no such size."""
    version = "sam2.1" if "obj_ptr_tpos_proj.weight" in state else "sam2"
    embed_dim = state[_PATCH_EMBED].shape[0]
    num_blocks = len({key.split(".")[3] for key in state if key.startswith("image_encoder.trunk.blocks.")})
    for variant in VARIANTS.values():
        of_version = variant.name.startswith(f"{version}-")
        if of_version and (variant.embed_dim, variant.num_blocks) == (embed_dim, num_blocks):
            return variant
    return None


class _Unfilled(TorchFunctionMode):
    """Leaves new weights as they come from memory, for a network that gets all of its weights from a checkpoint.

    Random ones, which would be overwritten at once, take most of the time that building takes.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Have the functions of `torch.nn.init` do nothing."""
        given = kwargs or {}
        return given["tensor"] if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **given)


def build_model(state: StateDict, config: str, device: torch.device | str, source: str) -> SAM2Base:
    """Build the network of a configuration and give it the weights.

    Args:
        state: The weights.
        config: The name of a configuration in the package ``sam2``.
        device: Where the network shall live.
        source: Where the weights come from, for the error.

    Raises:
        ModelLoadError: If there is no such configuration, or the weights are not those of its network.
    """
    try:
        with _Unfilled():
            model: SAM2Base = build_sam2(config, ckpt_path=None, device="cpu")
    except Exception as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelLoadError(f"the SAM 2 configuration {config!r} cannot be built: {cause}") from error
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        fits = identify(state)
        hint = f"; its weights look like {fits.name}" if fits and fits.config != config else ""
        cause = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ModelLoadError(f"{source} does not fit the configuration {config!r}{hint} ({cause[:200]})") from error
    return model.to(device)
