"""Run lengths of an upsampled mask, straight from its low-resolution logits: pure functions on arrays.

The mask is where the logits, upsampled bilinearly to ``height x width``, are above 0. Bilinear interpolation is
separable. Once the logits are interpolated along the width, each column of the mask changes at most once between
two neighbouring rows of the logits, and where, a division tells. Only where the change comes so near to a row of the
mask that rounding may decide, pixels are computed, in the same float32 expression that the dense way would use.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from segrpc.service.rle import Runs, runs_between, runs_of_mask

Float32Array = npt.NDArray[np.float32]

_AT_ONCE = 2**15  # crossings that are computed together: they stay in the processor's cache
_CANDIDATES = 3  # rows around the computed crossing that are looked at
# How near, as a share of the height, a crossing must come to a row of the mask for float32 to matter: torch's positions
# among the rows of the logits are off by up to size * 2^-23, and a weighted sum by less than that.
_MARGIN = 2.0**-20
_TINY = 1e-30  # logits so near to each other that products may underflow


@dataclass(frozen=True, slots=True)
class Taps:
    """How each row of the mask is made of two neighbouring rows of the logits.

    Attributes:
        above: ``[height]``, the weight of the upper one.
        below: ``[height]``, the weight of the one below it; 0 where there is none.
        starts: ``[size + 1]``: the rows of the mask from ``starts[k]`` to before ``starts[k + 1]`` lie between the rows
            ``k`` and ``k + 1`` of the logits.
    """

    above: Float32Array
    below: Float32Array
    starts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, upper: npt.NDArray[np.int64], above: Float32Array, below: Float32Array, size: int) -> "Taps":
        """Make them of the index of each row's upper neighbour among ``size`` rows of logits."""
        return cls(above, below, np.searchsorted(upper, np.arange(size + 1)))


@lru_cache(maxsize=64)
def linear_taps(size: int, length: int) -> tuple[npt.NDArray[np.int64], Float32Array, Float32Array]:
    """Compute indices and weights of linear interpolation with half-pixel centres, clamped at both ends.

    Returns:
        ``[length]`` each: the index of the upper neighbour among ``size``, its weight, and that of the next one.
    """
    centres = (np.arange(length, dtype=np.float32) + np.float32(0.5)) * np.float32(size / length) - np.float32(0.5)
    centres = np.clip(centres, 0, size - 1)
    upper = centres.astype(np.int64)
    below = centres - upper.astype(np.float32)
    return upper, np.float32(1) - below, below


def runs_above_zero(logits: Float32Array, height: int, width: int) -> Runs:
    """Compute the runs of the mask of ``logits``, ``[size, size]`` of float32.

    Returns:
        The lengths of the runs in column-major order, background first.
    """
    size = len(logits)
    left, near, far = linear_taps(logits.shape[1], width)
    rows = logits[:, left] * near + logits[:, np.minimum(left + 1, logits.shape[1] - 1)] * far
    taps = Taps.of(*linear_taps(size, height), size)
    runs = runs_of_rows(rows, taps)
    if runs is None:
        upper = linear_taps(size, height)[0]
        lower = np.minimum(upper + 1, size - 1)
        runs = runs_of_mask(rows[upper] * taps.above[:, None] + rows[lower] * taps.below[:, None] > 0)
    return runs


def runs_of_rows(rows: Float32Array, taps: Taps) -> Runs | None:
    """Compute the runs of a mask from logits that were interpolated along the width already.

    Args:
        rows: ``[size, width]``.
        taps: How the mask's rows are made of them.

    Returns:
        The lengths of the runs in column-major order, background first. None if the last bit of a rounding decides
        (whether the machine multiplies and adds in one step): then only the dense way tells.
    """
    height, width = len(taps.above), rows.shape[1]
    positive = np.ascontiguousarray((rows > 0).T)  # column by column, as the runs go
    flips = _flips(rows, np.flatnonzero(positive[:, 1:] != positive[:, :-1]), taps)
    if flips is None:
        return None
    ends = (np.flatnonzero(positive[:-1, -1] != positive[1:, 0]) + 1) * height  # between a column and the next
    toggles = np.insert(flips, np.searchsorted(flips, ends), ends)
    return runs_between(np.concatenate([np.zeros(int(positive[0, 0]), np.int64), toggles]), height * width)


