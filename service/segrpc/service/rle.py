"""COCO run-length encoding: pure functions on masks, runs and compressed counts.

A mask of ``height x width`` is read down its columns; its runs are alternately background and object, the first counts
background and may be zero. ``counts`` is the compressed string of pycocotools: per run the difference to the run two
before it (from the fourth run on), in groups of 5 bits, lowest first, each offset by 48; bit 5 says that more follow,
bit 4 of the last group is the sign (``rleToString`` in the COCO API's ``maskApi.c``).
"""

import io
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco

BoolMask = npt.NDArray[np.bool_]
Runs = npt.NDArray[np.int64]
Box: TypeAlias = tuple[int, int, int, int]

# pycocotools has room for six characters a run, and writes a zero behind them: beyond its buffer if all runs need six,
# which takes runs of 2^24 pixels, and four of them, two of which differ by as much.
MAX_PIXELS = 2**26

_MAX_GROUPS = 7  # 35 bits: more than any run that fits an image


def runs_of_mask(mask: npt.NDArray[Any]) -> Runs:
    """Find the runs of a mask ``[height, width]``, non-zero where the object is."""
    flat = (mask if mask.dtype == np.bool_ else mask != 0).ravel(order="F")
    toggles = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    return runs_between(np.concatenate([np.zeros(int(flat[0]), np.int64), toggles]), flat.size)


def runs_between(toggles: npt.NDArray[np.int64], total: int) -> Runs:
    """Turn the places where a mask changes, in order, into runs; changes at the same place cancel each other."""
    fresh = np.concatenate([np.ones(min(1, len(toggles)), np.bool_), toggles[1:] != toggles[:-1]])
    if not fresh.all():
        firsts = np.flatnonzero(fresh)
        toggles = toggles[firsts[np.diff(firsts, append=len(toggles)) & 1 == 1]]
    if len(toggles) and toggles[-1] == total:
        toggles = toggles[:-1]
    runs: Runs = np.diff(toggles, prepend=0, append=total)
    return runs


def decode(counts: bytes, height: int, width: int) -> BoolMask:
    """Expand compressed counts into a mask ``[height, width]`` of bool.

    Raises:
        ValueError: If the counts are malformed or do not sum to ``height * width``.
    """
    runs = checked_runs(counts, height, width)
    return np.repeat(np.arange(runs.size) % 2 == 1, runs).reshape(height, width, order="F")


def checked_runs(counts: bytes, height: int, width: int) -> Runs:
    """Decompress counts of a mask of a known size.

    pycocotools does not check: it decodes short or garbage counts into memory that was never written.

    Raises:
        ValueError: If the counts are malformed or do not sum to ``height * width``.
    """
    runs = run_lengths(counts)
    total = int(runs.sum())
    if total != height * width:
        raise ValueError(f"the runs sum to {total}, but height x width is {height} x {width} = {height * width}")
    return runs


def run_lengths(counts: bytes) -> Runs:
    """Decompress counts into the lengths of the runs.

    Raises:
        ValueError: If the counts are malformed: bytes out of range, a group that does not end, a negative run.
    """
    groups = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    if groups.size == 0:
        raise ValueError("no runs")
    if groups.min() < 0 or groups.max() > 63:
        raise ValueError("a byte is out of the range 48 to 111")
    last = np.flatnonzero(groups & 32 == 0)
    if last.size == 0 or last[-1] != groups.size - 1:
        raise ValueError("the last run is cut off")
    first = np.concatenate(([0], last[:-1] + 1))
    lengths = last - first + 1
    if lengths.max() > _MAX_GROUPS:
        raise ValueError("a run is too long")
    position = np.arange(groups.size) - np.repeat(first, lengths)
    values = np.add.reduceat((groups & 31) << (5 * position), first)
    negative = groups[last] & 16 != 0
    values[negative] -= 1 << (5 * lengths[negative])
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    if values.min() < 0:
        raise ValueError("a run is negative")
    return values


def compress(runs: Runs) -> bytes:
    """Compress the lengths of runs, background first, into counts: the inverse of `run_lengths`.

    Raises:
        ValueError: If they sum to more than `MAX_PIXELS`.
    """
    total = int(runs.sum())
    if total > MAX_PIXELS:
        raise ValueError(f"the mask has {total} pixels; at most {MAX_PIXELS} can be encoded")
    size = [total, 1]  # all that pycocotools does with the size is to keep it
    return bytes(coco.frPyObjects({"size": size, "counts": runs.astype(np.uint32)}, *size)["counts"])


def area(runs: Runs) -> int:
    """Count the object pixels."""
    return int(runs[1::2].sum())


def bounding_box(runs: Runs, height: int) -> Box | None:
    """Find the smallest ``(x_min, y_min, x_max, y_max)`` that holds all object pixels, maxima excluded.

    Args:
        runs: The lengths of the runs, background first.
        height: The mask's height in pixels.

    Returns:
        The box, or None if the mask is empty.
    """
    ends = np.cumsum(runs)
    starts, lasts = ends[: len(ends) // 2 * 2 : 2], ends[1::2] - 1
    if not len(starts):
        return None
    first_columns, last_columns = starts // height, lasts // height
    x_min, x_max = int(first_columns[0]), int(last_columns[-1]) + 1
    if np.any(first_columns != last_columns):  # a run from the bottom of one column to the top of the next
        return x_min, 0, x_max, height
    tops, bottoms = starts - first_columns * height, lasts - last_columns * height
    return x_min, int(tops.min()), x_max, int(bottoms.max()) + 1


def to_png(counts: bytes, height: int, width: int) -> bytes:
    """Render counts as a 1-bit greyscale PNG file, white where the object is."""
    file = io.BytesIO()
    Image.fromarray(decode(counts, height, width)).save(file, format="PNG")
    return file.getvalue()
