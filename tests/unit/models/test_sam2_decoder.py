"""The fast decoder beside the reference's modules, small and with random weights; `tests/parity` has the real sizes."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam.prompt_encoder import PromptEncoder
from sam2.modeling.sam.transformer import TwoWayTransformer
from sam2.modeling.sam2_utils import MLP
from torch import Tensor, nn

from segrpc.service.models.sam2.decoder import FastDecoder
from segrpc.service.models.sam2.decoder_image import FastFeatures
from segrpc.service.models.sam2.decoder_reader import UnsupportedDecoderError

CHANNELS, SIDE = 64, 8
FEW, MANY = 3, 40  # points for which the image's side is computed in one way and in the other

Points = tuple[Tensor, Tensor]
Found = tuple[Tensor, Tensor, Tensor]


def small_model(*, depth: int = 2, activation: type[nn.Module] = nn.ReLU, **options: Any) -> Any:
    """Build a prompt encoder and a mask decoder whose every parameter is random; seeded."""
    settings = {
        "use_high_res_features": True,
        "iou_prediction_use_sigmoid": True,
        "pred_obj_scores": True,
        "pred_obj_scores_mlp": True,
        "dynamic_multimask_via_stability": True,
        "iou_head_hidden_dim": CHANNELS,
        **options,
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        transformer = TwoWayTransformer(depth, CHANNELS, num_heads=4, mlp_dim=128, activation=activation)
        decoder = MaskDecoder(transformer_dim=CHANNELS, transformer=transformer, **settings)
        encoder = PromptEncoder(CHANNELS, (SIDE, SIDE), (16 * SIDE, 16 * SIDE), mask_in_chans=16)
        for module in (decoder, encoder):
            for name, parameter in module.named_parameters():
                if "norm" in name or parameter.ndim == 1:  # those that would be 0 or 1
                    parameter.data += 0.3 * torch.randn_like(parameter)
    return SimpleNamespace(sam_prompt_encoder=encoder.eval(), sam_mask_decoder=decoder.eval())


@dataclass
class Case:
    """An image's maps, and a prompt on it."""

    maps: tuple[Tensor, Tensor, Tensor]  # coarse, fine, medium
    points: Points | None
    mask: Tensor | None


