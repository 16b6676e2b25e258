"""Each row of the error table that the unary calls can reach: code, reason and field path.

Those about who calls are in `test_identity`.
"""

import hashlib
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image as PILImage

from segrpc.v1.model_service_pb2 import GetModelRequest
from segrpc.v1.model_service_pb2_grpc import ModelServiceStub
from segrpc.v1.refine_pb2 import ImageChunk, UploadHeader
from segrpc.v1.segmentation_service_pb2 import EncodeImageRequest, SegmentRequest, UploadImageRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import (
    DATA_TYPE_FLOAT32,
    DATA_TYPE_UINT8,
    Box,
    Image,
    OutputOptions,
    Point,
    Prompt,
    Tensor,
)
from tests.blackbox.failure import Failure, failure_of
from tests.server_process import ServerProcess, connect, raw

Code = grpc.StatusCode
NAN = math.nan


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    PILImage.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def tensor(*shape: int, value: float = 0.0) -> Tensor:
    return Tensor(dtype=DATA_TYPE_FLOAT32, shape=shape, data=np.full(shape, value, "<f4").tobytes())


PIXELS = Image(data=png(64, 48))
CLICK = Prompt(points=[Point(x=10, y=10)])


def request(*prompts: Prompt, **fields: Any) -> SegmentRequest:
    return SegmentRequest(**{"image": PIXELS, "prompts": prompts or [CLICK], **fields})


@pytest.fixture
def stub(channel: grpc.Channel) -> SegmentationServiceStub:
    return SegmentationServiceStub(channel)


@pytest.fixture
def sam2_stub(sam2_server: ServerProcess) -> Iterator[SegmentationServiceStub]:
    with connect(sam2_server) as opened:
        yield SegmentationServiceStub(opened)


def assert_failure(failure: Failure, code: Code, reason: str, *fields: str) -> None:
    assert (failure.code, failure.reason, failure.fields) == (code, reason, fields), failure
    assert failure.domain == "segrpc.v1"
    assert failure.message
    assert "Traceback" not in failure.message


