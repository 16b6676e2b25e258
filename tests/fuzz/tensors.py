"""Tensors whose type, shape and data need not fit: they are refused, or come back bit for bit.

A byte for the type, one for the number of axes, 8 for each axis, the rest is the data.
"""

import numpy as np

from segrpc.service.rpc import convert
from segrpc.service.rpc.serialise import serialise
from segrpc.service.schemas import MAX_DIMENSIONS, NDArrayFloat
from segrpc.v1.segmentation_service_pb2 import EncodeImageResponse
from segrpc.v1.types_pb2 import Tensor
from tests.fuzz.refusals import refusals


def run(data: bytes) -> None:
    """Take one tensor."""
    if len(data) < 2:
        return
    axes = data[1] % (MAX_DIMENSIONS + 2)
    ends = range(2, 2 + 8 * axes, 8)
    shape = [int.from_bytes(data[at : at + 8], "little", signed=True) for at in ends]
    message = Tensor(dtype=data[0] % 6, shape=shape, data=data[2 + 8 * axes :])  # type: ignore[arg-type]
    with refusals(EncodeImageResponse(image_embedding=message)):
        _check_accepted(convert.float_array(message, "image_embedding"), message)


def _check_accepted(array: NDArrayFloat, message: Tensor) -> None:
    values = array.to_numpy()
    assert values.dtype == np.float32
    assert list(values.shape) == list(message.shape)
    assert np.isfinite(values).all()
    assert convert.tensor(array) == message
    assert NDArrayFloat.from_numpy(values, array.dtype) == array
    assert NDArrayFloat.model_validate_json(array.model_dump_json()) == array
    joined = EncodeImageResponse.FromString(serialise(EncodeImageResponse(), {"image_embedding": [array]}))
    assert joined == EncodeImageResponse(image_embedding=message)
