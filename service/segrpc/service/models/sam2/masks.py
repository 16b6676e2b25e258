"""Run lengths of full-size masks, exactly those of torch's bilinear upsampling thresholded strictly above 0."""

from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional

from segrpc.service.rle import Runs, runs_of_mask
from segrpc.service.upsampling import Float32Array, Taps, runs_of_logits

_PIXELS_AT_A_TIME = 2**27  # of masks that are made together: they take 6 bytes each


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
        return dense_mask_runs(logits, height, width)
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


def dense_mask_runs(logits: torch.Tensor, height: int, width: int) -> list[Runs]:
    """Compute the same as `mask_runs` by making all pixels where the logits are, as a GPU does in no time.

    Only the places where masks change travel to the host.
    """
    total = height * width
    found: list[Runs] = []
    for some in torch.split(logits, max(1, _PIXELS_AT_A_TIME // total)):
        pixels = (_upsampled(some, height, width) > 0.0).transpose(1, 2).flatten()
        changes = torch.nonzero(pixels[1:] != pixels[:-1])[:, 0] + 1
        # In one go: the first pixel of each mask, then the changes of all.
        numbers = torch.cat([pixels[::total], changes]).to(torch.int32).cpu().numpy().astype(np.int64)
        firsts, places = numbers[: len(some)], numbers[len(some) :]
        ends = np.searchsorted(places, np.arange(len(some) + 1) * total)
        for i, first in enumerate(firsts):
            # A change at the mask's own beginning is one from the mask before it.
            inside = places[ends[i] : ends[i + 1]] - i * total
            inside = inside[1:] if inside.size and inside[0] == 0 else inside
            toggles = np.concatenate([np.zeros(int(first), np.int64), inside])
            found.append(np.diff(toggles, prepend=0, append=total))
    return found
