"""Run lengths of full-size masks, exactly those of torch's bilinear upsampling thresholded strictly above 0."""

from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional

from segrpc.service.rle import Runs, runs_of_mask
from segrpc.service.upsampling import Float32Array, Taps, runs_of_logits


def mask_runs(logits: torch.Tensor, height: int, width: int) -> list[Runs]:
    """Compute the masks of low-resolution logits.

    Args:
        logits: ``[num_masks, size, size]`` of float32, not clamped, on any device.
        height: The masks' height in pixels.
        width: The masks' width in pixels.

    Returns:
        For each mask the lengths of its runs in column-major order, background first.
    """
    if logits.device.type != "cpu":
        return _on_device(logits, height, width)
    size = len(logits[0])
    across, down = _taps(size, width), _taps(size, height)

    # Where every bit counts, torch itself interpolates along the width.
    def widen(rows: Float32Array) -> Float32Array:
        wide: Float32Array = _upsampled(torch.from_numpy(rows)[None], len(rows), width)[0].numpy()
        return wide

    found = [runs_of_logits(mask, across, down, widen) for mask in logits.numpy()]
    return [
        runs_of_mask((_upsampled(logits[i : i + 1], height, width)[0] > 0.0).numpy()) if runs is None else runs
        for i, runs in enumerate(found)
    ]


def _upsampled(logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return functional.interpolate(logits[None], (height, width), mode="bilinear", align_corners=False)[0]


@lru_cache(maxsize=64)
def _taps(size: int, length: int) -> Taps:
    """Ask torch for its weights, to the last bit: what it makes of the rows of an identity matrix."""
    weights = _upsampled(torch.eye(size)[None], length, size)[0].numpy()
    rows = np.arange(length)
    upper = (weights != 0).argmax(axis=1)
    lower = np.minimum(upper + 1, size - 1)
    below = np.where(lower > upper, weights[rows, lower], np.float32(0))
    return Taps.of(upper, weights[rows, upper], below, size)


def _on_device(logits: torch.Tensor, height: int, width: int) -> list[Runs]:
    """Upsample and compare on the device; only the places where a mask changes travel to the host."""
    masks = (_upsampled(logits, height, width) > 0.0).transpose(1, 2).flatten(1)
    changes = torch.nonzero(masks[:, 1:] != masks[:, :-1]).cpu().numpy()
    starts = masks[:, 0].cpu().numpy()
    total = height * width
    runs = []
    for i, start in enumerate(starts):
        places = changes[changes[:, 0] == i, 1] + 1
        runs.append(np.diff(np.concatenate([np.zeros(int(start), np.int64), places]), prepend=0, append=total))
    return runs
