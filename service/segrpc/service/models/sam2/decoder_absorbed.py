"""The image's side of the two-way transformer with the projections applied to the prompt's tokens.

`ProjectedImage` projects all N image tokens to keys, values and queries in each layer, as the reference does. The T
tokens of a prompt are few, and a projection can as well be applied to them. For a head h, image tokens x, attention a:

- scores of the tokens:  q_h . (W_k x + b_k)  =  (W_k' q_h) . x  + a constant, which softmax ignores;
- what they read:        sum a_n (W_v x_n + b_v)  =  W_v (sum a_n x_n) + b_v,  because the a_n sum up to 1;
- scores of the image:   (W_q x + b_q) . k_h  =  (W_q' k_h) . x  +  b_q . k_h;
- what the image learns: W_o [sum over t of a_ht v_ht] + b_o  =  sum over h and t of a_ht (W_oh v_ht) + b_o.

Each is one product with H * T columns, 64 for 8 tokens, where the reference has two with 128. In the first layer the
image's keys, values and queries are those of the embedding, made once. A mask input adds ``W_out g + b`` to an image
token, and g has 16 channels only: so it adds products of rank 16 to those of the first layer.
"""

import math

import torch
from torch import Tensor

from segrpc.service.models.sam2.decoder_image import FastFeatures
from segrpc.service.models.sam2.decoder_weights import DecoderWeights, ImageLayer


class _Layer:
    """An `ImageLayer` by head; `extra` ``[C]`` is added to what the image learns."""

    def __init__(self, layer: ImageLayer, heads: int, extra: Tensor | None) -> None:
        depth = layer.kvq.shape[0] // (3 if layer.out else 2) // heads
        weights = layer.kvq.view(-1, heads, depth, layer.kvq.shape[1])  # [3, H, D, C]
        biases = layer.bias.view(-1, heads, 1, depth)  # [3, H, 1, D]
        self.k, self.v, self.v_bias = weights[0], weights[1].transpose(1, 2), biases[1]
        self.norm = layer.norm
        if layer.out is not None:
            self.q, self.q_bias = weights[2], biases[2].transpose(1, 2)
            self.out = layer.out.weight.t().reshape(heads, depth, -1)  # [H, D, C]
            self.constant = layer.out.bias[None] if extra is None else (layer.out.bias + extra)[None]  # [1, C]


class AbsorbedWeights:
    """The weights of the image's side, arranged for `AbsorbedImage`.

    Args:
        weights: In float32.
    """

    def __init__(self, weights: DecoderWeights) -> None:
        prompts, first, heads = weights.prompts, weights.image_layers[0], weights.num_heads
        self.num_heads = heads
        self.position = weights.position
        self.layers = [
            _Layer(layer, heads, prompts.no_mask if i == 0 else None) for i, layer in enumerate(weights.image_layers)
        ]
        self.upscaling = weights.upscaling.first
        # What 16 channels of a mask input and a constant 1 add to an image token, [17, C], and to its projections,
        # [H, 17, D]: those without a mask input, which are in the embedding, have `no_mask` in them.
        added = torch.cat([prompts.mask_out.weight.t(), prompts.mask_out.bias[None]])
        added[-1] -= prompts.no_mask
        projected = (added @ first.kvq.t()).view(len(added), 3, heads, -1).permute(1, 2, 0, 3)
        self.mask_k, self.mask_v, self.mask_q = projected.contiguous()
        self.mask_rows = added
        self.mask_rows[-1] += self.layers[0].constant[0]


