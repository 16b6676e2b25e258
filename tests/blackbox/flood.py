"""Streams that are opened and reset at once, as fast as a process can, until it is ended.

python -m tests.blackbox.flood HOST:PORT       one connection, as long as the server lets it be
python -m tests.blackbox.flood HOST:PORT CA    one after the other, with TLS and without a certificate
"""

import select
import socket
import ssl
import subprocess
import sys
from contextlib import suppress
from types import TracebackType
from typing import Self

from tests.blackbox.frames import ACK, RST_STREAM, SEGMENT, SETTINGS, START, call, frame

METHODS = (SEGMENT, b"/segrpc.v1.SegmentationService/Refine", b"/a/b")
BURST = 100
CANCEL = (8).to_bytes(4, "big")


class Flood:
    """Floods a server from another process, from its first streams on until the ``with`` statement ends.

    Args:
        target: The server, as HOST:PORT.
        *authority: The file of the authority that the server's certificate is of, if it has one.
    """

    def __init__(self, target: str, *authority: str) -> None:
        self._command = [sys.executable, "-m", "tests.blackbox.flood", target, *authority]

    def goes_on(self) -> bool:
        """Whether it does."""
        return self._process.poll() is None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "flooding\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def streams(first: int) -> bytes:
    """Make the frames of a burst of streams.

    Args:
        first: The number of the first stream; the next burst's is larger by twice `BURST`.
    """
    numbers = range(first, first + 2 * BURST, 2)
    return b"".join(
        call(number, METHODS[number // 2 % len(METHODS)]) + frame(RST_STREAM, 0, number, CANCEL) for number in numbers
    )


def flood(connection: socket.socket) -> None:
    """Send streams until the other side ends the connection, and throw away what it says."""
    connection.sendall(START + frame(SETTINGS, ACK, 0))
    for first in range(1, 2**31 - 2 * BURST, 2 * BURST):
        connection.sendall(streams(first))
        if first == 1:
            print("flooding", flush=True)
        while select.select([connection], [], [], 0)[0]:
            if not connection.recv(2**16):
                return


def main(target: str, authority: str = "") -> None:
    """Flood for ever."""
    host, _, port = target.rpartition(":")
    context = ssl.create_default_context(cafile=authority) if authority else None
    if context is not None:
        context.set_alpn_protocols(["h2"])
    while True:
        # What a server may do: not let it in, end it, or leave it alone for so long that others have their turn.
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=20) as plain:
            if context is None:
                flood(plain)
            else:
                with context.wrap_socket(plain, server_hostname=host) as connection:
                    flood(connection)


if __name__ == "__main__":
    main(*sys.argv[1:])
