"""SAM 2 checkpoints of the real architecture with seeded random weights, for tests without downloads."""

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from sam2.build_sam import build_sam2
from torch.nn import functional

from segrpc.service.models.sam2.catalog import VARIANTS

SMOOTH_CONTRAST = 30.0  # a factor that gives smooth logits the size that those of trained weights have, about +-10


def write_checkpoint(name: str, folder: Path, *, contrast: float = 1.0, smooth: bool = False, seed: int = 7) -> Path:
    """Write a checkpoint of a published size under its published file name.

    Args:
        name: A model name, such as ``sam2.1-hiera-tiny``.
        folder: Where to write it.
        contrast: A factor for mask logits. Random weights give logits of about +-0.4; with 150 they pass +-32, where
            returned logits are clamped.
        smooth: Whether masks have few and long outlines, as those of trained weights do; see `_smooth`.
        seed: Of the random weights.
    """
    file = folder / VARIANTS[name].filename
    file.write_bytes(_content(name, contrast, smooth, seed))
    return file


@lru_cache(maxsize=1)  # of many tests in a row; the largest takes 0.9 GB
def _content(name: str, contrast: float, smooth: bool, seed: int) -> bytes:
    variant = VARIANTS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_sam2(variant.config, ckpt_path=None, device="cpu")
    with torch.no_grad():
        for mlp in model.sam_mask_decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight *= contrast
            mlp.layers[-1].bias *= contrast
        if smooth:
            _smooth(model, torch.Generator().manual_seed(seed))
    file = io.BytesIO()
    torch.save({"model": model.state_dict()}, file)
    return file.getvalue()


def _smooth(model: Any, generator: torch.Generator) -> None:
    """Make logits vary slowly across the image, by weights alone: architecture and code path stay the same.

    Plain random weights answer to the image's pixels with noise: masks of 1024 x 1024 pixels have 25,000 to 95,000
    runs. Here the encoder's coarse position embedding, which an untrained model leaves at 0, becomes a field of random
    numbers at 3 x 3 places, interpolated in between and so strong that it outweighs the pixels; and the transposed
    convolutions give their four outputs the same weights, so that they add no pattern of their own. Masks then have
    1,000 to 6,000 runs.
    """
    field = model.image_encoder.trunk.pos_embed
    coarse = 5 * torch.randn((1, field.shape[1], 3, 3), generator=generator)
    field.copy_(functional.interpolate(coarse, size=field.shape[-2:], mode="bicubic", align_corners=True))
    upscaling = model.sam_mask_decoder.output_upscaling
    for convolution in (upscaling[0], upscaling[3]):
        weight = convolution.weight
        weight.copy_(weight.mean((2, 3), keepdim=True).expand_as(weight))
