"""The image's side of the two-way transformer as the reference computes it, for any number of tokens and any batch.

`segrpc.service.models.sam2.decoder_absorbed` is another way, for few tokens. Shapes are named as in
`segrpc.service.models.sam2.decoder_weights`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from segrpc.service.models.sam2.decoder_weights import DecoderWeights


@dataclass(frozen=True, slots=True)
class FastFeatures:
    """An encoded image as the fast decoder wants it; the reference's three maps are in it, bit for bit.

    Attributes:
        tokens: ``[N, C]``, the coarse map.
        medium: ``[N * 4, 64]``, and `fine`, ``[N * 16, 32]``: the finer maps in block order, that is, the 2 x 2 or
            4 x 4 pixels of an image token follow one another.
        first_kvq: ``[3, H, N, D]``, keys, values and queries of the first layer without a mask input.
    """

    tokens: Tensor
    medium: Tensor
    fine: Tensor
    first_kvq: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All of it, in one order."""
        return self.tokens, self.medium, self.fine, self.first_kvq

    @property
    def nbytes(self) -> int:
        """How much memory they take."""
        return sum(one.nbytes for one in self.tensors)

    def moved(self, move: Callable[[Tensor], Tensor]) -> "FastFeatures":
        """Return what `move` makes of each tensor."""
        return FastFeatures(*map(move, self.tensors))


class ImageSide(Protocol):
    """The image tokens while a prompt is decoded."""

    def read(self, q: Tensor) -> Tensor:
        """Let tokens ``[B, T, I]``, projected and scaled, look at the image; ``[B, T, I]``."""

    def write(self, k: Tensor, v: Tensor) -> None:
        """Let the image look at tokens, ``[B, T, I]``, and go on to the next layer."""

    def upscaled(self, medium: Tensor) -> Tensor:
        """Put the image tokens through the first transposed convolution and add ``[B * N, 4 * 64]``."""


class ProjectedImage:
    """As the reference computes it, for any number of tokens and any batch.

    Args:
        weights: The decoder's weights.
        features: The images, one for each prompt.
        mask: ``[B, 16, N]``, the features of mask inputs, or None.
    """

    def __init__(self, weights: DecoderWeights, features: Sequence[FastFeatures], mask: Tensor | None) -> None:
        self._weights, self._level = weights, 0
        self._k, self._v, self._q = torch.stack([one.first_kvq for one in features], dim=1)  # [B, H, N, D] each
        self._tokens = torch.stack([one.tokens for one in features])
        if mask is None:
            self._tokens = self._tokens + weights.prompts.no_mask
            return
        dense = weights.prompts.mask_out(mask.transpose(1, 2))
        self._tokens = self._tokens + dense
        # What is in the embedding has the embedding of no mask in it.
        added = (dense - weights.prompts.no_mask).to(weights.dtype) @ weights.image_layers[0].kvq.t()
        k, v, q = (self._by_head(one) for one in added.chunk(3, dim=-1))
        self._k, self._v, self._q = self._k + k, self._v + v, self._q + q

    def read(self, q: Tensor) -> Tensor:
        """See `ImageSide`."""
        return self._attend(self._by_head(q), self._k, self._v)

    def write(self, k: Tensor, v: Tensor) -> None:
        """See `ImageSide`."""
        layer = self._weights.image_layers[self._level]
        assert layer.out is not None
        assert layer.norm is not None
        learnt = self._attend(self._q, self._by_head(k), self._by_head(v))
        self._tokens = layer.norm(self._tokens + layer.out(learnt))
        self._level += 1
        following = self._weights.image_layers[self._level]
        kvq = self._tokens.to(self._weights.dtype) @ following.kvq.t() + following.position
        self._k, self._v, *rest = (self._by_head(one) for one in kvq.chunk(3 if following.out else 2, dim=-1))
        self._q = rest[0] if rest else self._q

    def upscaled(self, medium: Tensor) -> Tensor:
        """See `ImageSide`."""
        up, tokens = self._weights.upscaling.first, self._tokens.flatten(0, 1).to(self._weights.dtype)
        return (medium + up.bias).addmm_(tokens, up.weight.t())

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Give ``[B, T, I]`` for what is ``[B, H, T, D]``; `q` or `k` is scaled."""
        q, k, v = (one.to(self._weights.dtype) for one in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2)

    def _by_head(self, x: Tensor) -> Tensor:
        """Turn ``[B, T, I]`` into ``[B, H, T, D]``."""
        return x.view(*x.shape[:2], self._weights.num_heads, -1).transpose(1, 2)
