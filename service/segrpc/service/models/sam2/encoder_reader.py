"""Reads the image encoder of a model that `build_sam2` built, and arranges its weights."""

from typing import Any

import torch
from sam2.modeling.backbones.hieradet import Hiera, MultiScaleAttention, MultiScaleBlock
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn

from segrpc.service.models.sam2.decoder_weights import Norm
from segrpc.service.models.sam2.encoder_int8 import Int8Linear
from segrpc.service.models.sam2.encoder_order import Windows, expanded, token_order, windows
from segrpc.service.models.sam2.encoder_weights import Block, EncoderWeights, Linear, PackedLinear, Run

# Of the tokens that see no others so many go through their blocks at a time: what is computed of them stays in the
# caches. From 2,048 to 8,192 there is little difference.
_PIECE = 8192


class UnsupportedEncoderError(Exception):
    """The model's image encoder is not built as the fast one expects, or cannot be computed so."""


def read_weights(model: SAM2Base, *, int8: bool = False) -> EncoderWeights:
    """Read the weights of a model.

    Args:
        model: The model.
        int8: Whether the products of the blocks are `Int8Linear`; those of the neck are few, and stay in float32.

    Raises:
        UnsupportedEncoderError: If it is not built as all published ones are, or not in float32 on a CPU with oneDNN.
    """
    encoder: Any = model.image_encoder
    _check(model, encoder)
    if int8 and not Int8Linear.works():
        raise UnsupportedEncoderError("this build of torch or this CPU lacks products of 8 bits (VNNI)")
    with torch.no_grad():
        return _Reader(model, encoder, Int8Linear if int8 else PackedLinear).read()


def _check(model: Any, encoder: Any) -> None:
    right = type(encoder) is ImageEncoder and type(encoder.trunk) is Hiera and type(encoder.neck) is FpnNeck
    if not right:
        raise UnsupportedEncoderError("it has another image encoder")
    trunk, neck, blocks = encoder.trunk, encoder.neck, encoder.trunk.blocks
    if not all(type(block) is MultiScaleBlock and type(block.attn) is MultiScaleAttention for block in blocks):
        raise UnsupportedEncoderError("its blocks are others")
    strides = [(2, 2) if i - 1 in trunk.stage_ends else None for i in range(len(blocks))]
    patches, weight = trunk.patch_embed.proj, trunk.patch_embed.proj.weight
    for name, holds in {
        "number of stages": len(trunk.stage_ends) == 4 and trunk.return_interm_layers,
        "pooling": [block.q_stride for block in blocks] == strides,
        "width of blocks": all((block.dim != block.dim_out) == bool(block.q_stride) for block in blocks),
        "windows": all(block.window_size % 2 == 0 for block in blocks if block.q_stride),
        "mlp": all(block.mlp.num_layers == 2 and type(block.mlp.act) is nn.GELU for block in blocks),
        "norm": all(type(norm) is nn.LayerNorm for block in blocks for norm in (block.norm1, block.norm2)),
        "patch_embed": (patches.stride, patches.padding, weight.shape[2:]) == ((4, 4), (3, 3), (7, 7)),
        "neck": all(conv.conv.kernel_size == (1, 1) and conv.conv.padding == (0, 0) for conv in neck.convs),
        "fuse_type": neck.fuse_type == "sum",
        "fpn_interp_model": neck.fpn_interp_model == "nearest",
        "fpn_top_down_levels": {0, 1, 2} & set(neck.fpn_top_down_levels) == {2},
        "levels": (encoder.scalp, model.num_feature_levels) == (1, 3) and model.use_high_res_features_in_sam,
        "image_size": model.image_size % 32 == 0,
        "device": weight.device.type == "cpu" and weight.dtype == torch.float32,
    }.items():
        if not holds:
            raise UnsupportedEncoderError(f"its {name} is another")
    if not PackedLinear.works():
        raise UnsupportedEncoderError("this build of torch lacks oneDNN's products")


