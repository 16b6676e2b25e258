"""The weights of SAM 2's prompt encoder and mask decoder, arranged for `segrpc.service.models.sam2.decoder`.

Shapes are given with C = 256 channels, H = 8 heads of D = 16 channels in the cross attentions (I = H * D = 128), and
N = 64 * 64 image tokens; they are read from the model.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer: ``weight`` is ``[out, in]``, ``bias`` ``[out]``; what it is given is cast to their type."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it to the last axis."""
        return functional.linear(x.to(self.weight.dtype), self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm over the last axis, in float32."""

    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, layer: nn.LayerNorm) -> Self:
        """Take over a layer's weights."""
        return cls(layer.weight.detach(), layer.bias.detach(), layer.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it."""
        return functional.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class Downscaling:
    """A 2 x 2 convolution of stride 2, the norm over its channels and GELU, in float32.

    Attributes:
        weight: ``[out, in * 4]``, the four pixels of a channel together. Its mean over the channels is 0, so that the
            norm need not subtract that of the result.
        bias: ``[out, 1]``, likewise.
        gain: ``[out, 1]``, the norm's weight, and `shift` its bias.
        eps: Of the norm.
    """

    weight: Tensor
    bias: Tensor
    gain: Tensor
    shift: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Turn ``[B, in * 4, pixels]`` into ``[B, out, pixels]``."""
        x = self.weight @ x + self.bias
        scale = torch.rsqrt((x * x).mean(dim=1, keepdim=True) + self.eps)
        return functional.gelu(x * scale * self.gain + self.shift)


@dataclass(frozen=True, slots=True)
class ImageLayer:
    """The image's side of a layer's two cross attentions.

    Attributes:
        kvq: ``[3 * I, C]``: keys and values for the tokens that look at the image, and queries of the image that looks
            at the tokens. The last layer has no queries: ``[2 * I, C]``.
        bias: ``[3 * I]``, of `kvq`.
        position: ``[N, 3 * I]``: the bias and what the position embedding adds to keys and queries; in the first layer
            also what the embedding of no mask input adds.
        out: ``[C, I]``, for what the image learnt from the tokens, and `norm`, of the sum. None in the last layer.
    """

    kvq: Tensor
    bias: Tensor
    position: Tensor
    out: Linear | None = None
    norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class TokenLayer:
    """The tokens' side of a layer; ``to_image_q`` and ``from_image_k`` have the scale of the attention in them."""

    self_qk: Linear
    self_v: Linear
    self_out: Linear
    norm1: Norm
    to_image_q: Linear
    to_image_out: Linear
    norm2: Norm
    mlp_in: Linear
    mlp_out: Linear
    norm3: Norm
    from_image_k: Linear
    from_image_v: Linear


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompt encoder. `labels` is ``[5, C]``, for labels -1 to 3."""

    gaussian: Tensor
    labels: Tensor
    image_size: int
    no_mask: Tensor
    mask_1: Downscaling
    mask_2: Downscaling
    mask_out: Linear  # [C, 16]


@dataclass(frozen=True, slots=True)
class Upscaling:
    """The transposed convolutions as products: each gives a block of 2 x 2 for a row."""

    first: Linear  # [4 * 64, C]
    norm: Norm
    second: Linear  # [4 * 32, 64]


@dataclass(frozen=True, slots=True)
class Heads:
    """The small networks of the six output tokens: three layers ``[6, in, out]`` with ``[6, 1, out]``, side by side.

    The last layer is as wide as the hypernetworks' (32); those of the object score and the IoU leave the rest at 0.
    """

    weights: tuple[Tensor, Tensor, Tensor]
    biases: tuple[Tensor, Tensor, Tensor]
    sigmoid: bool


@dataclass(frozen=True, slots=True)
class Stability:
    """When a single mask gives way to the best of the other three."""

    delta: float
    threshold: float


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All that `FastDecoder` needs of a model, on its device.

    Products of the N image tokens are in `dtype`, all else is in float32: the few tokens of prompts, and what is
    multiplied with each pixel in the end. That costs next to nothing, and half precision loses a third as much.
    """

    dtype: torch.dtype
    side: int  # of the grid of image tokens
    num_heads: int
    prompts: Prompts
    position: Tensor  # [N, C]
    output_tokens: Tensor  # [6, C]
    token_layers: tuple[TokenLayer, ...]
    image_layers: tuple[ImageLayer, ...]  # one more, for the last attention
    final_q: Linear
    final_out: Linear
    final_norm: Norm
    upscaling: Upscaling
    heads: Heads
    stability: Stability | None
