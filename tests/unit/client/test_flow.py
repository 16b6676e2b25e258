"""The sequences of calls, without a network: what is sent when."""

import uuid
from collections.abc import Generator
from typing import Any

import grpc
import pytest

from segrpc.client import flow
from segrpc.client.errors import NotFoundError, _Details
from segrpc.client.flow import Call, SentImages
from segrpc.v1.segmentation_service_pb2 import SegmentResponse, UploadImageResponse

SMALL = b"small image"
LARGE = bytes(flow.INLINE_BYTES + 1)


def not_found(reason: str) -> NotFoundError:
    return NotFoundError("gone", grpc.StatusCode.NOT_FOUND, _Details(reason=reason))


def run(steps: Generator[Call, Any, Any], *replies: Any) -> list[str]:
    """Drive a flow with replies; return how each call named the image."""
    calls: list[str] = []
    try:
        call = next(steps)
        for reply in replies:
            if call.method == "UploadImage":
                calls.append("upload " + "+".join(str(len(m.chunk.data)) for m in call.request if m.HasField("chunk")))
            else:
                calls.append(f"{call.method} {call.request.image.WhichOneof('source')}")
            call = steps.throw(reply) if isinstance(reply, Exception) else steps.send(reply)
    except StopIteration:
        return calls
    raise AssertionError(f"a further call: {call}")


@pytest.fixture
def sent() -> SentImages:
    return SentImages()


def test_a_small_image_is_sent_once(sent: SentImages) -> None:
    assert run(flow.segment(SMALL, sent, {}), SegmentResponse()) == ["Segment data"]
    assert run(flow.segment(SMALL, sent, {}), SegmentResponse()) == ["Segment digest"]


def test_a_large_image_is_uploaded_in_chunks_once(sent: SentImages) -> None:
    uploaded = run(flow.segment(LARGE, sent, {}), UploadImageResponse(), SegmentResponse())
    assert uploaded == [f"upload {flow.CHUNK_BYTES}+1", "Segment digest"]
    assert run(flow.segment(LARGE, sent, {}), SegmentResponse()) == ["Segment digest"]


@pytest.mark.parametrize(("image", "again"), [(SMALL, ["Segment data"]), (LARGE, [None, "Segment digest"])])
def test_an_image_that_the_server_forgot_is_sent_again(sent: SentImages, image: bytes, again: list[str | None]) -> None:
    run(flow.upload(image, sent), UploadImageResponse())
    replies = [UploadImageResponse()] * (len(again) - 1)
    calls = run(flow.segment(image, sent, {}), not_found("IMAGE_NOT_FOUND"), *replies, SegmentResponse())
    assert calls[0] == "Segment digest"
    assert calls[-1] == again[-1]
    assert len(calls) == 1 + len(again)


def test_another_missing_thing_is_an_error(sent: SentImages) -> None:
    run(flow.upload(SMALL, sent), UploadImageResponse())
    with pytest.raises(NotFoundError):
        run(flow.segment(SMALL, sent, {}), not_found("MODEL_NOT_FOUND"))


def test_a_failed_call_does_not_count_as_sent(sent: SentImages) -> None:
    with pytest.raises(NotFoundError):
        run(flow.segment(SMALL, sent, {}), not_found("MODEL_NOT_FOUND"))
    assert run(flow.segment(SMALL, sent, {}), SegmentResponse()) == ["Segment data"]


def test_names_are_never_uploaded(sent: SentImages) -> None:
    assert run(flow.segment("file:///a.png", sent, {}), SegmentResponse()) == ["Segment uri"]
    with pytest.raises(ValueError, match="can be uploaded"):
        next(flow.upload("file:///a.png", sent))


def test_each_request_has_an_id_of_its_own_unless_told(sent: SentImages) -> None:
    ids = [next(flow.segment(SMALL, sent, {})).request.request_id for _ in range(2)]
    assert ids[0] != ids[1]
    assert all(uuid.UUID(hex=one) for one in ids)
    assert next(flow.segment(SMALL, sent, {"request_id": "mine"})).request.request_id == "mine"


def test_no_image_needs_a_session(sent: SentImages) -> None:
    with pytest.raises(ValueError, match="image is None"):
        next(flow.segment(None, sent, {}))
    kept = next(flow.segment(None, sent, {"session_id": "s", "reset_predictor": False})).request
    assert not kept.HasField("image")
    assert kept.HasField("reset_predictor")
    assert not kept.reset_predictor


def test_unset_options_stay_unset(sent: SentImages) -> None:
    output = next(flow.segment(SMALL, sent, {})).request.output
    assert not output.HasField("multimask_output")
    assert not output.HasField("num_multimask_outputs")


def test_a_misspelt_option_is_refused(sent: SentImages) -> None:
    with pytest.raises(TypeError, match="point"):
        next(flow.segment(SMALL, sent, {"point": [(1, 2)]}))  # type: ignore[typeddict-unknown-key]


def test_the_memory_of_sent_images_is_bounded() -> None:
    sent = SentImages()
    for i in range(flow.REMEMBERED_IMAGES + 1):
        sent.add(str(i))
    assert "0" not in sent
    assert "1" in sent
