"""Reading the weights of SAM 2's prompt encoder and mask decoder from a built model; see `DecoderWeights`."""

from typing import Any

import torch
from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam.prompt_encoder import PromptEncoder
from sam2.modeling.sam.transformer import Attention, TwoWayTransformer
from sam2.modeling.sam2_base import SAM2Base
from sam2.modeling.sam2_utils import MLP, LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional

from segrpc.service.models.sam2.decoder_weights import (
    DecoderWeights,
    Downscaling,
    Heads,
    ImageLayer,
    Linear,
    Norm,
    Prompts,
    Stability,
    TokenLayer,
    Upscaling,
)

# The output tokens in the order of `DecoderWeights`: single mask, object score, IoU, three masks. In the reference the
# object score and the IoU come first; attention does not depend on the order. This way what a single mask, the other
# three, or three masks without the single one need is a slice.
_IN_REFERENCE = [2, 0, 1, 3, 4, 5]


class UnsupportedDecoderError(Exception):
    """The model's decoder is not built as the fast one expects."""


def read_weights(model: SAM2Base, dtype: torch.dtype) -> DecoderWeights:
    """Read the weights of a model.

    Raises:
        UnsupportedDecoderError: If it is not built as all published ones are.
    """
    encoder, decoder = model.sam_prompt_encoder, model.sam_mask_decoder
    _check(encoder, decoder)
    with torch.no_grad():
        return _Reader(dtype, decoder.transformer.num_heads).read(encoder, decoder)


