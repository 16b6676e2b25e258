"""The fast image encoder beside the reference's: the published sizes on a photo, and small ones with other windows."""

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sam2.build_sam import build_sam2
from sam2.modeling.backbones.hieradet import Hiera
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn
from torch.nn import functional

from segrpc.service.models.sam2.catalog import VARIANTS
from segrpc.service.models.sam2.encoder import FastEncoder
from segrpc.service.models.sam2.encoder_order import expanded, token_order, windows
from segrpc.service.models.sam2.encoder_reader import UnsupportedEncoderError
from segrpc.service.models.sam2.model import Sam2
from segrpc.service.schemas import ModelDeploymentConfig
from tests.checkpoints import write_checkpoint
from tests.photos import load_image

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

# Of the largest value of a map. Measured: 2e-6 at most.
BAR = 2e-5


def photo(width: int = 600, height: int = 400) -> Tensor:
    resized = load_image("coffee").convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized))


def randomize(model: Any) -> Any:
    """Give random values to the parameters that are 0 or 1 in a model without a checkpoint."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        trunk = model.image_encoder.trunk
        ones = [trunk.pos_embed, trunk.pos_embed_window, model.no_mem_embed]
        for block in trunk.blocks:
            ones += [block.norm1.weight, block.norm1.bias, block.norm2.weight, block.norm2.bias]
        for parameter in ones:
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def small_model(
    size: int = 256,
    *,
    stages: Sequence[int] = (1, 2, 3, 2),
    window_spec: Sequence[int] = (8, 4, 14, 7),
    global_att_blocks: Sequence[int] = (4,),
    no_mem_embed: bool = True,
    **neck: Any,
) -> Any:
    """Build an image encoder with few channels, in what `SAM2Base` needs to call it."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        trunk = Hiera(
            embed_dim=16,
            num_heads=1,
            stages=tuple(stages),
            window_spec=tuple(window_spec),
            global_att_blocks=tuple(global_att_blocks),
            window_pos_embed_bkg_spatial_size=(7, 7),
        )
        options = {"fpn_top_down_levels": [2, 3], "fpn_interp_model": "nearest", **neck}
        position = PositionEmbeddingSine(32)
        encoder = ImageEncoder(trunk, FpnNeck(position, 32, trunk.channel_list, **options), scalp=1)
        decoder = SimpleNamespace(conv_s0=nn.Conv2d(32, 4, 1), conv_s1=nn.Conv2d(32, 8, 1))
        model = SimpleNamespace(
            image_encoder=encoder.eval(),
            image_size=size,
            sam_mask_decoder=decoder,
            num_feature_levels=3,
            use_high_res_features_in_sam=True,
            directly_add_no_mem_embed=no_mem_embed,
            no_mem_embed=nn.Parameter(torch.zeros(1, 1, 32)),
        )
    return randomize(model)


def by_reference(model: Any, pixels: Tensor) -> list[Tensor]:
    """What ``SAM2ImagePredictor.set_image`` computes: the fine map, the medium one, the coarse one."""
    with torch.inference_mode():
        planes = pixels.permute(2, 0, 1).float().div(255)[None]
        size = (model.image_size, model.image_size)
        resized = functional.interpolate(planes, size, mode="bilinear", align_corners=False, antialias=True)
        outputs = SAM2Base.forward_image(model, (resized - MEAN) / STD)
        _, features, _, sizes = SAM2Base._prepare_backbone_features(model, outputs)
        if model.directly_add_no_mem_embed:
            features[-1] = features[-1] + model.no_mem_embed
        return [one.permute(1, 2, 0).view(1, -1, *size) for one, size in zip(features, sizes, strict=True)]


def fast(encoder: FastEncoder, pixels: Tensor) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        return encoder.encode(pixels)


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max() / other.abs().max()) < BAR


def check(model: Any, pixels: Tensor) -> None:
    assert_close(fast(FastEncoder(model, MEAN, STD), pixels), by_reference(model, pixels))


@pytest.mark.parametrize(
    "name",
    [
        "sam2.1-hiera-tiny",
        *(
            pytest.param(name, marks=pytest.mark.large)
            for name in ("sam2-hiera-tiny", *(f"sam2.1-hiera-{size}" for size in ("small", "base-plus", "large")))
        ),
    ],
)
def test_published_sizes_are_the_reference_up_to_rounding(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = randomize(build_sam2(VARIANTS[name].config, device="cpu"))
    check(model, photo())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": 512},
        {"size": 192},
        {"size": 224},
        {"size": 320, "window_spec": (8, 4, 16, 8)},
        {"window_spec": (8, 4, 2, 1)},
        {"window_spec": (16, 8, 4, 2), "global_att_blocks": ()},
        {"size": 192, "window_spec": (6, 10, 14, 7)},
        {"global_att_blocks": (0, 2)},
        {"global_att_blocks": (2, 5, 7)},
        {"stages": (2, 1, 2, 1), "global_att_blocks": ()},
        {"no_mem_embed": False},
    ],
    ids=str,
)
def test_any_windows_and_sides(options: dict[str, Any]) -> None:
    check(small_model(**options), photo(300, 200))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 900), (256, 256), (2000, 1500)])
