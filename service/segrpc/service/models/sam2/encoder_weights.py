"""The weights of SAM 2's image encoder, arranged for `segrpc.service.models.sam2.encoder`, and products with them.

Shapes are given with N tokens and C channels of a stage.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from segrpc.service.models.sam2.decoder_weights import Norm
from segrpc.service.models.sam2.encoder_order import Windows


class Linear(Protocol):
    """A linear layer ``[out, in]`` that adds the bias and more in passing.

    Attributes:
        bias: ``[out]``.
    """

    bias: Tensor

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """Apply it to ``[N, in]``, and then `activation`: ``none`` or ``gelu``."""
        ...

    def added(self, x: Tensor, to: Tensor) -> Tensor:
        """Apply it to ``[N, in]`` and add the result to ``[N, out]``, which may be overwritten."""
        ...


class PackedLinear:
    """A linear layer ``[out, in]`` in float32, as oneDNN packs it; see `Linear` for the methods.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]``.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self.bias = bias.detach()

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """See `Linear`."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, activation, [], "none")
        return found

    def added(self, x: Tensor, to: Tensor) -> Tensor:
        """See `Linear`."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, to, self._weight, self.bias, "add")
        return found

    @classmethod
    def works(cls) -> bool:
        """Tell whether this build of torch has what it takes; the operators are those of torch's own compiler."""
        try:
            linear, x = cls(torch.eye(2), torch.zeros(2)), torch.ones(1, 2)
            linear.added(linear(x, "gelu"), x)
        except (AttributeError, RuntimeError):
            return False
        return True


@dataclass(frozen=True, slots=True)
class Block:
    """A block of Hiera: attention within windows and a perceptron, each added to what it was given.

    Attributes:
        windows: In which it attends, in the order of the tokens; a single one: to all of the image.
        heads: Of the attention.
        shortcut: For a block that starts a stage: it pools four tokens into one of more channels, and so does this.
    """

    windows: tuple[Windows, ...]
    heads: int
    norm1: Norm
    qkv: Linear
    out: Linear
    norm2: Norm
    mlp_in: Linear
    mlp_out: Linear
    shortcut: Linear | None


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks between which tokens keep their order.

    Attributes:
        order: ``[N]``, where each token is among those that come in.
        blocks: The blocks.
        levels: For each of them the layer of the neck that its result goes through, if it ends a stage.
        piece: The number of tokens at the start that see no others all through the run.
    """

    order: Tensor
    blocks: tuple[Block, ...]
    levels: tuple[PackedLinear | None, ...]
    piece: int


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    """All that `FastEncoder` needs of a model.

    Attributes:
        size: Of the image that the network sees, in pixels.
        patches: ``[C, 3, 7, 7]`` with channels last, the convolution that makes tokens of patches.
        position: ``[N, C]``, the position embedding and the bias of the convolution, in rows.
        runs: The blocks. What goes into the first is in rows.
        rows: For the fine, the medium and the coarse level the order that puts its tokens into rows.
    """

    size: int
    patches: Tensor
    position: Tensor
    runs: tuple[Run, ...]
    rows: tuple[Tensor, Tensor, Tensor]
