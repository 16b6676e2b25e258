"""On a GPU masks are those of the reference on the same GPU, in each precision; who is decoded together gets their own.

Weights are random and give smooth logits, as trained ones do: with noise for logits half precision says little. The
module prints the IoU in bfloat16 and float16 with float32, per model.
"""

import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from sam2.build_sam import build_sam2

from segrpc.client import SegmentationClient
from segrpc.service.models.base import Embedding
from segrpc.service.models.sam2.catalog import VARIANTS
from segrpc.service.models.sam2.model import Sam2
from segrpc.service.schemas import FloatType, ModelDeploymentConfig
from tests.checkpoints import SMOOTH_CONTRAST, write_checkpoint
from tests.parity.reference import Answer, Prompt, Reference
from tests.parity.test_fast_decoder import iou, request_for
from tests.parity.test_sam2 import prompts_for
from tests.photos import load_image
from tests.server_process import ServerProcess

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TINY, LARGE = "sam2.1-hiera-tiny", "sam2.1-hiera-large"
PHOTOS = {
    "chelsea": (1024, 1024),
    "coffee": (1920, 1080),
    "astronaut": (600, 900),
    "photographer": (640, 480),
    "raccoon": (1280, 720),
}
Pixels = npt.NDArray[np.uint8]


class OnGPU:
    """A model of the service in some precision, and the reference in float32, both on the GPU with the same weights."""

    def __init__(self, name: str, checkpoint: Path, dtype: FloatType) -> None:
        params = {"checkpoint": str(checkpoint), "device": "cuda", "dtype": dtype}
        self.model = Sam2(ModelDeploymentConfig(name=name, model_params=params))
        self.model.load_model()
        self.reference = Reference(build_sam2(VARIANTS[name].config, str(checkpoint), device="cuda"))

    def masks(self, embedding: Embedding, prompt: Prompt, multimask: bool, mask: Any = None) -> list[bytes]:
        decoded = self.model.decode([request_for(embedding, prompt, multimask, mask)])[0]
        return [one.counts for one in self.model.to_masks(decoded, embedding.width, embedding.height)]


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, FloatType], OnGPU]:
    @cache
    def checkpoint(name: str) -> Path:
        return write_checkpoint(name, tmp_path_factory.mktemp(name), smooth=True, contrast=SMOOTH_CONTRAST)

    return lambda name, dtype: OnGPU(name, checkpoint(name), dtype)


def pixels(photo: str, width: int = 1024, height: int = 1024) -> Pixels:
    return np.array(load_image(photo).resize((width, height), Image.Resampling.BICUBIC))


class Compared:
    """The IoU of all masks of a suite with those of the reference in float32: ours, and those of its own precision."""

    def __init__(self, gpu: OnGPU, dtype: FloatType) -> None:
        self.ours: list[float] = []
        self.theirs: list[float] = []
        for photo, (width, height) in PHOTOS.items():
            image = pixels(photo, width, height)
            embedding = gpu.model.embed(image)
            asked = list(_questions(width, height))
            exact = _answers(gpu.reference, image, asked)
            with torch.autocast("cuda", getattr(torch, dtype), enabled=dtype != "float32"):
                theirs = _answers(gpu.reference, image, asked, [one.logits[:1] for one in exact])
            for (prompt, multimask, earlier), answer, own in zip(asked, exact, theirs, strict=True):
                mask = None if earlier is None else exact[earlier].logits[:1]
                ours = gpu.masks(embedding, prompt, multimask, mask)
                self.ours += _ious(ours, answer.counts, (height, width))
                self.theirs += _ious(own.counts, answer.counts, (height, width))


def _questions(width: int, height: int) -> Iterator[tuple[Prompt, bool, int | None]]:
    """Each prompt with three masks, with one, and again with the logits of an earlier answer, whose number is given."""
    for number, prompt in enumerate(prompts_for(width, height).values()):
        yield prompt, True, None
        yield prompt, False, None
        yield prompt, False, 3 * number


def _answers(
    reference: Reference,
    image: Pixels,
    asked: list[tuple[Prompt, bool, int | None]],
    logits: list[npt.NDArray[np.float32]] | None = None,
) -> list[Answer]:
    reference.set_image(image)
    found: list[Answer] = []
    for prompt, multimask, earlier in asked:
        given = logits or [one.logits[:1] for one in found]
        found.append(reference.predict(prompt, multimask, None if earlier is None else given[earlier]))
    return found


