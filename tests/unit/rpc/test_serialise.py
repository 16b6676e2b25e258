"""Messages that are serialised with their tensors beside them are what protobuf would have made of both."""

import numpy as np
import pytest

from segrpc.service.rpc.serialise import DATA_TYPES, serialise
from segrpc.service.schemas import FloatType, NDArrayFloat
from segrpc.v1.segmentation_service_pb2 import SegmentResponse
from segrpc.v1.types_pb2 import ImageInfo, Mask, Prediction, Tensor


def array(*shape: int, dtype: FloatType = "float32") -> NDArrayFloat:
    return NDArrayFloat.from_numpy(np.random.default_rng(0).normal(size=shape), dtype)


def tensor(value: NDArrayFloat) -> Tensor:
    return Tensor(dtype=DATA_TYPES[value.dtype], shape=value.shape, data=value.data)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [(1,), (31,), (32,), (4095,), (4096,), (1, 256, 64, 64), (1, 1, 1, 1, 1, 1, 1, 300)],
    ids=str,
)
def test_the_same_message(dtype: FloatType, shape: tuple[int, ...]) -> None:
    embedding, fine, coarse = array(*shape, dtype=dtype), array(1, 3, 8), array(2, 2, dtype=dtype)
    message = SegmentResponse(
        request_id="one", image=ImageInfo(width=3), predictions=[Prediction(masks=[Mask(coco_rle=b"abc")])]
    )
    whole = SegmentResponse()
    whole.CopyFrom(message)
    whole.image_embedding.CopyFrom(tensor(embedding))
    whole.high_resolution_features.extend([tensor(fine), tensor(coarse)])
    raw = serialise(
        message,
        {"mask_logits": [None], "image_embedding": [embedding], "high_resolution_features": [fine, coarse]},
    )
    parsed = SegmentResponse.FromString(raw)
    assert parsed == whole
    assert not parsed.HasField("mask_logits")
    assert len(raw) == whole.ByteSize()


def test_without_tensors_it_is_the_message() -> None:
    message = SegmentResponse(request_id="one", model="two")
    assert serialise(message, {"image_embedding": [None], "high_resolution_features": ()}) == (
        message.SerializeToString()
    )


def test_a_name_that_is_no_field() -> None:
    with pytest.raises(KeyError):
        serialise(SegmentResponse(), {"embedding": [array(1)]})