@pytest.mark.parametrize(
    "method",
    [
        "SegmentationService/Segment",
        "SegmentationService/EncodeImage",
        "SegmentationService/UploadImage",
        "ModelService/GetModel",
    ],
)
def test_bytes_that_are_no_message(channel: grpc.Channel, method: str) -> None:
    path = f"/segrpc.v1.{method}"
    garbage = b"\xff\xff\xff"
    if method.endswith("UploadImage"):
        failure = failure_of(lambda: raw(channel, path, client_streams=True)(iter([garbage])))
    else:
        failure = failure_of(lambda: raw(channel, path)(garbage))
    assert_failure(failure, Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


def points(*given: tuple[float, float]) -> Prompt:
    return Prompt(points=[Point(x=x, y=y) for x, y in given])


def box(*corners: float) -> Prompt:
    return Prompt(box=Box(x_min=corners[0], y_min=corners[1], x_max=corners[2], y_max=corners[3]))


def with_mask(mask_input: Tensor) -> Prompt:
    return Prompt(points=[Point(x=1, y=1)], mask_input=mask_input)


INVALID_FIELDS: dict[str, tuple[SegmentRequest, str]] = {
    "no image": (SegmentRequest(prompts=[CLICK]), "image"),
    "empty image": (request(image=Image(data=b"")), "image.data"),
    "malformed digest": (request(image=Image(digest="md5:0")), "image.digest"),
    "URI without scheme": (request(image=Image(uri="photo.jpg")), "image.uri"),
    "no prompts": (SegmentRequest(image=PIXELS), "prompts"),
    "empty prompt": (request(CLICK, Prompt()), "prompts[1]"),
    "x is NaN": (request(points((1, 1), (2, 2), (NAN, 3))), "prompts[0].points[2].x"),
    "y is infinite": (request(CLICK, points((1, math.inf))), "prompts[1].points[0].y"),
    "y is negative": (request(points((1, -0.5))), "prompts[0].points[0].y"),
    "x beyond the image": (request(points((64.01, 1))), "prompts[0].points[0].x"),
    "unknown label": (request(Prompt(points=[Point(x=1, y=1, label=9)])), "prompts[0].points[0].label"),  # type: ignore[arg-type]
    "inverted box": (request(box(20, 5, 10, 15)), "prompts[0].box"),
    "empty box": (request(box(5, 5, 5, 15)), "prompts[0].box"),
    "box corner is NaN": (request(box(5, 5, NAN, 15)), "prompts[0].box.x_max"),
    "box beyond the image": (request(CLICK, box(5, 5, 15, 49)), "prompts[1].box.y_max"),
    "mask input of three candidates": (request(with_mask(tensor(3, 256, 256))), "prompts[0].mask_input"),
    "mask input of the wrong size": (request(with_mask(tensor(1, 64, 64))), "prompts[0].mask_input"),
    "mask input with NaN": (request(with_mask(tensor(1, 256, 256, value=NAN))), "prompts[0].mask_input.data"),
    "mask input too short": (
        request(with_mask(Tensor(dtype=DATA_TYPE_FLOAT32, shape=[1, 256, 256], data=b"1234"))),
        "prompts[0].mask_input.data",
    ),
    "mask input with an axis of 0": (
        request(with_mask(Tensor(dtype=DATA_TYPE_FLOAT32, shape=[1, 0, 256]))),
        "prompts[0].mask_input.shape[1]",
    ),
    "mask input of enormous shape": (
        request(with_mask(Tensor(dtype=DATA_TYPE_FLOAT32, shape=[2**62, 2**62, 2**62], data=b"1234"))),
        "prompts[0].mask_input.data",
    ),
    "mask input of bytes": (
        request(with_mask(Tensor(dtype=DATA_TYPE_UINT8, shape=[1, 1, 1], data=b"1"))),
        "prompts[0].mask_input.dtype",
    ),
    "mask input without type": (
        request(with_mask(Tensor(shape=[1, 1, 1], data=b"1234"))),
        "prompts[0].mask_input.dtype",
    ),
    "mask input for some prompts": (request(with_mask(tensor(1, 256, 256)), CLICK), "prompts[1].mask_input"),
    "too many prompts": (request(*[CLICK] * 65), "prompts"),
    "too many points": (request(CLICK, points(*[(1.0, 1.0)] * 1025)), "prompts[1].points"),
    "no masks asked for": (request(output=OutputOptions(num_multimask_outputs=0)), "output.num_multimask_outputs"),
    "tensors of bytes": (request(output=OutputOptions(tensor_dtype=DATA_TYPE_UINT8)), "output.tensor_dtype"),
    "unknown mask encoding": (request(output=OutputOptions(mask_encoding=77)), "output.mask_encoding"),  # type: ignore[arg-type]
    "embedding without its finer levels": (request(image_embedding=tensor(1, 2)), "high_resolution_features"),
    "finer levels without the embedding": (request(high_resolution_features=[tensor(1, 2)]), "image_embedding"),
    "NaN in the finer levels": (
        request(image_embedding=tensor(1, 2), high_resolution_features=[tensor(1), tensor(1, value=NAN)]),
        "high_resolution_features[1].data",
    ),
    "image although it is to be kept": (request(session_id="s", reset_predictor=False), "image"),
    "long request id": (request(request_id="x" * 129), "request_id"),
    "long session id": (request(session_id="x" * 129), "session_id"),
    "long model name": (request(model="x" * 129), "model"),
}


@pytest.mark.parametrize("case", INVALID_FIELDS)
def test_a_field_that_is_wrong(stub: SegmentationServiceStub, case: str) -> None:
    wrong, field = INVALID_FIELDS[case]
    assert_failure(failure_of(lambda: stub.Segment(wrong)), Code.INVALID_ARGUMENT, "INVALID_FIELD", field)


def test_several_wrong_fields_are_named_together(stub: SegmentationServiceStub) -> None:
    wrong = request(points((NAN, 1), (1, NAN)), box(5, 5, 1, 15))
    failure = failure_of(lambda: stub.Segment(wrong))
    fields = ("prompts[0].points[0].x", "prompts[0].points[1].y", "prompts[1].box")
    assert_failure(failure, Code.INVALID_ARGUMENT, "INVALID_FIELD", *fields)


def test_what_is_no_image(stub: SegmentationServiceStub, photo: bytes) -> None:
    for data in (b"not an image", photo[:40], b"\x89PNG\r\n\x1a\n"):
        failure = failure_of(lambda data=data: stub.Segment(request(image=Image(data=data))))  # type: ignore[misc]
        assert_failure(failure, Code.INVALID_ARGUMENT, "IMAGE_UNDECODABLE", "image.data")


def test_a_truncated_image(stub: SegmentationServiceStub, photo: bytes) -> None:
    failure = failure_of(lambda: stub.Segment(request(image=Image(data=photo[: len(photo) // 2]))))
    assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "IMAGE_UNDECODABLE")


def test_too_many_pixels(stub: SegmentationServiceStub) -> None:
    failure = failure_of(lambda: stub.Segment(request(image=Image(data=png(10_000, 6_401)))))
    assert_failure(failure, Code.INVALID_ARGUMENT, "IMAGE_TOO_LARGE", "image.data")


def upload(*messages: UploadHeader | ImageChunk) -> Iterator[UploadImageRequest]:
    for message in messages:
        if isinstance(message, UploadHeader):
            yield UploadImageRequest(header=message)
        else:
            yield UploadImageRequest(chunk=message)


GOOD = PIXELS.data
HEADER = UploadHeader(size=len(GOOD))
UPLOADS: dict[str, tuple[list[UploadHeader | ImageChunk], str, tuple[str, ...]]] = {
    "nothing": ([], "CONFIG_NOT_FIRST", ()),
    "a chunk first": ([ImageChunk(data=GOOD)], "CONFIG_NOT_FIRST", ()),
    "the header twice": ([HEADER, HEADER], "CONFIG_NOT_FIRST", ()),
    "a gap": ([HEADER, ImageChunk(data=GOOD[:9]), ImageChunk(offset=10, data=GOOD[10:])], "CHUNK_OFFSET", ()),
    "a chunk twice": ([HEADER, ImageChunk(data=GOOD[:9]), ImageChunk(data=GOOD[:9])], "CHUNK_OFFSET", ()),
    "more than announced": ([HEADER, ImageChunk(data=GOOD + b"x")], "CHUNK_OFFSET", ()),
    "less than announced": ([HEADER, ImageChunk(data=GOOD[:9])], "CHUNK_OFFSET", ()),
    "an empty chunk": ([HEADER, ImageChunk()], "INVALID_FIELD", ("chunk.data",)),
    "a large chunk": ([UploadHeader(size=2**21), ImageChunk(data=bytes(2**20 + 1))], "INVALID_FIELD", ("chunk.data",)),
    "no size": ([UploadHeader()], "INVALID_FIELD", ("header.size",)),
    "a malformed digest": ([UploadHeader(size=1, digest="sha256:0")], "INVALID_FIELD", ("header.digest",)),
    "too large": ([UploadHeader(size=2**26 + 1)], "IMAGE_TOO_LARGE", ()),
    "another digest": (
        [UploadHeader(size=len(GOOD), digest=f"sha256:{hashlib.sha256(b'x').hexdigest()}"), ImageChunk(data=GOOD)],
        "DIGEST_MISMATCH",
        (),
    ),
    "no image": ([UploadHeader(size=3), ImageChunk(data=b"abc")], "IMAGE_UNDECODABLE", ()),
}


@pytest.mark.parametrize("case", UPLOADS)
def test_a_broken_upload(stub: SegmentationServiceStub, case: str) -> None:
    messages, reason, fields = UPLOADS[case]
    assert_failure(failure_of(lambda: stub.UploadImage(upload(*messages))), Code.INVALID_ARGUMENT, reason, *fields)


@pytest.mark.parametrize("uri", ["file:///etc/passwd", "http://example.org/a.png", "https://127.0.0.1/a.png"])
def test_uris_are_off_by_default(stub: SegmentationServiceStub, uri: str) -> None:
    failure = failure_of(lambda: stub.Segment(request(image=Image(uri=uri))))
    assert (failure.code, failure.reason) == (Code.PERMISSION_DENIED, "URI_NOT_ALLOWED")


def test_unknown_names(stub: SegmentationServiceStub, channel: grpc.Channel) -> None:
    unseen = f"sha256:{hashlib.sha256(b'unseen').hexdigest()}"
    models = ModelServiceStub(channel)
    calls: dict[Callable[[], Any], str] = {
        lambda: stub.Segment(request(image=Image(digest=unseen))): "IMAGE_NOT_FOUND",
        lambda: stub.EncodeImage(EncodeImageRequest(image=Image(digest=unseen))): "IMAGE_NOT_FOUND",
        lambda: stub.Segment(request(model="sam9")): "MODEL_NOT_FOUND",
        lambda: stub.EncodeImage(EncodeImageRequest(image=PIXELS, model="sam9")): "MODEL_NOT_FOUND",
        lambda: models.GetModel(GetModelRequest(name="sam9")): "MODEL_NOT_FOUND",
    }
    for call, reason in calls.items():
        failure = failure_of(call)
        assert (failure.code, failure.reason) == (Code.NOT_FOUND, reason)


def test_abilities_that_the_model_lacks(stub: SegmentationServiceStub) -> None:
    features = {"image_embedding": tensor(1, 2), "high_resolution_features": [tensor(1)]}
    for call in (
        lambda: stub.Segment(request(output=OutputOptions(return_image_embedding=True))),
        lambda: stub.Segment(request(output=OutputOptions(num_multimask_outputs=2))),
        lambda: stub.Segment(request(**features)),
        lambda: stub.EncodeImage(EncodeImageRequest(image=PIXELS)),
    ):
        failure = failure_of(call)
        assert (failure.code, failure.reason) == (Code.FAILED_PRECONDITION, "CAPABILITY_MISSING")


def test_nothing_to_keep(stub: SegmentationServiceStub) -> None:
    for session_id in ("", "never-used"):
        kept = SegmentRequest(prompts=[CLICK], session_id=session_id, reset_predictor=False)
        failure = failure_of(lambda kept=kept: stub.Segment(kept))  # type: ignore[misc]
        assert (failure.code, failure.reason) == (Code.FAILED_PRECONDITION, "NO_PREDICTOR_STATE")


def test_an_embedding_of_another_model(sam2_stub: SegmentationServiceStub) -> None:
    right = {"image_embedding": tensor(1, 256, 64, 64)}
    fine, medium = tensor(1, 32, 256, 256), tensor(1, 64, 128, 128)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image_embedding": tensor(1, 2), "high_resolution_features": [fine, medium]}, "image_embedding"),
        ({**right, "high_resolution_features": [medium, fine]}, "high_resolution_features[0]"),
        ({**right, "high_resolution_features": [fine]}, "high_resolution_features"),
    ]
    for fields, first in cases:
        failure = failure_of(lambda fields=fields: sam2_stub.Segment(request(**fields)))  # type: ignore[misc]
        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "EMBEDDING_MISMATCH")
        assert failure.fields[0] == first


def test_an_error_names_the_request(stub: SegmentationServiceStub) -> None:
    assert failure_of(lambda: stub.Segment(request(request_id="mine", model="sam9"))).request_id == "mine"
