"""The clients against a real server."""

import asyncio
import io
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segrpc.client import (
    AsyncSegmentationClient,
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
    PreconditionError,
    SegmentationClient,
    UnavailableError,
)
from segrpc.client.codec import ImageLike
from tests.photos import drawn_mask, iou, load_array, load_image, photo_path, prompts_of
from tests.server_process import ServerProcess


@pytest.fixture
def client(server: ServerProcess) -> Any:
    with SegmentationClient(server.target) as opened:
        yield opened


def test_every_kind_of_image_gives_the_same_mask(client: SegmentationClient) -> None:
    path = photo_path("coffee")
    kinds: list[ImageLike] = [path, str(path), path.read_bytes(), load_array("coffee"), load_image("coffee")]
    masks = [client.segment(image, points=[(300, 200)]).predictions[0].best.array for image in kinds]
    for mask in masks[1:]:
        np.testing.assert_array_equal(mask, masks[0])


def test_a_mask_of_a_photo(client: SegmentationClient) -> None:
    prompts = prompts_of("coffee")
    result = client.segment(photo_path("coffee"), **prompts.box_only().arguments(), multimask_output=False)
    (mask,) = result.predictions[0].masks
    assert mask.array.shape == (result.image.height, result.image.width)
    assert mask.area == mask.array.sum()
    assert iou(mask.array, drawn_mask("coffee")) > 0.85
    assert result.timing.total > 0


def test_several_prompts_of_different_kinds(client: SegmentationClient) -> None:
    result = client.segment(
        photo_path("coffee"), points=[[(300, 200)], []], labels=[[1], []], boxes=[None, (100, 50, 500, 380)]
    )
    assert [len(prediction.masks) for prediction in result.predictions] == [3, 3]


def test_refinement(client: SegmentationClient) -> None:
    photo = photo_path("chelsea")
    first = client.segment(photo, points=[(200, 150)], return_logits=True)
    assert first.logits is not None
    assert first.logits.shape == (1, 3, 256, 256)
    chosen = first.logits[0, first.predictions[0].best_index]
    result = client.segment(
        photo, points=[(200, 150), (30, 30)], labels=[1, 0], mask_input=chosen, multimask_output=False
    )
    assert not result.predictions[0].best.array[30, 30]


def test_a_large_image_is_uploaded_and_known_afterwards(client: SegmentationClient) -> None:
    noise = np.random.default_rng(5).integers(0, 256, (800, 900, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    assert len(file.getvalue()) > 2**20
    result = client.segment(file.getvalue(), points=[(10, 10)])
    again = client.segment(result.image.digest, points=[(10, 10)])
    assert again.image == result.image
    np.testing.assert_array_equal(again.predictions[0].best.array, result.predictions[0].best.array)


def test_an_image_that_the_server_forgot_is_sent_again(tmp_path: Path) -> None:
    small = ["--image-store-bytes", str(2**17)]
    with ServerProcess(*small, log=tmp_path / "log") as server, SegmentationClient(server.target) as client:
        for name in ("chelsea", "coffee", "chelsea"):
            assert client.segment(photo_path(name), points=[(10, 10)]).predictions


def test_errors_are_typed_and_name_the_field(client: SegmentationClient) -> None:
    with pytest.raises(InvalidRequestError, match=r"prompts\[0\]\.points\[1\]\.x") as wrong:
        client.segment(photo_path("chelsea"), points=[(1, 1), (9999, 1)], request_id="mine")
    assert wrong.value.reason == "INVALID_FIELD"
    assert [violation.field for violation in wrong.value.violations] == ["prompts[0].points[1].x"]
    assert wrong.value.request_id == "mine"
    with pytest.raises(InvalidRequestError) as wrong:
        client.segment(b"not an image", points=[(1, 1)])
    assert wrong.value.reason == "IMAGE_UNDECODABLE"
    with pytest.raises(NotFoundError) as missing:
        client.model("sam9")
    assert missing.value.reason == "MODEL_NOT_FOUND"
    with pytest.raises(PreconditionError) as unable:
        client.encode(photo_path("chelsea"))
    assert unable.value.reason == "CAPABILITY_MISSING"


def test_a_timeout_covers_the_whole_method(client: SegmentationClient) -> None:
    with pytest.raises(DeadlineExceededError):
        client.segment(photo_path("raccoon"), points=[(10, 10)], timeout=0)


def test_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with SegmentationClient(f"127.0.0.1:{port}") as client, pytest.raises(UnavailableError):
        client.health()


def test_health_and_models(client: SegmentationClient) -> None:
    assert client.health()
    assert client.health("segrpc.v1.SegmentationService")
    assert not client.health("no.such.Service")
    (model,) = client.models()
    assert client.model() == client.model("grabcut") == model
    assert model.limits.max_prompts == 64


def test_an_embedding_goes_back_bit_for_bit(sam2_server: ServerProcess) -> None:
    with SegmentationClient(sam2_server.target) as client:
        photo = photo_path("coffee")
        encoded = client.encode(photo, return_image_embedding=True, tensor_dtype="bfloat16")
        assert encoded.embedding is not None
        assert encoded.embedding.image_embedding.dtype.name == "bfloat16"
        result = client.segment(
            photo, embedding=encoded.embedding, return_image_embedding=True, tensor_dtype="bfloat16"
        )
        assert result.embedding is not None
        for one, other in zip(
            (encoded.embedding.image_embedding, *encoded.embedding.high_resolution_features),
            (result.embedding.image_embedding, *result.embedding.high_resolution_features),
            strict=True,
        ):
            assert one.tobytes() == other.tobytes()


async def test_the_asyncio_client_does_the_same(server: ServerProcess) -> None:
    noise = np.random.default_rng(6).integers(0, 256, (700, 800, 3), dtype=np.uint8)
    async with AsyncSegmentationClient(server.target) as client:
        results = await asyncio.gather(*(client.segment(noise, points=[(x, 10)]) for x in (10, 20)))
        assert await client.health()
        assert [model.name for model in await client.models()] == ["grabcut"]
        assert (await client.upload(noise)) == results[0].image
        with pytest.raises(NotFoundError):
            await client.model("sam9")
    with SegmentationClient(server.target) as blocking:
        for x, result in zip((10, 20), results, strict=True):
            expected = blocking.segment(noise, points=[(x, 10)])
            np.testing.assert_array_equal(result.predictions[0].best.array, expected.predictions[0].best.array)


def test_a_session_keeps_its_image(client: SegmentationClient) -> None:
    first = client.segment(photo_path("coffee"), points=[(300, 200)], session_id="mine")
    kept = client.segment(None, points=[(300, 200)], session_id="mine", reset_predictor=False)
    assert kept.image == first.image