def test_any_size_of_the_image(width: int, height: int) -> None:
    check(small_model(), photo(width, height))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(small_model(), photo())
    finally:
        torch.set_num_threads(before)


def test_an_image_always_gives_the_same_bits_in_any_thread() -> None:
    encoder, pixels = FastEncoder(small_model(), MEAN, STD), photo()
    expected, found = fast(encoder, pixels), []
    threads = [threading.Thread(target=lambda: found.append(fast(encoder, pixels))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for maps in found:
        assert all(torch.equal(one, other) for one, other in zip(maps, expected, strict=True))


@pytest.mark.parametrize(
    ("side", "window"), [(256, 8), (128, 4), (64, 14), (32, 7), (64, 16), (12, 14), (7, 7), (9, 4)]
)
def test_an_order_takes_each_token_once_and_windows_are_runs(side: int, window: int) -> None:
    order, start = token_order(side, window), 0
    assert torch.equal(order.sort().values, torch.arange(side * side))
    for one in windows(side, window):
        for _ in range(one.count):
            places = order[start : start + one.tokens]
            assert len({(y // window, x // window) for y, x in (divmod(int(place), side) for place in places)}) == 1
            assert one.tokens + one.padding == window * window
            start += one.tokens
    assert start == side * side


def test_pools_of_four_are_runs() -> None:
    pools = expanded(token_order(7, 3), 7).view(-1, 4)
    for place, pool in zip(token_order(7, 3).tolist(), pools.tolist(), strict=True):
        y, x = divmod(place, 7)
        assert pool == [28 * y + 2 * x, 28 * y + 2 * x + 1, 28 * y + 14 + 2 * x, 28 * y + 15 + 2 * x]


def _set(path: str, value: object) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            model = model[int(parent)] if parent.isdigit() else getattr(model, parent)
        setattr(model, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set("image_encoder", nn.Identity()), "image encoder"),
        (_set("image_encoder.trunk", nn.Identity()), "image encoder"),
        (_set("image_encoder.neck", nn.Identity()), "image encoder"),
        (_set("image_encoder.trunk.blocks.1.attn", nn.Identity()), "blocks"),
        (_set("image_encoder.trunk.stage_ends", [0, 2, 7]), "number of stages"),
        (_set("image_encoder.trunk.blocks.1.q_stride", None), "pooling"),
        (_set("image_encoder.trunk.blocks.1.window_size", 7), "windows"),
        (_set("image_encoder.trunk.blocks.2.mlp.act", nn.ReLU()), "mlp"),
        (_set("image_encoder.trunk.blocks.2.norm1", nn.Identity()), "norm"),
        (_set("image_encoder.trunk.patch_embed.proj.stride", (2, 2)), "patch_embed"),
        (_set("image_encoder.neck.fuse_type", "avg"), "fuse_type"),
        (_set("image_encoder.neck.fpn_interp_model", "bilinear"), "fpn_interp_model"),
        (_set("image_encoder.neck.fpn_top_down_levels", [1, 2, 3]), "fpn_top_down_levels"),
        (_set("image_encoder.scalp", 0), "levels"),
        (_set("num_feature_levels", 1), "levels"),
        (_set("use_high_res_features_in_sam", False), "levels"),
        (_set("image_size", 264), "image_size"),
        (_set("image_encoder.trunk.blocks.7.window_size", 5), "windows of the last stages"),
    ],
)
def test_a_model_of_another_structure_is_refused(change: Callable[[Any], None], named: str) -> None:
    model = small_model()
    change(model)
    with pytest.raises(UnsupportedEncoderError, match=named):
        FastEncoder(model, MEAN, STD)


def test_weights_that_are_not_in_float32_on_a_cpu_are_refused() -> None:
    for change in (torch.Tensor.double, lambda weight: weight.to("meta")):
        model = small_model()
        model.image_encoder._apply(change)
        with pytest.raises(UnsupportedEncoderError, match="device"):
            FastEncoder(model, MEAN, STD)


def test_a_torch_without_the_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *_: torch.ops.mkldnn.there_is_none())
    with pytest.raises(UnsupportedEncoderError, match="lacks oneDNN"):
        FastEncoder(model, MEAN, STD)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint("sam2.1-hiera-tiny", tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize(
    ("params", "is_fast"),
    [
        ({}, True),
        ({"decoder": "reference"}, False),
        ({"decoder": "reference", "encoder": "fast"}, True),
        ({"encoder": "reference"}, False),
        ({"dtype": "bfloat16"}, False),
    ],
    ids=str,
)
def test_which_encoder_a_model_takes(checkpoint: str, params: dict[str, str], is_fast: bool) -> None:
    given = {"checkpoint": checkpoint, "device": "cpu", **params}
    model = Sam2(ModelDeploymentConfig(name="sam2.1-hiera-tiny", model_params=given))
    model.load_model()
    assert (model._fast_encoder is not None) == is_fast