def _flips(rows: Float32Array, cells: npt.NDArray[np.int64], taps: Taps) -> npt.NDArray[np.int64] | None:
    """Find where the mask changes within its columns.

    Args:
        rows: ``[size, width]``, the logits.
        cells: Where their sign changes: ``x * (size - 1) + k`` between the rows ``k`` and ``k + 1`` of column ``x``.
        taps: How the mask's rows are made of them.

    Returns:
        For each cell the place, in column-major order, of the first pixel that has the sign of row ``k + 1``. None if
        the last bit of a rounding decides.
    """
    (size, width), height = rows.shape, len(taps.above)
    flat, stretch, margin = rows.ravel(), height / size, height * _MARGIN
    places = np.empty(len(cells), np.int64)
    doubtful = [np.zeros(0, np.int64)]
    for start in range(0, len(cells), _AT_ONCE):
        part = cells[start : start + _AT_ONCE]
        x = part // (size - 1)
        k = part - x * (size - 1)
        at = k * width + x
        upper, lower = flat[at].astype(np.float64), flat[at + width].astype(np.float64)
        across = upper - lower
        crossing = (k + upper / across + 0.5) * stretch - 0.5
        row = np.ceil(crossing)
        places[start : start + _AT_ONCE] = x * height + row.astype(np.int64)
        # Nearly always the crossing lies so far from the mask's rows that no rounding can matter.
        beyond = row - crossing
        certain = (beyond > margin) & (beyond < 1 - margin) & (np.abs(across) > _TINY)
        doubtful.append(start + np.flatnonzero(~certain))
    near = np.concatenate(doubtful)
    if len(near):
        x, k = np.divmod(cells[near], size - 1)
        found = _looked_at(rows, k, x, taps)
        if found is None:
            return None
        places[near] = x * height + found
    return places


def _looked_at(
    rows: Float32Array, k: npt.NDArray[np.int64], x: npt.NDArray[np.int64], taps: Taps
) -> npt.NDArray[np.int64] | None:
    """Find the first row of the mask, from ``starts[k]`` to ``starts[k + 1]``, that has the sign of ``rows[k + 1]``.

    The rows around the crossing are computed, in every way that a machine may round them.
    """
    size, height = len(rows), len(taps.above)
    upper, lower = rows[k, x], rows[k + 1, x]
    rises = lower > 0
    first, last = taps.starts[k], taps.starts[k + 1]
    share = upper.astype(np.float64) / (upper.astype(np.float64) - lower)
    crossing = (k + share + 0.5) * (height / size) - 0.5
    start = np.ceil(crossing).astype(np.int64) - 1
    before = np.zeros(len(k), np.int64)  # candidates that still have the sign of rows[k]
    changed = np.zeros(len(k), np.bool_)
    for row in (start + i for i in range(_CANDIDATES)):
        at = np.clip(row, 0, height - 1)
        above, below = upper * taps.above[at], lower * taps.below[at]
        sign = above + below > 0
        # The same sum with one rounding less, in either order; in float64 its sign is exact.
        fused = lower.astype(np.float64) * taps.below[at] + above > 0
        fused_too = upper.astype(np.float64) * taps.above[at] + below > 0
        inside = (row >= first) & (row < last)
        same = np.where(inside, sign != rises, row < first)
        if np.any(inside & ((sign != fused) | (sign != fused_too))) or np.any(same & changed):
            return None
        before += same
        changed |= ~same
    flips: npt.NDArray[np.int64] = np.clip(start + before, first, last)
    return flips
