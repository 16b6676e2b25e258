"""A network that a test can break: a proxy on the loopback interface, between a client and a server."""

import select
import socket
import struct
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self


class TcpProxy:
    """Passes bytes on between clients and a server. Use it in a ``with`` statement.

    Args:
        target: The server as ``HOST:PORT``.

    Attributes:
        target: Where to connect to instead, as ``HOST:PORT``.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._changed = threading.Condition()
        self._open: set[socket.socket] = set()
        self._wakers: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._down = False
        self._refused = 0
        self._accepted = 0
        self._swallowing = False
        self._swallowed = 0
        self._to_server = self._to_client = 0

    @property
    def bytes_to_server(self) -> int:
        """How many bytes clients have sent so far."""
        with self._changed:
            return self._to_server

    @property
    def bytes_to_client(self) -> int:
        """How many bytes clients have got so far."""
        with self._changed:
            return self._to_client

    @property
    def connections(self) -> int:
        """How many connections were passed on so far."""
        with self._changed:
            return self._accepted

    def cut(self, *, stay_down: bool = False) -> None:
        """Break all connections; with ``stay_down`` new ones end at once, until `mend`."""
        with self._changed:
            self._swallowing = False
            self._down = stay_down
            for end in self._open:
                with suppress(OSError):  # that has ended by itself
                    end.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def reset(self) -> None:
        """Break all connections as a host does that has forgotten them: with RST."""
        with self._changed:
            for end in self._open:
                with suppress(OSError):  # that has ended by itself
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._open.clear()
            self._wake()

    def _wake(self) -> None:
        for waker in self._wakers:
            waker.close()
        self._wakers.clear()

    def lead_to(self, target: str) -> None:
        """Break all connections, and lead new ones to another server."""
        host, _, port = target.rpartition(":")
        with self._changed:
            self._server = (host, int(port))
        self.cut()

    def mend(self) -> None:
        """Let new connections through again."""
        with self._changed:
            self._down = False

    def swallow_answers(self) -> None:
        """Lose what the server says, until the connections are `cut`."""
        with self._changed:
            self._swallowing, self._swallowed = True, 0

    def wait_until_swallowed(self, size: int) -> None:
        """Return once that many bytes of answers were lost."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._swallowed >= size, 60), "the server did not answer"

    def wait_until_refused(self, times: int) -> None:
        """Return once that many connections ended at once because the network is down."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._refused >= times, 60), "no client tried to connect"

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            with self._changed:
                if self._down:
                    client.close()
                    self._refused += 1
                    self._changed.notify_all()
                    continue
                self._accepted += 1
                server = socket.create_connection(self._server)
                self._open |= {client, server}
                waker, woken = socket.socketpair()
                self._wakers.append(waker)
                thread = threading.Thread(target=self._pass_on, args=(client, server, woken))
                self._threads.append(thread)
                thread.start()

    def _pass_on(self, client: socket.socket, server: socket.socket, woken: socket.socket) -> None:
        """Pass bytes on until either side ends or somebody wakes this, which ends both."""
        with client, server, woken, suppress(OSError):
            while True:
                for source in select.select([client, server, woken], [], [])[0]:
                    data = source.recv(2**16)
                    if not data:
                        return
                    if self._counted(data, answer=source is server):
                        (client if source is server else server).sendall(data)

    def _counted(self, data: bytes, *, answer: bool) -> bool:
        """Count bytes; return whether they are passed on."""
        with self._changed:
            if not answer:
                self._to_server += len(data)
            elif self._swallowing:
                self._swallowed += len(data)
                self._changed.notify_all()
                return False
            else:
                self._to_client += len(data)
            return True

    def __enter__(self) -> Self:
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join()
        self.cut()
        self._wake()
        for thread in self._threads:
            thread.join()
