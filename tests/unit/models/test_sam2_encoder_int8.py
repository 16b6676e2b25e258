"""The fast image encoder with products in 8 bits, beside float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from segrpc.service.errors import ModelLoadError
from segrpc.service.models.base import DecodeRequest
from segrpc.service.models.sam2.encoder_int8 import Int8Linear
from segrpc.service.models.sam2.model import Sam2
from segrpc.service.schemas import ModelDeploymentConfig
from tests.checkpoints import SMOOTH_CONTRAST, write_checkpoint
from tests.photos import iou, load_array, prompts_of

needs_vnni = pytest.mark.skipif(not Int8Linear.works(), reason="this CPU lacks products of 8 bits")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return write_checkpoint("sam2.1-hiera-tiny", folder, smooth=True, contrast=SMOOTH_CONTRAST)


def model(checkpoint: Path | str, **params: str) -> Sam2:
    given = {"checkpoint": checkpoint, "device": "cpu", **params}
    return Sam2(ModelDeploymentConfig(name="sam2.1-hiera-tiny", model_params=given))


@needs_vnni
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("shift", [-1000.0, -1.0, 0.0, 1.0, 1000.0])
def test_products_are_roughly_those_of_float32(seed: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((40, 24), generator=generator) + shift
    weight, bias, to = (torch.randn(shape, generator=generator) for shape in ((8, 24), (8,), (40, 8)))
    linear, expected = Int8Linear(weight, bias), functional.linear(x, weight, bias)
    # Half a step of each weight and each value, at worst all in the same direction; a value that wrapped around would
    # be 255 steps away.
    step = (max(float(x.max()), 0) - min(float(x.min()), 0)) / 254
    bar = 24 * float(step * weight.abs().max() + weight.abs().max() / 127 * x.abs().max())
    assert float((linear(x) - expected).abs().max()) < bar
    assert float((linear(x, "gelu") - functional.gelu(expected)).abs().max()) < 1.2 * bar
    assert float((linear.added(x, to.clone()) - expected - to).abs().max()) < bar


@needs_vnni
def test_the_ends_of_the_range_do_not_wrap_around() -> None:
    linear = Int8Linear(torch.eye(2), torch.zeros(2))
    for high in torch.linspace(0.1, 10, 997):
        x = torch.stack([-torch.ones(()), high])[None]
        assert torch.allclose(linear(x), x, atol=float(high + 1) / 100)


@needs_vnni
def test_zeros_give_the_bias() -> None:
    bias = torch.tensor([1.0, -2.0])
    assert torch.equal(Int8Linear(torch.zeros(2, 3), bias)(torch.zeros(4, 3)), bias.expand(4, 2))


@needs_vnni
def test_masks_change_a_little_and_are_the_same_each_time(checkpoint: Path) -> None:
    image, prompts = load_array("coffee"), prompts_of("coffee")
    points, labels = np.array(prompts.points, np.float32), np.array(prompts.labels, np.int32)
    found = []
    for encoder in ("fast", "int8", "int8"):
        one = model(checkpoint, encoder=encoder)
        one.load_model()
        request = DecodeRequest(one.embed(image), points, labels, None, None, 3)
        found.append(one.decode([request])[0].logits)
    exact, ours, again = found
    assert np.array_equal(ours, again)
    assert not np.array_equal(ours, exact)
    assert min(iou(a > 0, b > 0) for a, b in zip(ours, exact, strict=True)) > 0.95


def test_other_precisions_are_refused() -> None:
    with pytest.raises(ModelLoadError, match="is for float32 on a CPU, not for bfloat16 on cpu"):
        model("unread.pt", encoder="int8", dtype="bfloat16")


def test_a_cpu_without_the_products_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ModelLoadError, match=r"cannot be encoded in int8: .*VNNI"):
        model(checkpoint, encoder="int8").load_model()
