"""Run lengths of an upsampled mask, straight from its low-resolution logits: pure functions on arrays.

The mask is where the logits, upsampled bilinearly to ``height x width``, are above 0. Bilinear interpolation is
separable. Once the logits are interpolated along the width, each column of the mask changes at most once between
two neighbouring rows of the logits, and where, a division tells. Of smooth masks only the outline is interpolated at
all: within a square of four logits that have the same sign, nothing changes.

All that is computed in float64, near enough to know nearly every sign. Only where a number comes so near to 0 that the
rounding of float32 may decide, pixels are computed in the same float32 expression that the dense way would use.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from segrpc.service.rle import Runs, runs_between, runs_of_mask

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

Widen: TypeAlias = Callable[[Float32Array], Float32Array]
Signs: TypeAlias = Callable[["_Cells", Float32Array, Float32Array], tuple[BoolArray, BoolArray]]

_AT_ONCE = 2**15  # crossings that are computed together: they stay in the processor's cache
_CANDIDATES = 3  # rows around the computed crossing that are looked at
# How near, as a share of the height, a crossing must come to a row of the mask for float32 to matter: its positions
# among the rows of the logits are off by up to size * 2^-23, and a weighted sum by less than that.
_MARGIN = 2.0**-21
_ROUNDING = 2.0**-21  # more than what float32 may lose in a weighted sum, as a share of the largest number in it
_TINY = 1e-30  # logits so near to 0, or to each other, that products may underflow
_OUTLINE = 0.2  # with a larger share of squares on the outline, interpolating everything is faster


@dataclass(frozen=True, slots=True)
class Taps:
    """How each row of the mask is made of two neighbouring rows of the logits; or each column, of two columns.

    Attributes:
        above: ``[length]``, the weight of the upper one.
        below: ``[length]``, the weight of the one below it; 0 where there is none.
        starts: ``[size + 1]``: the rows of the mask from ``starts[k]`` to before ``starts[k + 1]`` lie between the rows
            ``k`` and ``k + 1`` of the logits.
    """

    above: Float32Array
    below: Float32Array
    starts: Indices

    @classmethod
    def of(cls, upper: Indices, above: Float32Array, below: Float32Array, size: int) -> "Taps":
        """Make them of the index of each row's upper neighbour among ``size`` rows of logits."""
        return cls(above, below, np.searchsorted(upper, np.arange(size + 1)))


@dataclass(frozen=True, slots=True)
class _Cells:
    """Where a column of the mask passes from one row of the logits to the next; ``[n]`` each, column by column.

    Attributes:
        x: The column.
        k: The upper one of the two rows.
        upper: The logits of that row, interpolated along the width.
        lower: Those of the row below it.
        slack: By how much both may differ from what float32 makes of them. None if they are just that.
    """

    x: Indices
    k: Indices
    upper: Float64Array
    lower: Float64Array
    slack: Float64Array | None = None

    def take(self, which: BoolArray | Indices) -> "_Cells":
        slack = None if self.slack is None else self.slack[which]
        return _Cells(self.x[which], self.k[which], self.upper[which], self.lower[which], slack)


@lru_cache(maxsize=64)
def linear_taps(size: int, length: int) -> tuple[Indices, Float32Array, Float32Array]:
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
    left, near, far = linear_taps(size, width)
    right = np.minimum(left + 1, size - 1)

    def widen(rows: Float32Array) -> Float32Array:
        return rows[:, left] * near + rows[:, right] * far

    upper, above, below = linear_taps(size, height)
    runs = runs_of_logits(logits, Taps.of(left, near, far, size), Taps.of(upper, above, below, size), widen)
    if runs is None:
        rows = widen(logits)
        lower = np.minimum(upper + 1, size - 1)
        runs = runs_of_mask(rows[upper] * above[:, None] + rows[lower] * below[:, None] > 0)
    return runs