class AbsorbedImage:
    """An `ImageSide` for one prompt of few tokens, in float32 on a CPU.

    Args:
        weights: The weights.
        features: The image.
        mask: ``[1, 16, N]``, the features of a mask input, or None.
        num_tokens: T.
    """

    def __init__(self, weights: AbsorbedWeights, features: FastFeatures, mask: Tensor | None, num_tokens: int) -> None:
        self._weights, self._level, self._masked = weights, 0, mask is not None
        self._tokens = features.tokens
        self._k, self._v, self._q = features.first_kvq  # [H, N, D] each
        self._placed = self._tokens  # from the second layer on: with their position
        # Products with few rows are split among the threads here: MKL hardly does.
        self._parts = math.gcd(1 << (min(torch.get_num_threads(), 8).bit_length() - 1), *self._tokens.shape)
        # What the updates of an image token multiply, [rows, N]: the features of a mask, a row of ones, and H * T of
        # attention.
        self._ones = 0 if mask is None else mask.shape[1]
        self._rows = torch.empty(self._ones + 1 + weights.num_heads * num_tokens, len(self._tokens))
        self._mask, self._attention = self._rows[: self._ones + 1], self._rows[self._ones + 1 :]
        self._mask[self._ones] = 1.0
        if mask is not None:
            self._mask[: self._ones] = mask[0]

    def read(self, q: Tensor) -> Tensor:
        """See `ImageSide`."""
        weights, layer = self._weights, self._weights.layers[self._level]
        q = self._by_head(q)  # [H, T, D]
        heads, count, _ = q.shape
        attention = self._attention[: heads * count]
        if self._level > 0:
            torch.softmax(self._later_scores(q, layer.k), dim=1, out=attention)
            columns = self._tokens.view(len(self._tokens), self._parts, -1).transpose(0, 1)
            seen = torch.bmm(attention.expand(self._parts, -1, -1), columns).transpose(0, 1).reshape(heads, count, -1)
            found = torch.baddbmm(layer.v_bias, seen, layer.v)
        else:
            torch.softmax(self._first_scores(q, self._k, weights.mask_k), dim=1, out=attention)
            found = torch.bmm(attention.view(heads, count, -1), self._v)
            if self._masked:
                found += torch.bmm(torch.mm(attention, self._mask.t()).view(heads, count, -1), weights.mask_v)
        return found.transpose(0, 1).reshape(1, count, -1)

    def write(self, k: Tensor, v: Tensor) -> None:
        """See `ImageSide`."""
        weights, layer = self._weights, self._weights.layers[self._level]
        assert layer.norm is not None
        k, v = self._by_head(k), self._by_head(v)
        if self._level > 0:
            scores = self._later_scores(k, layer.q, torch.bmm(k, layer.q_bias).view(-1, 1))
        else:
            scores = self._first_scores(k, self._q, weights.mask_q)
        by_head = (*k.shape[:2], -1)
        torch.softmax(scores.view(by_head), dim=1, out=self._attention.view(by_head))
        learnt = torch.bmm(v, layer.out).flatten(0, 1)
        if self._level > 0:
            # In place: these tokens are not the embedding's, and not needed any more.
            rows, learnt = self._rows[self._ones :].t(), torch.cat([layer.constant, learnt])
            summed = self._tokens.addmm_(rows, learnt)
        else:
            learnt = torch.cat([weights.mask_rows if self._masked else layer.constant, learnt])
            summed = torch.addmm(self._tokens, self._rows.t(), learnt)
        self._tokens = layer.norm(summed)
        self._placed = self._tokens + weights.position
        self._level += 1

    def upscaled(self, medium: Tensor) -> Tensor:
        """See `ImageSide`."""
        up = self._weights.upscaling
        return (medium + up.bias).addmm_(self._tokens, up.weight.t())

    def _first_scores(self, of: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        """Multiply tokens ``[H, T, D]`` with keys or queries of the first layer ``[H, N, D]``, a mask's included."""
        scores = torch.bmm(of, image.transpose(1, 2)).flatten(0, 1)
        return scores.addmm_(torch.bmm(of, mask.transpose(1, 2)).flatten(0, 1), self._mask) if self._masked else scores

    def _later_scores(self, of: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply tokens ``[H, T, D]`` with the keys or queries that ``[H, D, C]`` makes of the image."""
        absorbed = torch.bmm(of, weight).flatten(0, 1).expand(self._parts, -1, -1)
        image = self._placed.view(self._parts, -1, self._placed.shape[1]).transpose(1, 2)
        scores = torch.bmm(absorbed, image) if bias is None else torch.baddbmm(bias, absorbed, image)
        return scores.transpose(0, 1).reshape(absorbed.shape[1], -1)

    def _by_head(self, x: Tensor) -> Tensor:
        """Turn ``[1, T, I]`` into ``[H, T, D]``."""
        return x.view(x.shape[1], self._weights.num_heads, -1).transpose(0, 1)
