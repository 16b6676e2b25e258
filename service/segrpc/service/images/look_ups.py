"""Looking up the addresses of hosts."""

import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import BoundedSemaphore, Thread
from typing import Final

from segrpc.service.errors import OverloadedError

Resolver = Callable[[str, int], Sequence[str]]

RETRY_AFTER: Final = 5.0  # seconds: about as long as a look-up goes on that nobody answers


def resolve_host(host: str, port: int) -> list[str]:
    """Look up the IP addresses of a host.

    Raises:
        OSError: If it has none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class LookUps:
    """Looks hosts up, for as long as one is willing to wait. May be used from any thread.

    The system gives no way to stop a look-up: one that nobody waits for any more goes on in a thread of its own. So
    there may only be so many.

    Args:
        most: How many look-ups there may be at a time.
        resolve: Looks up a host.
    """

    def __init__(self, most: int = 64, resolve: Resolver = resolve_host) -> None:
        self._room = BoundedSemaphore(most)
        self._resolve = resolve

    def addresses(self, host: str, port: int, seconds: float) -> Sequence[str]:
        """Return the IP addresses of a host.

        Raises:
            TimeoutError: If it takes longer.
            OSError: If it has none.
            OverloadedError: If too many look-ups hang.
        """
        if not self._room.acquire(blocking=False):
            raise OverloadedError(
                "too many look-ups of hosts are without an answer: is the name service of the server down?",
                RETRY_AFTER,
            )
        found: Future[Sequence[str]] = Future()

        def run() -> None:
            try:
                found.set_result(self._resolve(host, port))
            except Exception as error:  # noqa: BLE001 - raised again in the thread that waits
                found.set_exception(error)
            finally:
                self._room.release()

        Thread(target=run, name="segrpc-look-up", daemon=True).start()
        return found.result(seconds)