def _ious(ours: list[bytes], theirs: list[bytes], shape: tuple[int, int]) -> list[float]:
    return [1.0 if one == other else iou(one, other, shape) for one, other in zip(ours, theirs, strict=True)]


def say(request: pytest.FixtureRequest, text: str) -> None:
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{text}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [TINY, LARGE])
def test_masks_are_the_reference_s(
    on_gpu: Callable[[str, FloatType], OnGPU], name: str, dtype: FloatType, request: pytest.FixtureRequest
) -> None:
    found = Compared(on_gpu(name, dtype), dtype)
    mean, theirs = float(np.mean(found.ours)), float(np.mean(found.theirs))
    say(
        request,
        f"{name}, {dtype}: IoU of {len(found.ours)} masks with float32: mean {mean:.5f}, least {min(found.ours):.5f}; "
        f"of the reference's own: mean {theirs:.5f}, least {min(found.theirs):.5f}",
    )
    if dtype == "float32":
        assert min(found.ours) >= 0.999
    assert mean >= max(0.99, theirs - 0.001)


def test_an_embedding_that_went_to_the_host_is_the_same(on_gpu: Callable[[str, FloatType], OnGPU]) -> None:
    gpu = on_gpu(TINY, "bfloat16")
    embedding = gpu.model.embed(pixels("coffee"))
    away = gpu.model.offload(embedding)
    assert away is not None
    assert away.features.tokens.device.type == "cpu"
    for prompt in prompts_for(1024, 1024).values():
        assert gpu.masks(gpu.model.restore(away), prompt, True) == gpu.masks(embedding, prompt, True)


def test_encoding_and_decoding_at_the_same_time(on_gpu: Callable[[str, FloatType], OnGPU]) -> None:
    """The two lanes are threads with a stream each; neither may read what the other has not finished."""
    gpu = on_gpu(TINY, "float32")
    images = [pixels(photo) for photo in PHOTOS]
    prompt = prompts_for(1024, 1024)["one point"]
    embeddings = [gpu.model.embed(image) for image in images]
    expected = [gpu.masks(embedding, prompt, True) for embedding in embeddings]
    fresh: list[Embedding] = []
    encoding = threading.Thread(target=lambda: fresh.extend(gpu.model.embed(image) for image in images * 5))
    encoding.start()
    rounds = 0
    while encoding.is_alive() or rounds < 3:
        for embedding, masks in zip(embeddings, expected, strict=True):
            assert gpu.masks(embedding, prompt, True) == masks
        rounds += 1
    encoding.join()
    assert len(fresh) == 5 * len(PHOTOS)
    for i, embedding in enumerate(fresh):
        assert gpu.masks(embedding, prompt, True) == expected[i % len(PHOTOS)]


def test_sessions_that_are_decoded_together_get_their_own(tmp_path: Path) -> None:
    """Over gRPC: several clients with an image each click at the same time, and get what they get alone."""
    checkpoint = write_checkpoint(TINY, tmp_path, smooth=True, contrast=SMOOTH_CONTRAST)
    options = ["--checkpoint", str(checkpoint), "--device", "cuda"]
    photos = [pixels(photo, side, 800) for photo in PHOTOS for side in (700, 900)]
    clicks = [(100.0 + 40 * i, 120.0 + 50 * i) for i in range(10)]
    with ServerProcess(*options, log=tmp_path / "log") as server, SegmentationClient(server.target) as client:
        # Two masks each, so that the shapes of the calls differ and there are groups in a batch.
        alone = [[_click(client, photo, click, i) for i, click in enumerate(clicks)] for photo in photos]
        together: list[list[list[bytes]]] = [[] for _ in photos]
        start = threading.Barrier(len(photos))

        def work(number: int) -> None:
            with SegmentationClient(server.target) as own:
                start.wait()
                together[number] = [_click(own, photos[number], click, i) for i, click in enumerate(clicks)]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(photos))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for photo, ours, theirs in zip(photos, together, alone, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert len(one) == len(other)
            assert min(iou(a, b, photo.shape[:2]) for a, b in zip(one, other, strict=True)) >= 0.999


def _click(client: SegmentationClient, photo: Pixels, point: tuple[float, float], number: int) -> list[bytes]:
    points = [point] if number % 2 else [point, (50.0, 60.0)]
    result = client.segment(photo, points=[points], labels=[[1] * len(points)], multimask_output=number % 3 > 0)
    return [mask.rle["counts"] for mask in result.predictions[0].masks]
