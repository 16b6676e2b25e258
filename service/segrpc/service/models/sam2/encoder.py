"""SAM 2's image encoder, rearranged: equal to the reference's up to rounding, and faster on a CPU.

The reference is ``sam2.modeling.backbones`` of sam2 1.1. What is different (`docs/adr/0009-fast-encoder.md` has the
figures):

- Tokens are kept in the order of `segrpc.service.models.sam2.encoder_order`, so that windows, pools and what the neck
  adds to a level from the next are views.
- What lies outside of the image in a cut window is the same for every token: it is attended to, but not computed.
- Windows that see no others go through their blocks in pieces that stay in the caches.
- Products are oneDNN's, which add biases and residuals, and apply GELU, while the result is in registers.
- The neck's convolutions and those of the decoder are one product, and position embeddings are made once.
"""

import torch
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor
from torch.nn import functional

from segrpc.service.models.sam2.encoder_reader import read_weights
from segrpc.service.models.sam2.encoder_weights import Block, Run

# So many rows at a time go through a perceptron: its wide result takes 19 MB or less. glibc maps blocks of more than
# 32 MB anew each time, and their pages fault one by one.
_ROWS = 2048


class FastEncoder:
    """The image encoder of a model, in float32 on a CPU. Safe to use from several threads.

    Args:
        model: The model; its weights are copied.
        mean: ``[3, 1, 1]``, what the channels of an image in [0, 1] are normalised by, and `std`.
        int8: Whether the products of the blocks are in 8 bits: faster, but only roughly equal.

    Raises:
        UnsupportedEncoderError: If the model is built in another way than all published ones, or is elsewhere.
    """

    def __init__(self, model: SAM2Base, mean: Tensor, std: Tensor, *, int8: bool = False) -> None:
        self._weights = read_weights(model, int8=int8)
        self._mean, self._std = 255 * mean, 255 * std

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode an image ``[height, width, 3]`` of bytes.

        Returns:
            The fine map ``[1, 32, S/4, S/4]``, the medium one ``[1, 64, S/8, S/8]`` and the coarse one
            ``[1, 256, S/16, S/16]``, with the embedding of no memory in it. Channels are last in memory.
        """
        weights = self._weights
        tokens, levels = self._patches(self._normalised(pixels)), []
        for run in weights.runs:
            tokens, found = _in_pieces(run, tokens[run.order])
            levels += found
        fine, medium, coarse, coarsest = levels
        coarse.view(len(coarsest), 4, -1).add_(coarsest[:, None])
        return _map(fine, weights.rows[0]), _map(medium, weights.rows[1]), _map(coarse, weights.rows[2])

    def _normalised(self, pixels: Tensor) -> Tensor:
        """Return the image as the network sees it, ``[1, 3, S, S]``. It is scaled when it has that size."""
        planes, size = pixels.permute(2, 0, 1)[None].float(), self._weights.size
        resized = functional.interpolate(planes, (size, size), mode="bilinear", align_corners=False, antialias=True)
        return resized.sub_(self._mean).div_(self._std)

    def _patches(self, image: Tensor) -> Tensor:
        """Return the first tokens, in rows."""
        found = functional.conv2d(image, self._weights.patches, stride=4, padding=3)[0]
        return found.permute(1, 2, 0).flatten(0, 1).add_(self._weights.position)


def _in_pieces(run: Run, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return what a run makes of tokens ``[N, C]``, and the levels of the neck in it."""
    found = [_through(run, piece) for piece in _split(tokens, run.piece)]
    last, *levels = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True))
    return last, levels


def _through(run: Run, x: Tensor) -> list[Tensor]:
    levels = []
    for block, level in zip(run.blocks, run.levels, strict=True):
        x = _block(block, x)
        if level is not None:
            levels.append(level(x))
    return [x, *levels]


def _block(block: Block, x: Tensor) -> Tensor:
    normal = block.norm1(x)
    x = x if block.shortcut is None else _pooled(block.shortcut(normal))
    x = block.out.added(_attend(block, block.qkv(normal)), x)
    pieces = [block.mlp_out.added(block.mlp_in(block.norm2(piece), "gelu"), piece) for piece in _split(x, _ROWS)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _attend(block: Block, qkv: Tensor) -> Tensor:
    """Let tokens attend to one another within windows; ``[N, 3 * C]`` to ``[N, C]`` or, pooled, ``[N / 4, C]``."""
    parts, start = [], 0
    for one in block.windows:
        # A piece of the image has fewer windows.
        count = min(one.count, len(qkv) // one.tokens)
        stop = start + count * one.tokens
        q, k, v = qkv[start:stop].view(count, one.tokens, 3, block.heads, -1).unbind(2)
        if block.shortcut is not None:
            q = _pooled(q.flatten(0, 1)).view(count, -1, *q.shape[2:])
        if one.padding:
            # The reference pads after the norm, with zeros: of these a linear layer leaves its bias.
            _, bias_k, bias_v = block.qkv.bias.view(3, 1, 1, block.heads, -1).expand(-1, count, one.padding, -1, -1)
            k, v = torch.cat([k, bias_k], dim=1), torch.cat([v, bias_v], dim=1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        attended = functional.scaled_dot_product_attention(q, k, v)
        parts.append(attended.transpose(1, 2).reshape(-1, qkv.shape[1] // 3))
        start = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _split(x: Tensor, rows: int) -> tuple[Tensor, ...]:
    return x.split(rows)  # type: ignore[no-untyped-call, no-any-return]


def _pooled(x: Tensor) -> Tensor:
    """Return the largest of each four rows."""
    a, b, c, d = x.view(-1, 4, *x.shape[1:]).unbind(1)
    return torch.maximum(torch.maximum(a, b), torch.maximum(c, d))


def _map(tokens: Tensor, order: Tensor) -> Tensor:
    side = int(len(tokens) ** 0.5)
    return tokens[order].view(1, side, side, -1).permute(0, 3, 1, 2)