class _Reader:
    """Arranges weights and orders of one model."""

    def __init__(self, model: Any, encoder: Any, linear: type[PackedLinear] | type[Int8Linear]) -> None:
        self._linear = linear
        self._model = model
        self._trunk = encoder.trunk
        self._convs = [one.conv for one in encoder.neck.convs][::-1]  # the finest first

    def read(self) -> EncoderWeights:
        trunk, size = self._trunk, self._model.image_size
        side = size // 4
        position = trunk._get_pos_embed((side, side))[0].flatten(0, 1) + trunk.patch_embed.proj.bias
        runs, orders = self._runs(side)
        fine, medium, coarse, coarsest = orders
        if not torch.equal(coarse, expanded(coarsest, side // 8)):
            raise UnsupportedEncoderError("its windows of the last stages are others")
        return EncoderWeights(
            size=size,
            patches=trunk.patch_embed.proj.weight.detach().contiguous(memory_format=torch.channels_last),
            position=position,
            runs=runs,
            rows=(fine.argsort(), medium.argsort(), coarse.argsort()),
        )

    def _runs(self, side: int) -> tuple[tuple[Run, ...], list[Tensor]]:
        """Return the blocks, and the order of tokens at the end of each stage."""
        order = token_order(side, self._trunk.window_spec[0])
        parts: list[tuple[Tensor, list[Block], list[PackedLinear | None]]] = [(order, [], [])]
        ends: list[Tensor] = []
        for i, block in enumerate(self._trunk.blocks):
            wanted = token_order(side, block.window_size) if block.window_size else order
            if not torch.equal(order, wanted):
                parts.append((order.argsort()[wanted], [], []))
                order = wanted
            _, blocks, levels = parts[-1]
            blocks.append(self._block(block, windows(side, block.window_size or side)))
            if block.q_stride:
                order, side = _pooled(order, side), side // 2
            levels.append(self._level(len(ends)) if i in self._trunk.stage_ends else None)
            if i in self._trunk.stage_ends:
                ends.append(order)
        runs = [Run(change, tuple(blocks), tuple(levels), _piece(blocks)) for change, blocks, levels in parts]
        return tuple(runs), ends

    def _block(self, block: Any, seen: list[Windows]) -> Block:
        attention = block.attn
        return Block(
            windows=tuple(seen),
            heads=attention.num_heads,
            norm1=Norm.of(block.norm1),
            qkv=self._layer(attention.qkv),
            out=self._layer(attention.proj),
            norm2=Norm.of(block.norm2),
            mlp_in=self._layer(block.mlp.layers[0]),
            mlp_out=self._layer(block.mlp.layers[1]),
            shortcut=self._layer(block.proj) if block.q_stride else None,
        )

    def _layer(self, layer: Any) -> Linear:
        return self._linear(layer.weight, layer.bias)

    def _level(self, level: int) -> PackedLinear:
        """Return the neck's layer of a level, the finest being 0, with what follows it in the decoder."""
        weight, bias = self._convs[level].weight.flatten(1), self._convs[level].bias
        decoder = self._model.sam_mask_decoder
        if level < 2:
            then = (decoder.conv_s0, decoder.conv_s1)[level]
            weight, bias = then.weight.flatten(1) @ weight, then.weight.flatten(1) @ bias + then.bias
        if level == 2 and self._model.directly_add_no_mem_embed:
            bias = bias + self._model.no_mem_embed.flatten()
        return PackedLinear(weight, bias)


def _pooled(order: Tensor, side: int) -> Tensor:
    """Return what is left of the order of a grid ``[side, side]`` when each four tokens become one."""
    corner = order[::4]
    return corner // side // 2 * (side // 2) + corner % side // 2


def _piece(blocks: list[Block]) -> int:
    """Return how many tokens, at the start of some blocks, see no others through all of them."""
    first = blocks[0].windows
    count, tokens = first[0].count, first[0].tokens
    if any(len(block.windows) > 1 or block.windows[0].count != count for block in blocks):
        return sum(one.count * one.tokens for one in first)
    return tokens * max(1, min(count, _PIECE // tokens))
