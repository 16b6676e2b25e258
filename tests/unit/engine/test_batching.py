"""SAM 2 decodes requests of equal shape together as it decodes them one by one."""

import numpy as np
import pytest
import torch

from segrpc.service.models.base import DecodeRequest, Embedding
from segrpc.service.models.sam2.model import Sam2
from segrpc.service.schemas import ModelDeploymentConfig, NDArrayFloat
from tests.checkpoints import write_checkpoint

NAME = "sam2.1-hiera-tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Sam2:
    file = write_checkpoint(NAME, tmp_path_factory.mktemp("checkpoint"))
    made = Sam2(ModelDeploymentConfig(name=NAME, model_params={"checkpoint": str(file), "device": "cpu"}))
    made.load_model()
    return made


def embedding(model: Sam2, seed: int, width: int, height: int) -> Embedding:
    """An embedding of noise: encoding a photo takes seconds."""
    rng = np.random.default_rng(seed)
    coarse, fine, medium = (
        NDArrayFloat.from_numpy(rng.normal(size=shape))
        for shape in ((1, 256, 64, 64), (1, 32, 256, 256), (1, 64, 128, 128))
    )
    return model.import_embedding(coarse, [fine, medium], width, height)


def request(
    embedding: Embedding, *points: tuple[float, float], box: bool = False, mask: bool = False, num_masks: int = 3
) -> DecodeRequest:
    rng = np.random.default_rng(len(points))
    return DecodeRequest(
        embedding,
        np.array(points, np.float32).reshape(-1, 2),
        np.arange(len(points), dtype=np.int32) % 2,
        np.array([20, 30, 300, 250], np.float32) if box else None,
        rng.normal(size=(1, 256, 256)).astype(np.float32) if mask else None,
        num_masks,
    )


def test_it_batches_on_a_gpu_only(model: Sam2) -> None:
    assert not model.batches
    assert model.offload(Embedding(1, 1, None, 1)) is None


def test_requests_of_any_shapes(model: Sam2) -> None:
    one, other = embedding(model, 1, 451, 300), embedding(model, 2, 600, 400)
    requests = [
        request(one, (100, 120)),
        request(other, (200, 220)),
        request(one, (100, 120), num_masks=1),
        request(one, (30, 40), (50, 60)),
        request(other, box=True),
        request(one, box=True),
        request(other, (100, 120), mask=True, num_masks=1),
        request(one, (10, 12), mask=True, num_masks=1),
        request(one, mask=True, num_masks=1),
        request(other, mask=True, num_masks=1),
        request(one, (300, 20)),
    ]
    alone = model.decode(requests)
    with torch.inference_mode():
        together = model._decode_in_groups(requests)
    assert len(together) == len(alone)
    for found, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(found.logits, expected.logits, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-5)
        assert found.object_score == pytest.approx(expected.object_score, abs=1e-5)
    assert not np.array_equal(together[0].logits, together[1].logits)
