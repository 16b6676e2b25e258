"""The service for whoever operates the server, on a port of its own that only this machine reaches."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

import grpc

from segrpc.admin.v1 import admin_service_pb2
from segrpc.admin.v1.admin_service_pb2_grpc import AdminServiceServicer, add_AdminServiceServicer_to_server
from segrpc.service.admission.ledger import Ledger
from segrpc.service.engine.base import Flushed
from segrpc.service.errors import InvalidFieldError
from segrpc.service.identity.authenticator import Authenticator
from segrpc.service.rpc.interceptors import Boundary
from segrpc.service.rpc.port import Port
from segrpc.service.rpc.reflection import add_reflection
from segrpc.service.telemetry.call import Observer
from segrpc.service.telemetry.statistics import Statistics

SERVICE = admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name

Context = Any  # as for the other servicers


class Operated(Protocol):
    """What can be done to a server."""

    def stats(self) -> Statistics:
        """Report what is held at the moment."""

    @property
    def draining(self) -> bool:
        """Whether calls are refused because it shuts down."""

    async def drain(self, seconds: float | None) -> bool:
        """Refuse new calls, and wait for those in progress; return whether all have ended.

        Args:
            seconds: How long to wait at most; None for as long as streams may take.
        """

    async def flush_embeddings(self) -> Flushed:
        """Let embeddings go that nobody is about to use."""

    def flush_images(self) -> Flushed:
        """Let images go that are known by digest."""


class AdminServicer(AdminServiceServicer):
    """``segrpc.admin.v1.AdminService``.

    Args:
        operated: The server.
    """

    def __init__(self, operated: Operated) -> None:
        self._operated = operated

    async def GetStatistics(  # noqa: N802
        self, request: admin_service_pb2.GetStatisticsRequest, context: Context
    ) -> admin_service_pb2.GetStatisticsResponse:
        """Tell what the server holds."""
        return statistics_message(self._operated.stats(), self._operated.draining)

    async def Drain(  # noqa: N802
        self, request: admin_service_pb2.DrainRequest, context: Context
    ) -> admin_service_pb2.DrainResponse:
        """Begin to shut down, and wait for calls in progress."""
        timeout = request.timeout.seconds + request.timeout.nanos / 1e9 if request.HasField("timeout") else None
        if timeout is not None and timeout < 0:
            raise InvalidFieldError.of("timeout", f"is {timeout:g} s; must be 0 or more")
        await self._operated.drain(timeout)
        return admin_service_pb2.DrainResponse(calls=self._operated.stats().calls)

    async def FlushCaches(  # noqa: N802
        self, request: admin_service_pb2.FlushCachesRequest, context: Context
    ) -> admin_service_pb2.FlushCachesResponse:
        """Let caches go."""
        if not (request.embeddings or request.images):
            raise InvalidFieldError.of("embeddings", "nothing is chosen: set embeddings, images or both")
        embeddings = await self._operated.flush_embeddings() if request.embeddings else Flushed()
        images = self._operated.flush_images() if request.images else Flushed()
        return admin_service_pb2.FlushCachesResponse(
            embeddings=embeddings.count,
            embedding_bytes=embeddings.nbytes,
            images=images.count,
            image_bytes=images.nbytes,
        )


def statistics_message(now: Statistics, draining: bool) -> admin_service_pb2.GetStatisticsResponse:
    """Put what a server holds into a message."""
    engine = asdict(now.engine)
    memory = [
        admin_service_pb2.DeviceMemory(device=device, held_bytes=nbytes)
        for device, nbytes in engine.pop("device_memory")
    ]
    return admin_service_pb2.GetStatisticsResponse(
        calls=now.calls,
        sessions=now.sessions,
        attached_sessions=now.attached_sessions,
        session_bytes=now.session_bytes,
        images=now.images,
        image_bytes=now.image_bytes,
        draining=draining,
        taken=now.taken,
        limits=now.limits,
        engine=admin_service_pb2.EngineStatistics(device_memory=memory, **engine),
    )


def admin_port(operated: Operated, observers: Sequence[Observer], *, reflects: bool) -> Port:
    """Make the port. On the event loop that it will be served on.

    Args:
        operated: The server.
        observers: Are told of each call.
        reflects: Whether it answers reflection.
    """
    # A boundary of its own: its calls are none that a server waits for when it drains.
    boundary = Boundary(Authenticator(None, None, certificates=False), Ledger(), observers)

    def make_server() -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=[boundary], options=[("grpc.so_reuseport", 0)])
        add_AdminServiceServicer_to_server(AdminServicer(operated), server)
        if reflects:
            add_reflection(server, [SERVICE])
        return server

    return Port(make_server, purpose="administration")