def runs_of_logits(logits: Float32Array, across: Taps, down: Taps, widen: Widen) -> Runs | None:
    """Compute the runs of the mask of ``logits``, ``[size, size]`` of float32.

    Args:
        logits: Not clamped.
        across: How the mask's columns are made of those of the logits.
        down: The same for the rows.
        widen: Interpolates rows ``[n, size]`` along the width, to ``[n, width]``, just as the dense way does.

    Returns:
        The lengths of the runs in column-major order, background first. None if the last bit of a rounding decides
        (whether the machine multiplies and adds in one step): then only the dense way tells.
    """
    height, width = len(down.above), len(across.above)
    squares = _squares_on_the_outline(logits)
    smooth = len(squares) <= _OUTLINE * logits.size
    found = [np.zeros(0, np.int64)]
    for cells in _outline_cells(logits, squares, across, widen) if smooth else _all_cells(widen(logits)):
        flips = _flips(cells, logits, down, widen)
        if flips is None:
            return None
        found.append(flips)
    flips = np.concatenate(found)
    first, last = widen(logits[[0, -1]]) > 0
    ends = (np.flatnonzero(last[:-1] != first[1:]) + 1) * height  # between a column and the next
    toggles = np.sort(np.concatenate([flips, ends]), kind="stable")  # which merges the two
    return runs_between(np.concatenate([np.zeros(int(first[0]), np.int64), toggles]), height * width)


def _squares_on_the_outline(logits: Float32Array) -> Indices:
    """Find the squares of four neighbouring logits that have not all the same sign.

    Returns:
        ``c * (size - 1) + k`` for the square of the columns ``c`` and ``c + 1`` and the rows ``k`` and ``k + 1``, in
        order. The last column is one by itself.
    """
    positive, certain = logits > 0, logits > _TINY
    some, every = positive[:-1] | positive[1:], certain[:-1] & certain[1:]
    outline = some & ~every
    outline[:, :-1] = (some[:, :-1] | some[:, 1:]) & ~(every[:, :-1] & every[:, 1:])
    return np.flatnonzero(outline.T)


def _outline_cells(logits: Float32Array, squares: Indices, across: Taps, widen: Widen) -> Iterator[_Cells]:
    """Interpolate within squares along the width; yield where the sign changes from one row to the next."""
    size = len(logits)
    c = squares // (size - 1)
    k = squares - c * (size - 1)
    right = np.minimum(c + 1, size - 1)
    corners = logits[[k, k, k + 1, k + 1], [c, right, c, right]].astype(np.float64)
    upper, upper_step, lower, lower_step = corners[0], corners[1] - corners[0], corners[2], corners[3] - corners[2]
    slack = np.abs(corners).max(axis=0, initial=0) * _ROUNDING + _TINY
    # Each column of the mask crosses the squares of one column of the logits.
    first = np.searchsorted(c, np.arange(size + 1))
    of_column = np.diff(across.starts)
    number = np.repeat(np.diff(first), of_column)
    ends = np.cumsum(number)
    skipped = np.repeat(first[:-1], of_column) - (ends - number)
    parts = np.searchsorted(ends, np.arange(0, ends[-1], _AT_ONCE), side="right")
    for start, end in pairwise([*parts, len(number)]):
        part = slice(start, end)
        x = np.repeat(np.arange(start, end), number[part])
        square = np.arange(ends[start] - number[start], ends[end - 1]) + np.repeat(skipped[part], number[part])
        share = across.below[x]
        above, below = upper[square] + share * upper_step[square], lower[square] + share * lower_step[square]
        near_zero = np.flatnonzero(np.minimum(np.abs(above), np.abs(below)) <= slack.max())
        if len(near_zero):
            exact = _exact(_Cells(x[near_zero], k[square[near_zero]], above, below), logits, widen)
            above[near_zero], below[near_zero] = exact.upper, exact.lower
        at = np.flatnonzero((above > 0) != (below > 0))
        found = square[at]
        yield _Cells(x[at], k[found], above[at], below[at], slack[found])


def _all_cells(rows: Float32Array) -> Iterator[_Cells]:
    """Yield where the sign changes from one row to the next of ``[size, width]`` logits, all of them interpolated."""
    size, width = rows.shape
    positive = np.ascontiguousarray((rows > 0).T)  # column by column, as the runs go
    changes, flat = np.flatnonzero(positive[:, 1:] != positive[:, :-1]), rows.ravel()
    for start in range(0, len(changes), _AT_ONCE):
        part = changes[start : start + _AT_ONCE]
        x = part // (size - 1)
        k = part - x * (size - 1)
        at = k * width + x
        yield _Cells(x, k, flat[at].astype(np.float64), flat[at + width].astype(np.float64))


def _exact(cells: _Cells, logits: Float32Array, widen: Widen) -> _Cells:
    """Return the cells with the numbers that float32 makes."""
    rows = np.unique(np.concatenate([cells.k, cells.k + 1]))
    wide, at = widen(logits[rows]).astype(np.float64), np.searchsorted(rows, cells.k)
    return _Cells(cells.x, cells.k, wide[at, cells.x], wide[at + 1, cells.x])


