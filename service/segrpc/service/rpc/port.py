"""A port that grpc.aio serves, and that is opened anew when it gives up."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

import grpc

from segrpc.service.rpc.tls import Certificates

log = logging.getLogger("segrpc.server")

CLOSE_SECONDS = 1.0  # for answers that are on their way when a port closes
WATCH_SECONDS = 0.2  # between looks at whether grpc still serves


class Port:
    """A port. Made on the event loop that it will be served on.

    grpc.aio stops serving, for good and for everybody, when anybody asks for a method whose name is no UTF-8: before
    an interceptor sees the call. Another server then takes its place. The calls in progress are lost; what handlers
    hold is not.

    Args:
        make_server: Makes a server with all that it serves.
        certificates: What TLS needs; None without TLS.
        purpose: What the port is for, for the messages.
    """

    def __init__(
        self,
        make_server: Callable[[], grpc.aio.Server],
        certificates: Certificates | None = None,
        purpose: str = "",
    ) -> None:
        self._make_server = make_server
        self._certificates = certificates
        self._purpose = f" for {purpose}" if purpose else ""
        self._server = make_server()
        self._address = ""
        self._keeper: asyncio.Task[None] | None = None

    def open(self, address: str) -> str:
        """Take the port; calls wait until `start`.

        Args:
            address: HOST:PORT; port 0 takes a free one.

        Returns:
            The address, with the port that was taken.

        Raises:
            OSError: If the address cannot be listened on.
        """
        try:
            port = self._listen(self._server, address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}{self._purpose}: is the address right, and free?") from error
        self._address = f"{address.rpartition(':')[0]}:{port}"
        return self._address

    async def start(self) -> None:
        """Answer calls."""
        await self._server.start()
        self._keeper = asyncio.create_task(self._keep_serving())

    async def stop(self) -> None:
        """Close the port."""
        if self._keeper is not None:
            self._keeper.cancel()
        await self._server.stop(CLOSE_SECONDS)

    def _listen(self, server: grpc.aio.Server, address: str) -> int:
        if self._certificates is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, self._certificates.credentials()))

    async def _keep_serving(self) -> None:
        """Put another server in the place of one that gave up."""
        while True:
            try:
                # Without a timeout it would wait until all connections are gone, and their clients may stay.
                while await self._server.wait_for_termination(WATCH_SECONDS):
                    pass
                return  # stopped by us
            except Exception as error:  # noqa: BLE001 - whatever made it give up
                log.error("grpc stopped serving%s (%s); serving anew", self._purpose, error)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._server.stop(None), CLOSE_SECONDS)  # that ends the connections
            await self._reopen()

    async def _reopen(self) -> None:
        while True:
            server = self._make_server()
            try:
                self._listen(server, self._address)
            except RuntimeError as error:
                log.error("cannot listen on %s%s again: %s", self._address, self._purpose, error)
                await asyncio.sleep(WATCH_SECONDS)
            else:
                self._server = server
                await server.start()
                return
