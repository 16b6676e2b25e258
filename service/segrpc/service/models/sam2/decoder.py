"""SAM 2's prompt encoder and mask decoder, rearranged: equal to the reference's up to rounding, and much faster.

The reference is ``sam2.modeling.sam`` of sam2 1.1. What is different (`docs/adr/0008-fast-decoder.md` has the figures):

- The image stays ``[tokens, channels]`` all the way. A 2 x 2 transposed convolution of stride 2 is a product whose
  result are the finer pixels in block order: those of a token follow one another. Only masks are put into rows.
- What does not depend on the prompt is made once: constants with the weights, the rest with the embedding.
- The last attention and the heads compute only the tokens of the masks that are asked for.
- `segrpc.service.models.sam2.decoder_absorbed` multiplies by far smaller matrices.
"""

import math
from collections.abc import Callable, Sequence

import torch
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor
from torch.nn import functional

from segrpc.service.models.sam2.decoder_absorbed import AbsorbedImage, AbsorbedWeights
from segrpc.service.models.sam2.decoder_image import FastFeatures, ImageSide, ProjectedImage
from segrpc.service.models.sam2.decoder_reader import read_weights

# Up to so many tokens, 6 and those of the prompt, `AbsorbedImage` is the faster one (measured on 2 cores).
_FEW_TOKENS = 24

# Slices of the output tokens, which are the single mask, object score, IoU, three masks.
_FIRST, _THREE, _ALL = slice(0, 3), slice(1, 6), slice(0, 6)


