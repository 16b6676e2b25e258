"""How prompts become first labels for GrabCut.

Everything happens on the grid of 256 x 256 cells that the image is stretched to. What a click speaks for is told by its
geodesic distance: the shortest way to it, where every step costs its change of colour.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from segrpc.service.models.base import LOGIT_LIMIT, DecodeRequest, Float32Array

Cells = npt.NDArray[np.uint8]  # [256, 256]: labels, or a mask of 0 and 1
BoolCells = npt.NDArray[np.bool_]

SIDE = 256
COARSE = 128  # the side of the grid of half the resolution, which is enough to measure distances on

SURE_BG, SURE_FG = np.uint8(cv2.GC_BGD), np.uint8(cv2.GC_FGD)
MAYBE_BG, MAYBE_FG = np.uint8(cv2.GC_PR_BGD), np.uint8(cv2.GC_PR_FGD)

_SURE_SHARE = 0.3  # the part of a click's claim, nearest to it, that is beyond doubt
_POINT_REACH = (0.02, 0.1, 0.4)  # part, object, whole: what clicks claim, as a share of the image
_FAR = 3.0  # times the reach: what lies beyond is background
_BOX_RADII = (0.6, 1.0, np.inf)  # part, object, whole: an ellipse in the box, or all of it, is object at first
_BOX_REACH = 0.03  # what clicks claim in a box, as a share of the box
_MASK_REACH = (0.1, 0.3, 0.6)  # what clicks correct in an earlier mask, as a share of the mask
_MASK_BAND = 8  # cells on both sides of an earlier outline that may change without a click
_UNREACHABLE = 1e9


@dataclass(frozen=True, slots=True)
class Scene:
    """What decoding needs of an image.

    Attributes:
        pixels: ``[256, 256, 3]``, RGB.
        lab: ``[128, 128, 3]``, smoothed.
        gradient: ``[256, 256]``, the change of colour per cell.
    """

    pixels: npt.NDArray[np.uint8]
    lab: Float32Array
    gradient: Float32Array


@dataclass(frozen=True, slots=True)
class GridPrompt:
    """A prompt on the grid.

    Attributes:
        fg: The cells that were clicked as object.
        bg: The cells that were clicked as background.
        inside: The cells of the box, or None.
        mask: The earlier mask, or None.
    """

    fg: BoolCells
    bg: BoolCells
    inside: BoolCells | None
    mask: Cells | None

    @classmethod
    def of(cls, request: DecodeRequest) -> "GridPrompt":
        """Bring a prompt to the grid. Of contradicting clicks into one cell, the last counts."""
        size = np.array([request.embedding.width, request.embedding.height])
        # A click means the pixel that it hits: what counts is what the mask is at that pixel's centre.
        centres = np.minimum(np.floor(request.points), size - 1) + 0.5
        columns, rows = (centres * SIDE / size).astype(int).T
        clicked = np.full((SIDE, SIDE), -1)
        clicked[rows, columns] = request.labels
        inside = None
        if request.box is not None:
            low, high = np.rint(request.box.reshape(2, 2) * SIDE / size).astype(int)
            x, y = np.minimum(low, SIDE - 1)
            inside = np.zeros((SIDE, SIDE), dtype=np.bool_)
            inside[y : max(y + 1, high[1]), x : max(x + 1, high[0])] = True
        mask = None
        # An earlier mask of nothing says nothing.
        if request.mask_input is not None and (request.mask_input > 0).any():
            mask = (request.mask_input[0] > 0).astype(np.uint8)
        return cls(clicked == 1, clicked == 0, inside, mask)


def first_labels(scene: Scene, prompt: GridPrompt) -> Iterator[Cells]:
    """Label the cells in three ways: from the smallest to the largest reading of the prompt."""
    if prompt.mask is not None:
        yield from _from_mask(scene, prompt, prompt.mask)
    elif prompt.inside is not None:
        yield from _from_box(scene, prompt, prompt.inside)
    else:
        yield from _from_points(scene, prompt)


def _from_points(scene: Scene, prompt: GridPrompt) -> Iterator[Cells]:
    to_fg, to_bg = distance_from(scene.lab, prompt.fg), distance_from(scene.lab, prompt.bg)
    only_bg = not prompt.fg.any()
    for reach in reversed(_POINT_REACH) if only_bg else _POINT_REACH:
        labels = np.full((SIDE, SIDE), MAYBE_FG if only_bg else MAYBE_BG)
        labels[to_fg > np.quantile(to_fg, min(_FAR * reach, 1))] = SURE_BG
        _claim(labels, to_fg, to_bg, reach, MAYBE_FG, SURE_FG)
        _claim(labels, to_bg, to_fg, reach, MAYBE_BG, SURE_BG)
        yield labels


def _from_box(scene: Scene, prompt: GridPrompt, inside: BoolCells) -> Iterator[Cells]:
    # A background click outside the box says no more than the box.
    to_fg, to_bg = distance_from(scene.lab, prompt.fg), distance_from(scene.lab, prompt.bg & inside)
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    y, x = ((np.arange(SIDE) - line.mean()) / (line.size / 2) for line in (rows, columns))
    radius = np.hypot(y[:, None], x)  # 1 in the middle of the box's sides
    reach = _BOX_REACH * inside.mean()
    for limit in _BOX_RADII:
        labels = np.where(radius < limit, MAYBE_FG, MAYBE_BG)
        if limit < 1 and not prompt.fg.any():
            labels[radius < limit / 3] = SURE_FG
        _claim(labels, to_fg, to_bg, reach, MAYBE_FG, SURE_FG)
        _claim(labels, to_bg, to_fg, reach, MAYBE_BG, SURE_BG)
        labels[~inside] = SURE_BG
        yield labels


def _from_mask(scene: Scene, prompt: GridPrompt, mask: Cells) -> Iterator[Cells]:
    """Keep the mask but for its outline and what the clicks that disagree with it speak for."""
    to_fg, to_bg = distance_from(scene.lab, prompt.fg), distance_from(scene.lab, prompt.bg)
    to_missing = distance_from(scene.lab, prompt.fg & (mask == 0))
    to_surplus = distance_from(scene.lab, prompt.bg & (mask == 1))
    far_from_outline = np.abs(signed_distance(mask)) > _MASK_BAND
    for share in _MASK_REACH:
        labels = np.where(mask, MAYBE_FG, MAYBE_BG)
        _claim(labels, to_missing, to_bg, share * mask.mean(), MAYBE_FG, SURE_FG)
        _claim(labels, to_surplus, to_fg, share * mask.mean(), MAYBE_BG, SURE_BG)
        unclaimed = dilate((labels & 1) != mask, _MASK_BAND) == 0
        kept = far_from_outline & unclaimed
        labels[kept] = mask[kept]  # 0 and 1 are the sure labels
        if prompt.inside is not None:
            labels[~prompt.inside] = SURE_BG
        yield labels


def _claim(
    labels: Cells, to_clicks: Float32Array, to_rivals: Float32Array, reach: float, maybe: np.uint8, sure: np.uint8
) -> None:
    """Give clicks the cells nearest to them, a share ``reach`` of all at most, unless a rival click is nearer."""
    limit = np.minimum(np.quantile(to_clicks, reach), to_rivals)
    labels[to_clicks < limit] = maybe
    labels[to_clicks < _SURE_SHARE * limit] = sure


def distance_from(lab: Float32Array, clicked: BoolCells) -> Float32Array:
    """Measure the geodesic distance of every cell from the nearest clicked one.

    Two sweeps down and up the rows come close to the shortest ways; each relaxes a whole row at once.

    Returns:
        ``[256, 256]``; huge everywhere if no cell is clicked.
    """
    distance = np.full((COARSE, COARSE), _UNREACHABLE)
    rows, columns = np.nonzero(clicked)
    distance[rows * COARSE // SIDE, columns * COARSE // SIDE] = 0
    down = np.linalg.norm(np.diff(lab, axis=0), axis=2) + 1  # even without a change of colour, a step is a step
    along = np.zeros((COARSE, COARSE))
    np.cumsum(np.linalg.norm(np.diff(lab, axis=1), axis=2) + 1, axis=1, out=along[:, 1:])

    def relax(row: int, previous: int) -> None:
        line, offset = distance[row], along[row]
        if row != previous:
            np.minimum(line, distance[previous] + down[min(row, previous)], out=line)
        # The best way along the row from any cell on the left, then from any on the right.
        np.minimum(line, np.minimum.accumulate(line - offset) + offset, out=line)
        np.minimum(line, np.minimum.accumulate((line + offset)[::-1])[::-1] - offset, out=line)

    for _ in range(2 if rows.size else 0):
        for row in range(COARSE):
            relax(row, max(row - 1, 0))
        for row in reversed(range(COARSE - 1)):
            relax(row, row + 1)
    return np.asarray(cv2.resize(distance.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_LINEAR))


def signed_distance(mask: Cells) -> Float32Array:
    """Measure how far every cell is inside (positive) or outside the outline: in cells, within [-32, 32]."""
    inside, outside = (cv2.distanceTransform(side, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for side in (mask, 1 - mask))
    # The outline runs half a cell before the nearest cell of the other side.
    distance = np.where(mask, inside - 0.5, 0.5 - outside)
    return np.clip(distance, -LOGIT_LIMIT, LOGIT_LIMIT).astype(np.float32)


def dilate(mask: BoolCells, radius: int) -> BoolCells:
    """Grow a mask by a disc."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    return np.asarray(cv2.dilate(mask.astype(np.uint8), disc)).astype(np.bool_)