def case(seed: int, num_points: int, *, mask: bool) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        maps = (
            torch.randn(1, CHANNELS, SIDE, SIDE),
            torch.randn(1, CHANNELS // 8, 4 * SIDE, 4 * SIDE),
            torch.randn(1, CHANNELS // 4, 2 * SIDE, 2 * SIDE),
        )
        points = torch.rand(1, num_points, 2) * 16 * SIDE, torch.randint(0, 4, (1, num_points), dtype=torch.int32)
        return Case(maps, points if num_points else None, 3 * torch.randn(1, 1, 4 * SIDE, 4 * SIDE) if mask else None)


def ask_reference(model: Any, one: Case, multimask: bool) -> Found:
    with torch.inference_mode():
        coarse, fine, medium = one.maps
        sparse, dense = model.sam_prompt_encoder(points=one.points, boxes=None, masks=one.mask)
        masks, scores, _, object_scores = model.sam_mask_decoder(
            image_embeddings=coarse,
            image_pe=model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
            repeat_image=False,
            high_res_features=[fine, medium],
        )
    return masks, scores, object_scores[:, 0]


def ask_fast(decoder: FastDecoder, cases: list[Case], multimask: bool) -> Found:
    """Ask about cases of equal shape in one call."""
    with torch.inference_mode():
        features = [decoder.prepare(*one.maps) for one in cases]
        points = [one.points for one in cases if one.points is not None]
        masks = [one.mask for one in cases if one.mask is not None]
        joined = (torch.cat([xy for xy, _ in points]), torch.cat([labels for _, labels in points])) if points else None
        return decoder.decode(features, joined, torch.cat(masks) if masks else None, multimask)


def assert_close(ours: Found, theirs: Found) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


@pytest.fixture(scope="module")
def decoder(model: Any) -> FastDecoder:
    return FastDecoder(model, torch.float32)


@pytest.mark.parametrize("multimask", [True, False], ids=["three", "single"])
@pytest.mark.parametrize("mask", [True, False], ids=["refined", "first"])
@pytest.mark.parametrize("num_points", [0, 1, FEW, 17, 18, MANY])
def test_it_is_the_reference_up_to_rounding(
    model: Any, decoder: FastDecoder, num_points: int, mask: bool, multimask: bool
) -> None:
    one = case(1, num_points, mask=mask)
    assert_close(ask_fast(decoder, [one], multimask), ask_reference(model, one, multimask))


@pytest.mark.parametrize("multimask", [True, False], ids=["three", "single"])
@pytest.mark.parametrize("mask", [True, False], ids=["refined", "first"])
@pytest.mark.parametrize("num_points", [0, FEW, MANY])
def test_a_batch_of_images_is_the_images_one_by_one(
    model: Any, decoder: FastDecoder, num_points: int, mask: bool, multimask: bool
) -> None:
    cases = [case(seed, num_points, mask=mask) for seed in range(3)]
    together = ask_fast(decoder, cases, multimask)
    for i, one in enumerate(cases):
        assert_close(
            (together[0][i : i + 1], together[1][i : i + 1], together[2][i : i + 1]),
            ask_reference(model, one, multimask),
        )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(model: Any, decoder: FastDecoder, threads: int) -> None:
    one, before = case(2, FEW, mask=True), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_close(ask_fast(decoder, [one], True), ask_reference(model, one, True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("unstable", [0, 3, 6])
@pytest.mark.parametrize("delta", [0.01, 0.05])
def test_a_single_mask_gives_way_as_in_the_reference(delta: float, unstable: int) -> None:
    cases = [case(seed, FEW, mask=False) for seed in range(6)]
    always_single = small_model(dynamic_multimask_via_stability=False, dynamic_multimask_stability_delta=delta)
    found = [ask_reference(always_single, one, False)[0] for one in cases]
    stability = sorted(float(always_single.sam_mask_decoder._get_stability_scores(one)) for one in found)
    # Between two of them: one of the two could be rounded to the other side.
    threshold = sum([0.0, *stability, 2.0][unstable : unstable + 2]) / 2
    model = small_model(dynamic_multimask_stability_delta=delta, dynamic_multimask_stability_thresh=threshold)
    decoder = FastDecoder(model, torch.float32)
    together = ask_fast(decoder, cases, False)
    given_way = 0
    for i, one in enumerate(cases):
        expected = ask_reference(model, one, False)
        given_way += not torch.equal(expected[0], found[i])
        assert_close(ask_fast(decoder, [one], False), expected)
        assert_close((together[0][i : i + 1], together[1][i : i + 1], together[2][i : i + 1]), expected)
    assert given_way == unstable


@pytest.mark.parametrize("option", ["dynamic_multimask_via_stability", "iou_prediction_use_sigmoid"])
@pytest.mark.parametrize("multimask", [True, False], ids=["three", "single"])
def test_options_of_the_model_are_read_from_it(option: str, multimask: bool) -> None:
    options: dict[str, Any] = {option: False}
    model = small_model(**options)
    one = case(4, FEW, mask=False)
    assert_close(ask_fast(FastDecoder(model, torch.float32), [one], multimask), ask_reference(model, one, multimask))


def _set(path: str, value: object) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            model = getattr(model, parent)
        setattr(model, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set("sam_mask_decoder.pred_obj_scores", False), "pred_obj_scores"),
        (_set("sam_mask_decoder.use_high_res_features", False), "use_high_res_features"),
        (_set("sam_mask_decoder.num_mask_tokens", 3), "num_mask_tokens"),
        (_set("sam_mask_decoder.pred_obj_score_head", nn.Linear(CHANNELS, 1)), "heads"),
        (_set("sam_mask_decoder.iou_prediction_head", MLP(CHANNELS, CHANNELS, 4, 2)), "heads"),
        (_set("sam_mask_decoder.iou_prediction_head", MLP(CHANNELS, 2 * CHANNELS, 4, 3)), "hidden layers of heads"),
        (_set("sam_mask_decoder.iou_prediction_head.act", nn.GELU()), "heads"),
        (_set("sam_mask_decoder.output_upscaling", nn.Sequential(nn.GELU())), "output_upscaling"),
        (_set("sam_mask_decoder.transformer.layers", nn.ModuleList()), "skip_first_layer_pe"),
        (_set("sam_mask_decoder.transformer.final_attn_token_to_image", nn.Identity()), "attention"),
        (_set("sam_mask_decoder.transformer", nn.Identity()), "mask decoder"),
        (_set("sam_prompt_encoder.mask_downscaling", nn.Sequential(nn.GELU())), "mask_downscaling"),
        (_set("sam_prompt_encoder.image_embedding_size", (8, 4)), "image_embedding_size"),
        (_set("sam_prompt_encoder", nn.Identity()), "prompt encoder"),
    ],
)
def test_a_model_of_another_structure_is_refused(change: Callable[[Any], None], named: str) -> None:
    model = small_model()
    change(model)
    with pytest.raises(UnsupportedDecoderError, match=named):
        FastDecoder(model, torch.float32)


def test_another_activation_is_refused() -> None:
    with pytest.raises(UnsupportedDecoderError, match="mlp"):
        FastDecoder(small_model(activation=nn.GELU), torch.float32)


def test_another_depth_is_not() -> None:
    model, one = small_model(depth=3), case(5, FEW, mask=True)
    assert_close(ask_fast(FastDecoder(model, torch.float32), [one], True), ask_reference(model, one, True))


def test_maps_come_back_bit_for_bit(decoder: FastDecoder) -> None:
    one = case(6, 0, mask=False)
    with torch.inference_mode():
        for ours, theirs in zip(decoder.maps(decoder.prepare(*one.maps)), one.maps, strict=True):
            assert torch.equal(ours, theirs)


def test_the_memory_of_features_is_counted_and_they_can_be_moved(decoder: FastDecoder) -> None:
    with torch.inference_mode():
        features = decoder.prepare(*case(7, 0, mask=False).maps)
    moved: list[Tensor] = []

    def move(tensor: Tensor) -> Tensor:
        moved.append(tensor)
        return tensor.clone()

    copy = features.moved(move)
    assert isinstance(copy, FastFeatures)
    assert sum(one.nbytes for one in moved) == features.nbytes == copy.nbytes


def test_two_threads_at_the_same_time(decoder: FastDecoder) -> None:
    cases = [case(seed, FEW, mask=bool(seed % 2)) for seed in range(4)]
    alone = [ask_fast(decoder, [one], False) for one in cases]
    start, wrong = threading.Barrier(len(cases)), []

    def work(i: int) -> None:
        start.wait()
        for _ in range(20):
            found = ask_fast(decoder, [cases[i]], False)
            if not all(torch.equal(one, other) for one, other in zip(found, alone[i], strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [True, False], ids=["refined", "first"])
def test_half_precision_is_nearer_to_float32_than_the_reference_s(model: Any, dtype: torch.dtype, mask: bool) -> None:
    decoder = FastDecoder(model, dtype)
    errors: list[tuple[Tensor, Tensor]] = []
    for seed in range(6):
        one = case(seed, FEW, mask=mask)
        exact = ask_reference(model, one, True)[0]
        half = Case((one.maps[0], one.maps[1].to(dtype), one.maps[2].to(dtype)), one.points, one.mask)
        with torch.autocast("cpu", dtype):
            theirs, ours = ask_reference(model, half, True)[0], ask_fast(decoder, [half], True)[0]
        errors.append(((ours - exact).abs().mean(), (theirs.float() - exact).abs().mean()))
    ours, theirs = (torch.stack(some).mean() for some in zip(*errors, strict=True))
    assert ours < 0.5 * theirs