class FastDecoder:
    """The prompt encoder and the mask decoder of a model. Safe to use from several threads.

    Args:
        model: The model; its weights are copied.
        dtype: What products of image tokens are computed in.

    Raises:
        UnsupportedDecoderError: If the model is built in another way than all published ones.
    """

    def __init__(self, model: SAM2Base, dtype: torch.dtype) -> None:
        self._weights = read_weights(model, dtype)
        device = self._weights.position.device
        self._on_cpu = device.type == "cpu"
        self._absorbed = AbsorbedWeights(self._weights) if self._on_cpu and dtype == torch.float32 else None

    def prepare(self, coarse: Tensor, fine: Tensor, medium: Tensor) -> FastFeatures:
        """Arrange an image's maps ``[1, C, S/16, S/16]``, ``[1, 32, S/4, S/4]`` and ``[1, 64, S/8, S/8]``."""
        weights, first = self._weights, self._weights.image_layers[0]
        tokens = coarse[0].flatten(1).t().contiguous()
        with torch.autocast(tokens.device.type, enabled=False):
            kvq = torch.addmm(first.position, tokens.to(weights.dtype), first.kvq.t())
        return FastFeatures(
            tokens=tokens,
            medium=_to_blocks(medium, weights.side),
            fine=_to_blocks(fine, weights.side),
            first_kvq=kvq.view(len(tokens), 3, weights.num_heads, -1).permute(1, 2, 0, 3).contiguous(),
        )

    def maps(self, features: FastFeatures) -> tuple[Tensor, Tensor, Tensor]:
        """Return the maps that `prepare` was given, bit for bit."""
        side = self._weights.side
        coarse = features.tokens.view(1, side, side, -1).permute(0, 3, 1, 2)
        return coarse, _from_blocks(features.fine, side, 1), _from_blocks(features.medium, side, 1)

    def decode(
        self,
        features: Sequence[FastFeatures],
        points: tuple[Tensor, Tensor] | None,
        masks: Tensor | None,
        multimask: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode prompts of equal shape.

        Args:
            features: The image of each prompt.
            points: Coordinates ``[B, n, 2]`` in the model's frame and labels ``[B, n]``, a box's corners among them.
            masks: Logits ``[B, 1, S/4, S/4]`` of earlier masks.
            multimask: Whether to return three masks instead of one.

        Returns:
            Logits ``[B, m, S/4, S/4]``, predicted IoU ``[B, m]`` and object scores ``[B]``, in float32.
        """
        with torch.autocast(self._weights.position.device.type, enabled=False):
            tokens = self._embed_points(len(features), points)
            mask = None if masks is None else self._embed_masks(masks)
            image: ImageSide
            if self._absorbed and len(features) == 1 and tokens.shape[1] <= _FEW_TOKENS:
                image = AbsorbedImage(self._absorbed, features[0], mask, tokens.shape[1])
            else:
                image = ProjectedImage(self._weights, features, mask)
            finish = self._transform(tokens, image)
            pixels = self._upscale(image, features)
            return self._three(finish, pixels) if multimask else self._single(finish, pixels)

    def _embed_points(self, batch: int, points: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the output tokens and those of points ``[B, T, C]``; see ``PromptEncoder._embed_points``."""
        weights, prompts = self._weights, self._weights.prompts
        tokens = [weights.output_tokens.expand(batch, -1, -1)]
        if points is not None:
            coordinates, labels = points
            angles = (2 * ((coordinates + 0.5) / prompts.image_size) - 1) @ prompts.gaussian * (2 * math.pi)
            placed = torch.cat([angles.sin(), angles.cos()], dim=-1) + prompts.labels[labels.long() + 1]
            # The reference appends a point that is none, with label -1, which has no place.
            tokens += [placed, prompts.labels[0].expand(batch, 1, -1)]
        return torch.cat(tokens, dim=1)

    def _embed_masks(self, masks: Tensor) -> Tensor:
        """Return the features of masks ``[B, 16, N]``: ``mask_downscaling`` up to its last convolution.

        Channels come first here, as there are so few.
        """
        prompts, side = self._weights.prompts, self._weights.side
        # [B, 4 pixels of a quarter, 4 quarters of a token * N]
        pixels = masks.view(-1, side, 2, 2, side, 2, 2).permute(0, 3, 6, 2, 5, 1, 4).reshape(len(masks), 4, -1)
        quarters = prompts.mask_1(pixels)  # [B, 4, 4 * N]
        return prompts.mask_2(quarters.view(len(masks), -1, side * side))

    def _transform(self, embedded: Tensor, image: ImageSide) -> Callable[[slice], Tensor]:
        """Run the layers of the two-way transformer, on `image` as well.

        Returns:
            What computes the last attention for some of the tokens.
        """
        weights = self._weights
        tokens = embedded
        for i, layer in enumerate(weights.token_layers):
            # In the first layer tokens are their own position, and the sum is left out.
            q_and_k = layer.self_qk(tokens if i == 0 else tokens + embedded)
            attended = layer.self_out(_attend(q_and_k, layer.self_v(tokens), weights.num_heads))
            tokens = layer.norm1(attended if i == 0 else tokens + attended)
            read = layer.to_image_out(image.read(layer.to_image_q(tokens + embedded)))
            tokens = layer.norm2(tokens + read)
            tokens = layer.norm3(tokens + layer.mlp_out(layer.mlp_in(tokens).relu_()))
            image.write(layer.from_image_k(tokens + embedded), layer.from_image_v(tokens))

        def finish(which: slice) -> Tensor:
            chosen = tokens[:, which]
            read = image.read(weights.final_q(chosen + embedded[:, which]))
            return weights.final_norm(chosen + weights.final_out(read))

        return finish

    def _upscale(self, image: ImageSide, features: Sequence[FastFeatures]) -> Tensor:
        """Return pixels ``[B, N * 16, 32]`` in block order."""
        up = self._weights.upscaling
        medium = _joined([one.medium for one in features])
        fine = _joined([one.fine for one in features])
        x = image.upscaled(medium.view(-1, up.first.weight.shape[0])).view(medium.shape)
        # In place, which torch.nn.functional does not offer: another 12 MB would not fit into the caches beside these.
        x = torch.ops.aten.gelu_(up.norm(x))
        x = (fine.view(len(x), -1) + up.second.bias).addmm_(x, up.second.weight.t())
        torch.ops.aten.gelu_(x)
        return x.view(len(features), -1, fine.shape[-1])

    def _three(self, finish: Callable[[slice], Tensor], pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self._heads(finish(_THREE), _THREE)
        return self._logits(found[:, 2:], pixels), self._iou(found[:, 1])[:, 1:], found[:, 0, 0]

    def _single(self, finish: Callable[[slice], Tensor], pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find the single mask, or the best of the others; see ``MaskDecoder._dynamic_multimask_via_stability``."""
        # One prompt's other masks are computed when they are needed, which is seldom, and only the one. To find out for
        # which of many they are, and on a GPU to find out at all, costs more than to compute them.
        lazy = self._on_cpu and len(pixels) == 1
        which = _FIRST if lazy else _ALL
        found = self._heads(finish(which), which)
        logits, iou, object_scores = self._logits(found[:, :1], pixels), self._iou(found[:, 2]), found[:, 1, 0]
        stability = self._weights.stability
        if stability is None:
            return logits, iou[:, :1], object_scores
        inner, outer = (
            torch.count_nonzero(logits > limit, dim=(-2, -1)).float() for limit in (stability.delta, -stability.delta)
        )
        stable = torch.where(outer > 0, inner / outer, 1.0) >= stability.threshold  # [B, 1]
        if lazy and bool(stable):
            return logits, iou[:, :1], object_scores
        best = iou[:, 1:].argmax(dim=-1, keepdim=True)  # [B, 1]
        if lazy:
            chosen_one = slice(3 + int(best), 4 + int(best))
            chosen = self._heads(finish(chosen_one), chosen_one)
        else:
            chosen = found.gather(1, 3 + best[..., None].expand(-1, -1, found.shape[-1]))
        logits = torch.where(stable[..., None, None], logits, self._logits(chosen, pixels))
        return logits, torch.where(stable, iou[:, :1], iou[:, 1:].gather(1, best)), object_scores

    def _heads(self, tokens: Tensor, which: slice) -> Tensor:
        """Return what the heads of the output tokens `which` say of them: ``[B, k, C]`` to ``[B, k, 32]``."""
        heads = self._weights.heads
        x = tokens.transpose(0, 1)
        for weight, bias in zip(heads.weights[:-1], heads.biases[:-1], strict=True):
            x = torch.baddbmm(bias[which], x, weight[which]).relu_()
        return torch.baddbmm(heads.biases[-1][which], x, heads.weights[-1][which]).transpose(0, 1)

    def _iou(self, found: Tensor) -> Tensor:
        """Return the predicted IoU of all four masks ``[B, 4]``."""
        iou = found[:, :4]
        return iou.sigmoid() if self._weights.heads.sigmoid else iou

    def _logits(self, kernels: Tensor, pixels: Tensor) -> Tensor:
        """Return masks ``[B, m, S/4, S/4]`` of the hypernetworks' results ``[B, m, 32]``."""
        side, (batch, count, channels) = self._weights.side, kernels.shape
        # By rows of tokens: a single product of so few rows would be left to one thread.
        by_row = pixels.view(batch, side, -1, channels).transpose(2, 3)
        products = kernels[:, None] @ by_row
        # Axes: batch, y, mask, x, and two times a half of y and a half of x. The last two pixels are neighbours in rows
        # as well, and go as one number of 64 bits: that is ten times faster.
        pairs = products.view(torch.float64).view(batch, side, count, side, 2, 2, 2)
        rows = pairs.permute(0, 2, 1, 4, 6, 3, 5).reshape(batch, count, 4 * side, 2 * side)
        return rows.view(torch.float32)


def _attend(q_and_k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Let tokens ``[B, T, C]`` attend to one another."""
    q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (*q_and_k.chunk(2, dim=-1), v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _to_blocks(rows: Tensor, side: int) -> Tensor:
    """Reorder maps ``[B, c, side * 2^k, side * 2^k]`` by token, then by its quarters; ``[B * side^2 * 4^k, c]``."""
    batch, channels, height, _ = rows.shape
    levels = (height // side).bit_length() - 1
    # Axes: batch, channels, y and k times half of it, x and k times half of it.
    split = rows.reshape(batch, channels, side, *[2] * levels, side, *[2] * levels)
    y = range(2, 3 + levels)
    order = [axis for pair in zip(y, range(3 + levels, 4 + 2 * levels), strict=True) for axis in pair]
    return split.permute(0, *order, 1).reshape(-1, channels)


def _from_blocks(blocks: Tensor, side: int, batch: int) -> Tensor:
    """Undo `_to_blocks`; ``[B, c, side * 2^k, side * 2^k]``."""
    levels = (len(blocks) // (batch * side * side)).bit_length() // 2
    split = blocks.view(batch, side, side, *[2] * (2 * levels), -1)
    y, x = range(1, 2 + 2 * levels, 2), range(2, 3 + 2 * levels, 2)
    length = side << levels
    return split.permute(0, 3 + 2 * levels, *y, *x).reshape(batch, -1, length, length)