def _flips(cells: _Cells, logits: Float32Array, down: Taps, widen: Widen) -> Indices | None:
    """Find where the mask changes within its columns.

    Returns:
        For each cell the place, in column-major order, of the first pixel that has the sign of its lower row. None if
        the last bit of a rounding decides.
    """
    size, height = len(logits), len(down.above)
    stretch, margin = height / size, height * _MARGIN
    across = cells.upper - cells.lower
    crossing = (cells.k + cells.upper / across + 0.5) * stretch - 0.5
    row = np.ceil(crossing)
    places: Indices = cells.x * height + row.astype(np.int64)
    # Nearly always the crossing lies so far from the mask's rows that no rounding can matter.
    beyond, steep = row - crossing, np.abs(across)
    near = margin if cells.slack is None else margin + stretch * cells.slack / steep
    doubts = np.flatnonzero(~((beyond > near) & (beyond < 1 - near) & (steep > _TINY)))
    if len(doubts):
        rows = _looked_at(cells.take(doubts), logits, down, widen)
        if rows is None:
            return None
        places[doubts] = cells.x[doubts] * height + rows
    return places


def _looked_at(cells: _Cells, logits: Float32Array, down: Taps, widen: Widen) -> Indices | None:
    """Find the first row of the mask, from ``starts[k]`` to ``starts[k + 1]``, that has the sign of the lower row.

    Pixels around the crossing are computed: nearly enough, and where that does not tell, as float32 does.
    """
    if cells.slack is None:
        rows, known = _first_rows(cells, down, _signs_in_float32)
        return rows if known.all() else None
    rows, known = _first_rows(cells, down, partial(_signs, slack=cells.slack))
    if not known.all():
        exact = _looked_at(_exact(cells.take(~known), logits, widen), logits, down, widen)
        if exact is None:
            return None
        rows[~known] = exact
    return rows


def _first_rows(cells: _Cells, taps: Taps, signs: Signs) -> tuple[Indices, BoolArray]:
    """Look at the rows of the mask around the crossing.

    Args:
        cells: Where to look.
        taps: How the mask's rows are made of those of the logits.
        signs: Computes whether pixels are above 0, and whether that is known, from the weights of both rows, any
            number for each cell: ``[m, n]``.

    Returns:
        The first row that has the sign of the lower row, and whether it is known.
    """
    size, height = len(taps.starts) - 1, len(taps.above)
    rises = cells.lower > 0
    first, last = taps.starts[cells.k], taps.starts[cells.k + 1]
    share = cells.upper / (cells.upper - cells.lower)
    start = np.ceil((cells.k + share + 0.5) * (height / size) - 0.5).astype(np.int64) - 1
    row = start + np.arange(_CANDIDATES)[:, None]
    at = np.clip(row, 0, height - 1)
    sign, sure = signs(cells, taps.above[at], taps.below[at])
    outside = (row < first) | (row >= last)
    same = np.where(outside, row < first, sign != rises)  # as the upper row
    known: BoolArray = np.logical_and.reduce(np.concatenate([sure | outside, same[:-1] | ~same[1:]]))
    flips: Indices = np.clip(start + same.sum(axis=0), first, last)
    return flips, known


def _signs(cells: _Cells, above: Float32Array, below: Float32Array, slack: Float64Array) -> tuple[BoolArray, BoolArray]:
    """Compute whether pixels are above 0; it is known unless rounding may decide."""
    pixels = cells.upper * above + cells.lower * below
    largest = np.maximum(np.abs(cells.upper), np.abs(cells.lower))
    return pixels > 0, np.abs(pixels) > slack + largest * _ROUNDING + _TINY


def _signs_in_float32(cells: _Cells, above: Float32Array, below: Float32Array) -> tuple[BoolArray, BoolArray]:
    """Compute it as float32 does, in every way that a machine may round: known if all agree."""
    upper, lower = cells.upper.astype(np.float32), cells.lower.astype(np.float32)
    first, second = upper * above, lower * below
    sign = first + second > 0
    # The same sum with one rounding less, in either order; in float64 its sign is exact.
    fused = cells.lower * below + first > 0
    fused_too = cells.upper * above + second > 0
    return sign, (sign == fused) & (sign == fused_too)
