"""Messages over a socket pair."""

import copy
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from segrpc.service import errors
from segrpc.service.engine.messages import portable
from segrpc.service.engine.wire import Connection, pack
from segrpc.service.engine.work import EmbeddingMissing, EncodeWork, PredictWork, WorkerBug
from segrpc.service.images.decode import ImageHeader
from segrpc.service.schemas import NDArrayFloat, SegmentationInput

TENSOR = NDArrayFloat.from_numpy(np.arange(65536, dtype=np.float32).reshape(1, 1, 256, 256))


@pytest.fixture
def ends() -> Iterator[tuple[Connection, Connection]]:
    one, other = (Connection(end) for end in socket.socketpair())
    yield one, other
    one.close()
    other.close()


def through(ends: tuple[Connection, Connection], message: Any) -> Any:
    sender = threading.Thread(target=ends[0].send, args=(message,))
    sender.start()
    received = ends[1].receive()
    sender.join()
    return received


@pytest.mark.parametrize(
    "message",
    [
        None,
        EncodeWork("model", "digest", b"", "key:alice"),
        EncodeWork("model", "digest", bytes(range(256)) * 2**18),  # 64 MiB
        PredictWork(
            "model", SegmentationInput(image=b"", mask_input=TENSOR), b"image", ImageHeader(1, 2, 3), "key:alice"
        ),
        [NDArrayFloat.from_numpy(np.ones(5000)) for _ in range(1500)],  # more buffers than one system call takes
        TENSOR,
        NDArrayFloat.from_numpy(np.ones(3), "bfloat16"),
    ],
    ids=["nothing", "empty", "64 MiB", "tensors", "many buffers", "tensor", "small tensor"],
)
def test_messages_arrive_as_they_were(ends: tuple[Connection, Connection], message: Any) -> None:
    assert through(ends, message) == message


def test_large_bytes_are_not_copied_into_the_pickle() -> None:
    image = bytes(2**20)
    head, pickled, beside = pack(EncodeWork("model", "digest", image))
    assert len(head) + len(pickled) < 500
    assert isinstance(beside, memoryview)
    assert beside.obj is image


def test_bytes_stay_bytes(ends: tuple[Connection, Connection]) -> None:
    assert type(through(ends, EncodeWork("model", "digest", bytes(2**20))).image) is bytes
    assert type(through(ends, TENSOR).data) is bytes


def test_the_end_is_told(ends: tuple[Connection, Connection]) -> None:
    ends[0].shut()
    ends[0].shut()
    with pytest.raises(EOFError):
        ends[1].receive()


def test_an_end_in_the_middle_of_a_message_is_told() -> None:
    raw, end = socket.socketpair()
    with raw:
        raw.sendall(b"".join(pack(EncodeWork("model", "digest", bytes(10_000))))[:5_000])
    receiver = Connection(end)
    with pytest.raises(EOFError):
        receiver.receive()
    receiver.close()


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidFieldError.of_all([errors.Violation("points[0]", "is wrong"), errors.Violation("boxes", "too")]),
        errors.EmbeddingMismatchError("does not fit", [errors.Violation("image_embedding", "has shape [1]")]),
        errors.OverloadedError("later", 2.5),
        errors.OutOfMemoryError("no memory"),
        errors.ModelLoadError("no such file"),
        errors.DeadlineError("left"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel_with_all_they_say(ends: tuple[Connection, Connection], error: errors.SegrpcError) -> None:
    arrived = through(ends, portable(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)
    assert vars(copy.copy(error)) == vars(error)


def test_other_exceptions_travel_as_their_traceback() -> None:
    try:
        raise KeyError("words")
    except KeyError as error:
        bug = portable(error)
    assert isinstance(bug, WorkerBug)
    assert "test_wire.py" in str(bug)
    assert "KeyError: 'words'" in str(bug)
    assert isinstance(portable(EmbeddingMissing()), EmbeddingMissing)
