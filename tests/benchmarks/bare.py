"""The floor of what a click can add: the same way through the same processes, with nothing done on it.

    python -m tests.benchmarks.bare SECONDS

serves a stream of gRPC as the service does: each message goes to a child process over a socket pair, with as many bytes
as a click's logits have, the child computes for so many seconds on as many threads as the worker, and as many bytes
come back. What is beside the computing then is threads and processes that wake each other up.
"""

import asyncio
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from queue import SimpleQueue
from typing import Any

import grpc
import torch

from tests.parity.reference import THREADS

_MODULE = "tests.benchmarks.bare"
_METHOD = "Bare", "Click"
_LOGITS_BYTES = 4 * 256 * 256
_ANSWER_BYTES = 6000  # as a refinement's mask has
_SECONDS = struct.Struct("d")


def added(computing: float, rounds: int) -> list[float]:
    """Measure the seconds that a click takes beside computing for ``computing`` seconds."""
    command = [sys.executable, "-m", _MODULE, str(computing)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            clicks: SimpleQueue[bytes | None] = SimpleQueue()
            open_stream: Any = channel.stream_stream("/" + "/".join(_METHOD))
            answers = open_stream(iter(clicks.get, None))
            found = []
            for _ in range(rounds + 5):
                start = time.perf_counter()
                clicks.put(b"click")
                (computed,) = _SECONDS.unpack_from(next(answers))
                found.append(time.perf_counter() - start - computed)
            clicks.put(None)
            answers.cancel()
        server.terminate()
    return found[5:]


def _start_child(computing: float) -> socket.socket:
    """Start a process that ends when this one does; return the way to it."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", _MODULE, str(computing), str(theirs.fileno())]
    subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    return ours


async def _serve(child: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=child, limit=2 * _LOGITS_BYTES)

    async def click(messages: AsyncIterator[bytes], context: Any) -> None:
        async for _ in messages:
            writer.write(bytes(_LOGITS_BYTES))
            answer = await reader.readexactly(_LOGITS_BYTES)
            await context.write(answer[:_ANSWER_BYTES])

    service, method = _METHOD
    handlers: dict[str, Any] = {method: grpc.stream_stream_rpc_method_handler(click)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def _compute(seconds: float, connection: socket.socket) -> None:
    torch.set_num_threads(THREADS)
    rows = torch.ones(4096, 256)  # the size of an image's embedding
    weights = torch.ones(256, 256)
    while connection.recv(_LOGITS_BYTES, socket.MSG_WAITALL):
        start = time.perf_counter()
        while (computed := time.perf_counter() - start) < seconds:
            torch.mm(rows, weights)
        connection.sendall(_SECONDS.pack(computed).ljust(_LOGITS_BYTES, b"\0"))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        _compute(float(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])))
    else:
        asyncio.run(_serve(_start_child(float(sys.argv[1]))))
