"""Segment, EncodeImage and UploadImage as a client sees them: what is kept, what is private, what is returned."""

import hashlib
import io
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from PIL import Image as PILImage
from pycocotools import mask as coco

from segrpc.v1.refine_pb2 import ImageChunk, UploadHeader
from segrpc.v1.segmentation_service_pb2 import (
    EncodeImageRequest,
    SegmentRequest,
    SegmentResponse,
    UploadImageRequest,
)
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import (
    DATA_TYPE_BFLOAT16,
    DATA_TYPE_FLOAT16,
    MASK_ENCODING_COCO_RLE,
    MASK_ENCODING_PNG,
    MASK_ENCODING_RUN_LENGTHS,
    Image,
    OutputOptions,
    Point,
    Prompt,
)
from tests.blackbox.failure import chunks, failure_of
from tests.server_process import ServerProcess, connect

CLICK = [Prompt(points=[Point(x=30, y=20)])]


@pytest.fixture
def stub(channel: grpc.Channel) -> SegmentationServiceStub:
    return SegmentationServiceStub(channel)


@pytest.fixture
def sam2_stub(sam2_server: ServerProcess) -> Iterator[SegmentationServiceStub]:
    with connect(sam2_server) as opened:
        yield SegmentationServiceStub(opened)


def picture(seed: int, width: int = 64, height: int = 48) -> bytes:
    """A picture that no other test has used."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    PILImage.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def mask_arrays(response: SegmentResponse) -> list[np.ndarray]:
    found = []
    for mask in response.predictions[0].masks:
        size = (mask.height, mask.width)
        kind = mask.WhichOneof("encoding")
        if kind == "coco_rle":
            found.append(coco.decode({"size": list(size), "counts": mask.coco_rle}).astype(bool))
        elif kind == "run_lengths":
            values = np.arange(len(mask.run_lengths.lengths)) % 2 == 1
            found.append(np.repeat(values, mask.run_lengths.lengths).reshape(size, order="F"))
        else:
            found.append(np.asarray(PILImage.open(io.BytesIO(mask.png))))
    return found


def test_the_three_encodings_hold_the_same_mask(stub: SegmentationServiceStub, photo: bytes) -> None:
    answers = {}
    for encoding in (MASK_ENCODING_COCO_RLE, MASK_ENCODING_RUN_LENGTHS, MASK_ENCODING_PNG):
        output = OutputOptions(mask_encoding=encoding)
        answers[encoding] = stub.Segment(SegmentRequest(image=Image(data=photo), prompts=CLICK, output=output))
    expected = mask_arrays(answers[MASK_ENCODING_COCO_RLE])
    for answer in answers.values():
        for mask, array, right in zip(answer.predictions[0].masks, mask_arrays(answer), expected, strict=True):
            np.testing.assert_array_equal(array, right)
            assert mask.area == right.sum()
            rows, columns = np.flatnonzero(right.any(axis=1)), np.flatnonzero(right.any(axis=0))
            box = mask.bounding_box
            assert (box.x_min, box.y_min) == (columns[0], rows[0])
            assert (box.x_max, box.y_max) == (columns[-1] + 1, rows[-1] + 1)
            assert 0 <= mask.score <= 1


def test_defaults_are_those_of_the_contract(stub: SegmentationServiceStub, photo: bytes) -> None:
    answer = stub.Segment(SegmentRequest(image=Image(data=photo), prompts=CLICK))
    assert len(answer.predictions[0].masks) == 3
    assert answer.predictions[0].masks[0].WhichOneof("encoding") == "coco_rle"
    assert not answer.HasField("mask_logits")
    assert answer.request_id
    assert answer.model == "grabcut"
    assert answer.image.digest == f"sha256:{hashlib.sha256(photo).hexdigest()}"


def test_an_image_is_known_by_its_digest_afterwards(stub: SegmentationServiceStub) -> None:
    data = picture(1)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    by_digest = SegmentRequest(image=Image(digest=digest), prompts=CLICK)
    assert failure_of(lambda: stub.Segment(by_digest)).reason == "IMAGE_NOT_FOUND"
    by_data = stub.Segment(SegmentRequest(image=Image(data=data), prompts=CLICK))
    assert stub.Segment(by_digest).predictions == by_data.predictions


def test_an_uploaded_image_is_known_by_its_digest(stub: SegmentationServiceStub) -> None:
    data = picture(2, 700, 600)  # more than one chunk
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"

    def messages() -> Iterator[UploadImageRequest]:
        yield UploadImageRequest(header=UploadHeader(size=len(data), digest=digest))
        for offset, piece in chunks(data, 2**20):
            yield UploadImageRequest(chunk=ImageChunk(offset=offset, data=piece))

    answer = stub.UploadImage(messages())
    assert (answer.image.digest, answer.image.width, answer.image.height) == (digest, 700, 600)
    assert stub.Segment(SegmentRequest(image=Image(digest=digest), prompts=CLICK)).image == answer.image


def test_the_orientation_is_applied_and_told(stub: SegmentationServiceStub) -> None:
    upright = PILImage.open(io.BytesIO(picture(3)))
    exif = PILImage.Exif()
    exif[0x0112] = 6  # stored lying on its side
    file = io.BytesIO()
    upright.transpose(PILImage.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    turned = stub.Segment(SegmentRequest(image=Image(data=file.getvalue()), prompts=CLICK))
    plain = stub.Segment(SegmentRequest(image=Image(data=picture(3)), prompts=CLICK))
    assert (turned.image.width, turned.image.height, turned.image.exif_orientation) == (64, 48, 6)
    assert plain.image.exif_orientation == 1
    assert turned.predictions == plain.predictions


def test_a_session_keeps_its_image(stub: SegmentationServiceStub) -> None:
    first = stub.Segment(SegmentRequest(image=Image(data=picture(4)), prompts=CLICK, session_id="a"))
    other = stub.Segment(SegmentRequest(image=Image(data=picture(5)), prompts=CLICK, session_id="b"))
    for session_id, expected in (("a", first), ("b", other)):
        kept = SegmentRequest(prompts=CLICK, session_id=session_id, reset_predictor=False)
        answer = stub.Segment(kept)
        assert (answer.image, list(answer.predictions)) == (expected.image, list(expected.predictions))


def test_a_session_is_not_seen_by_another_caller(server: ServerProcess) -> None:
    with connect(server) as mine, connect(server) as theirs:
        request = SegmentRequest(image=Image(data=picture(6)), prompts=CLICK, session_id="same name")
        SegmentationServiceStub(mine).Segment(request)
        kept = SegmentRequest(prompts=CLICK, session_id="same name", reset_predictor=False)
        SegmentationServiceStub(mine).Segment(kept)
        assert failure_of(lambda: SegmentationServiceStub(theirs).Segment(kept)).reason == "NO_PREDICTOR_STATE"


def test_logits_come_in_the_type_that_was_asked_for(stub: SegmentationServiceStub, photo: bytes) -> None:
    for dtype, size in ((DATA_TYPE_FLOAT16, 2), (DATA_TYPE_BFLOAT16, 2)):
        output = OutputOptions(return_logits=True, tensor_dtype=dtype)
        answer = stub.Segment(SegmentRequest(image=Image(data=photo), prompts=CLICK * 2, output=output))
        assert list(answer.mask_logits.shape) == [2, 3, 256, 256]
        assert (answer.mask_logits.dtype, len(answer.mask_logits.data)) == (dtype, 2 * 3 * 256 * 256 * size)


def test_encoding_ahead_warms_the_cache(sam2_stub: SegmentationServiceStub) -> None:
    image = Image(data=picture(7))
    first = sam2_stub.EncodeImage(EncodeImageRequest(image=image))
    assert not first.timing.embedding_cached
    assert first.timing.encode_image.ToTimedelta()
    assert not first.HasField("image_embedding")
    assert sam2_stub.EncodeImage(EncodeImageRequest(image=image)).timing.embedding_cached
    click = sam2_stub.Segment(SegmentRequest(image=Image(digest=first.image.digest), prompts=CLICK))
    assert click.timing.embedding_cached
    assert not click.timing.encode_image.ToTimedelta()


def test_an_embedding_without_prompts(sam2_stub: SegmentationServiceStub) -> None:
    output = OutputOptions(return_image_embedding=True, tensor_dtype=DATA_TYPE_FLOAT16)
    answer = sam2_stub.Segment(SegmentRequest(image=Image(data=picture(8)), output=output))
    assert not answer.predictions
    assert list(answer.image_embedding.shape) == [1, 256, 64, 64]
    assert [list(t.shape) for t in answer.high_resolution_features] == [[1, 32, 256, 256], [1, 64, 128, 128]]
    assert len(answer.image_embedding.data) == 2 * 256 * 64 * 64


def test_the_object_score_is_told(sam2_stub: SegmentationServiceStub) -> None:
    answer = sam2_stub.Segment(SegmentRequest(image=Image(data=picture(9)), prompts=CLICK))
    assert answer.predictions[0].object_score != 0