def _check(encoder: Any, decoder: Any) -> None:
    transformer: Any = getattr(decoder, "transformer", None)
    right = type(encoder) is PromptEncoder and type(decoder) is MaskDecoder and type(transformer) is TwoWayTransformer
    if not right:
        raise UnsupportedDecoderError("it has another prompt encoder or mask decoder")
    attentions = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        attentions += [layer.self_attn, layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    heads = [decoder.iou_prediction_head, *decoder.output_hypernetworks_mlps]
    heads += [decoder.pred_obj_score_head] if decoder.pred_obj_scores else []
    kinds = [nn.ConvTranspose2d, LayerNorm2d, nn.GELU, nn.ConvTranspose2d, nn.GELU]
    mask_kinds = [nn.Conv2d, LayerNorm2d, nn.GELU, nn.Conv2d, LayerNorm2d, nn.GELU, nn.Conv2d]
    for name, holds in {
        "pred_obj_scores": decoder.pred_obj_scores,
        "use_high_res_features": decoder.use_high_res_features,
        "num_mask_tokens": decoder.num_mask_tokens == 4,
        "attention": all(type(one) is Attention for one in attentions),
        "skip_first_layer_pe": [layer.skip_first_layer_pe for layer in transformer.layers]
        == [i == 0 for i in range(transformer.depth)],
        "mlp": all(layer.mlp.num_layers == 2 and _has_relu(layer.mlp) for layer in transformer.layers),
        "heads": all(isinstance(one, MLP) and one.num_layers == 3 and _has_relu(one) for one in heads),
        "hidden layers of heads": len({one.layers[0].weight.shape for one in heads if isinstance(one, MLP)}) == 1,
        "output_upscaling": [type(one) for one in decoder.output_upscaling] == kinds,
        "mask_downscaling": [type(one) for one in encoder.mask_downscaling] == mask_kinds,
        "image_embedding_size": encoder.image_embedding_size[0] == encoder.image_embedding_size[1],
    }.items():
        if not holds:
            raise UnsupportedDecoderError(f"its {name} is another")


def _has_relu(mlp: MLP) -> bool:
    return isinstance(mlp.act, nn.ReLU)


class _Reader:
    """Arranges weights; the methods' arguments are modules of sam2."""

    def __init__(self, dtype: torch.dtype, num_heads: int) -> None:
        self._dtype = dtype
        self._num_heads = num_heads

    def read(self, encoder: Any, decoder: Any) -> DecoderWeights:
        transformer, (side, _) = decoder.transformer, encoder.image_embedding_size
        position = encoder.get_dense_pe()[0].flatten(1).t().contiguous()
        layers, last = list(transformer.layers), transformer.final_attn_token_to_image
        prompts = self._prompts(encoder)
        cross = [(layer.cross_attn_token_to_image, layer.cross_attn_image_to_token) for layer in layers]
        images = [
            self._image(position, prompts.no_mask if i == 0 else None, to_image, from_image, layer.norm4)
            for i, (layer, (to_image, from_image)) in enumerate(zip(layers, cross, strict=True))
        ]
        tokens = torch.cat([decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight])
        stability = Stability(decoder.dynamic_multimask_stability_delta, decoder.dynamic_multimask_stability_thresh)
        return DecoderWeights(
            dtype=self._dtype,
            side=side,
            num_heads=self._num_heads,
            prompts=prompts,
            position=position,
            output_tokens=tokens[_IN_REFERENCE],
            token_layers=tuple(self._tokens(layer) for layer in layers),
            image_layers=(*images, self._image(position, None, last, None, None)),
            final_q=self._scaled(last.q_proj, last),
            final_out=self._linear(last.out_proj),
            final_norm=Norm.of(transformer.norm_final_attn),
            upscaling=self._upscaling(decoder.output_upscaling),
            heads=self._heads(decoder),
            stability=stability if decoder.dynamic_multimask_via_stability else None,
        )

    def _linear(self, *layers: Any, scale: float = 1.0) -> Linear:
        """Join layers that share their input."""
        weight = torch.cat([layer.weight for layer in layers]) * scale
        return Linear(weight, torch.cat([layer.bias for layer in layers]) * scale)

    def _narrow(self, linear: Linear) -> Linear:
        return Linear(linear.weight.to(self._dtype), linear.bias.to(self._dtype))

    def _scaled(self, layer: Any, attention: Any) -> Linear:
        return self._linear(layer, scale=float((attention.internal_dim // attention.num_heads) ** -0.5))

    def _tokens(self, layer: Any) -> TokenLayer:
        attention, to_image, from_image = (
            layer.self_attn,
            layer.cross_attn_token_to_image,
            layer.cross_attn_image_to_token,
        )
        return TokenLayer(
            self_qk=self._linear(attention.q_proj, attention.k_proj),
            self_v=self._linear(attention.v_proj),
            self_out=self._linear(attention.out_proj),
            norm1=Norm.of(layer.norm1),
            to_image_q=self._scaled(to_image.q_proj, to_image),
            to_image_out=self._linear(to_image.out_proj),
            norm2=Norm.of(layer.norm2),
            mlp_in=self._linear(layer.mlp.layers[0]),
            mlp_out=self._linear(layer.mlp.layers[1]),
            norm3=Norm.of(layer.norm3),
            from_image_k=self._scaled(from_image.k_proj, from_image),
            from_image_v=self._linear(from_image.v_proj),
        )

    def _image(self, position: Tensor, no_mask: Tensor | None, to_image: Any, from_image: Any, norm: Any) -> ImageLayer:
        parts = [to_image.k_proj, to_image.v_proj, *([from_image.q_proj] if from_image else [])]
        weight = torch.cat([part.weight for part in parts])
        bias = torch.cat([part.bias for part in parts])
        # Keys and queries see the position, values do not.
        placed = [position @ part.weight.t() for part in parts]
        placed[1] = torch.zeros_like(placed[1])
        constant = bias if no_mask is None else bias + weight @ no_mask
        return ImageLayer(
            kvq=weight.to(self._dtype),
            bias=bias.to(self._dtype),
            position=(torch.cat(placed, dim=1) + constant).to(self._dtype),
            out=self._narrow(self._linear(from_image.out_proj)) if from_image else None,
            norm=Norm.of(norm) if norm else None,
        )

    def _prompts(self, encoder: Any) -> Prompts:
        first, norm_1, _, second, norm_2, _, out = encoder.mask_downscaling
        labels = [encoder.not_a_point_embed.weight, *(one.weight for one in encoder.point_embeddings)]
        return Prompts(
            gaussian=encoder.pe_layer.positional_encoding_gaussian_matrix.float(),
            labels=torch.cat(labels),
            image_size=encoder.input_image_size[0],
            no_mask=encoder.no_mask_embed.weight[0].detach(),
            mask_1=self._downscaling(first, norm_1),
            mask_2=self._downscaling(second, norm_2),
            mask_out=Linear(out.weight.flatten(1).detach(), out.bias.detach()),
        )

    def _downscaling(self, convolution: Any, norm: Any) -> Downscaling:
        # [out, in, dy, dx] to [out, (in, dy, dx)]
        weight, bias = convolution.weight.flatten(1), convolution.bias[:, None]
        return Downscaling(
            weight=weight - weight.mean(dim=0),
            bias=bias - bias.mean(),
            gain=norm.weight[:, None].detach(),
            shift=norm.bias[:, None].detach(),
            eps=norm.eps,
        )

    def _upscaling(self, layers: Any) -> Upscaling:
        first, norm, _, second, _ = layers
        return Upscaling(self._narrow(self._transposed(first)), Norm.of(norm), self._transposed(second))

    def _transposed(self, layer: Any) -> Linear:
        # [in, out, dy, dx] to [(dy, dx, out), in]
        return Linear(layer.weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous(), layer.bias.repeat(4))

    def _heads(self, decoder: Any) -> Heads:
        masks = list(decoder.output_hypernetworks_mlps)
        mlps = [masks[0], decoder.pred_obj_score_head, decoder.iou_prediction_head, *masks[1:]]
        width = masks[0].layers[2].out_features
        weights, biases = [], []
        for i in range(3):
            # [out, in] to [in, width]
            pad = [width - mlp.layers[i].out_features if i == 2 else 0 for mlp in mlps]
            pairs = list(zip(mlps, pad, strict=True))
            weights.append(torch.stack([functional.pad(mlp.layers[i].weight.t(), (0, p)) for mlp, p in pairs]))
            biases.append(torch.stack([functional.pad(mlp.layers[i].bias[None], (0, p)) for mlp, p in pairs]))
        (one, two, three), (b_one, b_two, b_three) = weights, biases
        return Heads((one, two, three), (b_one, b_two, b_three), decoder.iou_prediction_head.sigmoid_output)
