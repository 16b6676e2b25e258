"""The order of the image encoder's tokens in which none are moved: windows are runs, and so are pools of four.

SAM 2's Hiera (``sam2.modeling.backbones.hieradet``) attends within windows, and between stages pools 2 x 2 tokens,
which halves the windows. Attention does not depend on the order of tokens. So they are kept in one in which the tokens
of a window follow one another, and within it those of a pool, and those of the pool that this one will be in later.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of equal size that follow one another.

    Attributes:
        count: How many.
        tokens: Of each.
        padding: How many tokens of each lie outside of the grid. They are not stored.
    """

    count: int
    tokens: int
    padding: int


def token_order(side: int, window: int) -> Tensor:
    """Return where the tokens of a grid ``[side, side]`` are kept.

    Args:
        side: Of the grid, in tokens.
        window: The side of a window. It need not divide `side`: windows at the right and the bottom are cut.

    Returns:
        ``[side * side]``, the place in rows (``y * side + x``) of each token kept. If both sides are even this is
        ``expanded`` of the order of the pooled grid.
    """
    if side % 2 == 0 and window % 2 == 0:
        return expanded(token_order(side // 2, window // 2), side // 2)
    places = torch.arange(side * side).view(side, side)
    whole = side - side % window
    # Windows that are whole, cut at the right, cut at the bottom, and the one that is cut at both: see `windows`.
    parts = [part for rows in (places[:whole], places[whole:]) for part in (rows[:, :whole], rows[:, whole:])]
    return torch.cat([_by_window(part, window) for part in parts if part.numel()])


def windows(side: int, window: int) -> list[Windows]:
    """Return the windows of `token_order`, in its order."""
    whole, rest = divmod(side, window)
    sizes = [(whole * whole, window * window), (whole, window * rest), (whole, rest * window), (1, rest * rest)]
    return [Windows(count, tokens, window * window - tokens) for count, tokens in sizes if count * tokens]


def expanded(order: Tensor, side: int) -> Tensor:
    """Return the order of the finer grid, in which the four tokens of one of a grid ``[side, side]`` follow another."""
    corner = order // side * (4 * side) + order % side * 2
    return torch.stack([corner, corner + 1, corner + 2 * side, corner + 2 * side + 1], dim=1).flatten()


def _by_window(part: Tensor, window: int) -> Tensor:
    height, width = min(window, part.shape[0]), min(window, part.shape[1])
    return part.reshape(part.shape[0] // height, height, -1, width).transpose(1, 2).flatten()
