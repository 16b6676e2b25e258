"""Serialising messages whose tensors are large, without holding up the other threads.

Putting an embedding into a message and serialising that copies it several times, and Python's global lock is held all
the while: no other call proceeds (docs/adr/0011-inline-embeddings.md). But serialised messages may be put one after the
other: whoever parses them sees their fields merged. So the message is serialised without its tensors, which are
joined to it as they are, and for large ones `bytes.join` does not hold the lock.
"""

from collections.abc import Mapping, Sequence

from google.protobuf.message import Message

from segrpc.service.schemas import FloatType, NDArrayFloat
from segrpc.v1 import types_pb2

DATA_TYPES: dict[FloatType, types_pb2.DataType.ValueType] = {
    "float32": types_pb2.DATA_TYPE_FLOAT32,
    "float16": types_pb2.DATA_TYPE_FLOAT16,
    "bfloat16": types_pb2.DATA_TYPE_BFLOAT16,
}

_LENGTH_DELIMITED = 2  # the wire type of messages and bytes


def serialise(message: Message, tensors: Mapping[str, Sequence[NDArrayFloat | None]]) -> bytes:
    """Serialise a message as if it held tensors.

    Args:
        message: The message, without the tensors.
        tensors: The values of its fields of type Tensor, by name: at most one for a singular field; None is left out.

    Returns:
        Bytes that are parsed as the message with the tensors.
    """
    parts = [message.SerializeToString()]
    for name, arrays in tensors.items():
        number = message.DESCRIPTOR.fields_by_name[name].number
        for array in arrays:
            if array is not None:
                parts += _field(number, _tensor(array))
    return b"".join(parts)


def _tensor(array: NDArrayFloat) -> list[bytes]:
    head = types_pb2.Tensor(dtype=DATA_TYPES[array.dtype], shape=array.shape)
    return [head.SerializeToString(), *_field(types_pb2.Tensor.DATA_FIELD_NUMBER, [array.data])]


def _field(number: int, content: Sequence[bytes]) -> list[bytes]:
    return [_varint(number << 3 | _LENGTH_DELIMITED), _varint(sum(map(len, content))), *content]


def _varint(value: int) -> bytes:
    """Encode a number as protobuf does: 7 bits a byte, the lowest first, the top bit set on all but the last."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
