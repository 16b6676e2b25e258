"""Messages between the front and a worker process, over a Unix socket.

A message is a pickle (protocol 5) and its buffers: large ``bytes`` (image files, tensors) travel beside the pickle.
They are written from where they lie (scatter-gather) and read into the object that the receiver keeps, so that no
process copies them. On the wire: the number of buffers, the size of the pickle and of each buffer (64 bits each, of the
host's byte order), then the pickle, then the buffers.

Both ends are the same program on the same machine, joined by a socket pair that no other process has: pickle is safe.
"""

import copyreg
import io
import pickle
import socket
import struct
import threading
from typing import Any

from segrpc.service.schemas import FloatType, NDArrayFloat

_HEAD = struct.Struct("=QQ")
_BESIDE_BYTES = 4096  # smaller buffers are copied into the pickle: that costs less than a system call's entry for each
_SEND_BUFFER = 2**22  # bytes that are asked for; Linux gives twice `net.core.wmem_max` at most, by default 425,984
_MOST_PIECES = 512  # of one system call; Linux allows 1024


class Connection:
    """One end of a socket pair. One thread receives; any thread sends.

    Args:
        end: The socket, blocking; closed by `close`.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        # Room for a click's logits (262 kB), or the sender would have to wait until the receiver has woken up.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        """Send a message; blocks until the other end's buffer has taken it.

        Raises:
            OSError: If the other end is closed.
        """
        with self._sending:
            pieces = [memoryview(piece) for piece in pack(message)]
            while pieces:
                sent = self._socket.sendmsg(pieces[:_MOST_PIECES])
                while pieces and sent >= len(pieces[0]):
                    sent -= len(pieces.pop(0))
                if sent:
                    pieces[0] = pieces[0][sent:]

    def receive(self) -> Any:
        """Wait for a message.

        Raises:
            EOFError: If the other end is closed, as it is when its process has ended.
        """
        count, size = _HEAD.unpack(self._exactly(_HEAD.size))
        sizes = struct.unpack(f"={count}Q", self._exactly(8 * count))
        pickled = self._exactly(size)
        return pickle.loads(pickled, buffers=[self._exactly(length) for length in sizes])

    def shut(self) -> None:
        """End both directions: whoever waits in `receive`, on either end, gets EOFError."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other end was first

    def close(self) -> None:
        """Free the socket; nobody uses it any more."""
        self._socket.close()

    def _exactly(self, size: int) -> bytes:
        """Receive so many bytes, straight into the object that is returned."""
        if size == 0:
            return b""
        try:
            data = self._socket.recv(size, socket.MSG_WAITALL)
            while data and len(data) < size:  # a signal came in between
                more = self._socket.recv(size - len(data), socket.MSG_WAITALL)
                if not more:
                    raise EOFError
                data += more
        except ConnectionError:
            raise EOFError from None
        if not data:
            raise EOFError
        return data


def pack(message: Any) -> list[bytes | memoryview]:
    """Turn a message into the pieces that `Connection` writes one after the other."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=5, buffer_callback=buffers.append).dump(message)
    beside = [buffer.raw() for buffer in buffers]
    head = _HEAD.pack(len(beside), pickled.tell()) + struct.pack(f"={len(beside)}Q", *(len(one) for one in beside))
    return [head, pickled.getbuffer(), *(one for one in beside if len(one))]


def _reduce_tensor(tensor: NDArrayFloat) -> tuple[Any, ...]:
    data = tensor.data if len(tensor.data) < _BESIDE_BYTES else pickle.PickleBuffer(tensor.data)
    return _tensor, (data, tensor.shape, tensor.dtype)


def _tensor(data: bytes, shape: tuple[int, ...], dtype: FloatType) -> NDArrayFloat:
    return NDArrayFloat.model_construct(data=data, shape=shape, dtype=dtype)  # it was checked when it was made


class _Pickler(pickle.Pickler):
    dispatch_table = copyreg.dispatch_table | {NDArrayFloat: _reduce_tensor}
