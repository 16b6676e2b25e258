"""SAM 2 checkpoints of the real architecture with seeded random weights, for tests without downloads."""

from pathlib import Path

import torch
from sam2.build_sam import build_sam2

from segrpc.service.models.sam2.catalog import VARIANTS


def write_checkpoint(name: str, folder: Path, *, contrast: float = 1.0, seed: int = 7) -> Path:
    """Write a checkpoint of a published size under its published file name.

    Args:
        name: A model name, such as ``sam2.1-hiera-tiny``.
        folder: Where to write it.
        contrast: A factor for mask logits. Random weights give logits of about +-0.4; with 150 they pass +-32, where
            returned logits are clamped.
        seed: Of the random weights.
    """
    variant = VARIANTS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_sam2(variant.config, ckpt_path=None, device="cpu")
    with torch.no_grad():
        for mlp in model.sam_mask_decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight *= contrast
            mlp.layers[-1].bias *= contrast
    file = folder / variant.filename
    torch.save({"model": model.state_dict()}, file)
    return file
