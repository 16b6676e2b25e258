"""Putting a server together, from settings to an open port, and taking it apart."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from segrpc.service.admission.ledger import Ledger
from segrpc.service.admission.limits import Limits, Resource
from segrpc.service.admission.limits_file import read_limits
from segrpc.service.admission.memory import MemoryGuard
from segrpc.service.engine.base import Engine, Flushed
from segrpc.service.errors import ConfigurationError
from segrpc.service.identity.authenticator import Authenticator
from segrpc.service.identity.jwks import JwksFile, JwksUrl, KeySource
from segrpc.service.identity.jwt import JwtVerifier
from segrpc.service.identity.keys import read_keys
from segrpc.service.identity.watched import Watched
from segrpc.service.images.decode import ImageLimits
from segrpc.service.images.library import ImageLibrary
from segrpc.service.images.sources import SourcePolicy
from segrpc.service.images.store import ImageStore
from segrpc.service.rpc.admin import admin_port
from segrpc.service.rpc.interceptors import Boundary
from segrpc.service.rpc.patience import Patience
from segrpc.service.rpc.port import CLOSE_SECONDS, Port
from segrpc.service.rpc.reflection import add_reflection
from segrpc.service.rpc.servicer import ModelServicer, SegmentationServicer
from segrpc.service.rpc.services import Services
from segrpc.service.rpc.tls import Certificates
from segrpc.service.sessions.current_images import CurrentImages
from segrpc.service.sessions.store import Lifetimes, SessionStore
from segrpc.service.settings import Settings
from segrpc.service.telemetry.statistics import Statistics
from segrpc.service.telemetry.telemetry import Telemetry, TelemetryOptions
from segrpc.v1 import model_service_pb2, segmentation_service_pb2
from segrpc.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from segrpc.v1.segmentation_service_pb2_grpc import add_SegmentationServiceServicer_to_server

log = logging.getLogger("segrpc.server")

T = TypeVar("T")

SEGMENTATION = segmentation_service_pb2.DESCRIPTOR.services_by_name["SegmentationService"].full_name
SERVICES = (
    SEGMENTATION,
    model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
)
METHODS = tuple(
    method.name
    for file in (segmentation_service_pb2, model_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

MAX_PONG_SECONDS = 10.0  # that a client has to answer whether it is there


def image_limits(settings: Settings) -> ImageLimits:
    """Return what images must keep to."""
    return ImageLimits(settings.max_image_bytes, settings.max_image_pixels)


def authenticator(settings: Settings) -> Authenticator:
    """Make what finds out who calls.

    Raises:
        ConfigurationError: If a file cannot be read, or is not what it should be.
    """
    keys = tokens = None
    if settings.keys_file is not None:
        file = settings.keys_file
        keys = _usable(f"keys_file {file}", lambda: Watched([file], lambda: read_keys(file, METHODS)))
    if settings.jwt_issuer:
        source = _usable(f"jwt_jwks {settings.jwt_jwks}", lambda: _key_source(settings))
        tokens = JwtVerifier(settings.jwt_issuer, settings.jwt_audience, source)
    return Authenticator(keys, tokens, certificates=settings.tls_client_ca is not None)


def watched_limits(settings: Settings) -> Watched[Limits] | None:
    """Make what reads the file of limits again when it changes; None without one.

    Raises:
        ConfigurationError: If it cannot be read, or is not what it should be.
    """
    file = settings.limits_file
    if file is None:
        return None
    return _usable(
        f"limits_file {file}",
        lambda: Watched([file], lambda: read_limits(file, settings.limits(), settings.check_limits)),
    )


def certificates(settings: Settings) -> Certificates | None:
    """Read what TLS needs; None without TLS.

    Raises:
        ConfigurationError: If a file cannot be read, or is not what it should be.
    """
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is None or key is None:
        return None
    return _usable(f"tls_certificate {certificate}", lambda: Certificates(certificate, key, settings.tls_client_ca))


def _key_source(settings: Settings) -> KeySource:
    if "://" in settings.jwt_jwks:
        return JwksUrl(settings.jwt_jwks, settings.jwt_refresh_seconds)
    return JwksFile(Path(settings.jwt_jwks))


def _usable(what: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except (ValueError, OSError) as error:
        raise ConfigurationError(f"{what} cannot be used: {error}") from error


class Server:
    """A gRPC server for an engine. Made on the event loop that it will run on.

    Args:
        settings: The operator's settings.
        engine: Runs the models; started and stopped by the server.

    Raises:
        ConfigurationError: If the settings of transport and identity do not go together, would let strangers in, or
            name files that cannot be used.
    """

    def __init__(self, settings: Settings, engine: Engine) -> None:
        settings.check_security()
        settings.check_limits(settings.limits())
        self._settings = settings
        self._engine = engine
        self._telemetry = Telemetry(TelemetryOptions(settings.metrics_listen, settings.otlp_endpoint), self.stats)
        self._limits = watched_limits(settings)
        self._memory = MemoryGuard(settings.memory_bytes) if settings.memory_bytes else None
        self._ledger = Ledger(settings.limits() if self._limits is None else self._limits.get(), self._memory)
        self._boundary = Boundary(authenticator(settings), self._ledger, self._telemetry.observers)
        lifetimes = Lifetimes(settings.session_idle_seconds, settings.session_detached_seconds)
        self._sessions = SessionStore(self._ledger, lifetimes)
        self._store = ImageStore(self._ledger)
        if self._memory is not None:
            self._memory.add_cache(self._store.shrink)
        self._health = health.aio.HealthServicer()
        self._services = self._make_services()
        self._follower: asyncio.Task[None] | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._port = Port(self._make_server, certificates(settings))
        self._admin = self._make_admin_port()

    async def start(self) -> str:
        """Open the port, load the models and serve.

        Returns:
            The address, with the port that was taken.

        Raises:
            OSError: If the address cannot be listened on.
            ModelLoadError: If a model cannot be loaded, or does not answer.
        """
        address = self._port.open(self._settings.listen)
        if self._admin is not None:
            log.info("administration is on %s", self._admin.open(self._settings.admin_listen))
        await self._telemetry.start()
        await self._set_serving(False, "", *SERVICES)
        await self._engine.start()
        try:
            await self._engine.warm_up()
        except BaseException:
            await self._engine.stop()
            raise
        await self._port.start()
        if self._admin is not None:
            await self._admin.start()
        await self._set_serving(True, "", *SERVICES, HEALTH)
        self._follower = asyncio.create_task(self._follow_engine())
        self._sweeper = asyncio.create_task(self._sweep())
        return address

    async def _set_serving(self, serving: bool, *services: str) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in services:
            await self._health.set(service, status)

    async def _follow_engine(self) -> None:
        """Tell health checkers whether prompts are answered. What needs no model is served all the time."""
        async for troubles in self._engine.troubles():
            await self._set_serving(not troubles, "", SEGMENTATION)

    def _make_admin_port(self) -> Port | None:
        if not self._settings.admin_listen:
            return None
        return admin_port(self, self._telemetry.observers, reflects=self._settings.reflection)

    def _make_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=[self._boundary], options=_connection_options(self._settings))
        add_SegmentationServiceServicer_to_server(SegmentationServicer(self._services), server)
        add_ModelServiceServicer_to_server(ModelServicer(self._services), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._settings.reflection:
            add_reflection(server, (*SERVICES, HEALTH))
        return server

    def _make_services(self) -> Services:
        settings = self._settings
        limits = model_service_pb2.Limits(
            max_image_bytes=settings.max_image_bytes,
            max_image_pixels=settings.max_image_pixels,
            max_prompts=settings.max_prompts,
            max_points=settings.max_points,
            max_chunk_bytes=settings.max_chunk_bytes,
        )
        policy = SourcePolicy(
            media_roots=settings.media_root,
            allowed_hosts=settings.allowed_host,
            allow_private_addresses=settings.allow_private_addresses,
            timeout=settings.fetch_timeout,
        )
        return Services(
            engine=self._engine,
            images=ImageLibrary(self._store, policy, image_limits(settings)),
            current_images=CurrentImages(
                settings.max_sessions, settings.session_idle_seconds, settings.principal_share
            ),
            sessions=self._sessions,
            ledger=self._ledger,
            limits=limits,
            draining=self._boundary.draining,
            patience=Patience(settings.stall_seconds),
            drain_seconds=settings.drain_seconds,
        )

    async def _sweep(self) -> None:
        """End the sessions whose time is over; look at the file of limits and at the memory. Once a second or more."""
        shortest = min(self._settings.session_idle_seconds, self._settings.session_detached_seconds)
        while True:
            await asyncio.sleep(min(1.0, shortest / 4))
            self._sessions.expire()
            if self._limits is not None:
                self._ledger.limits = self._limits.get()
            if self._memory is not None:
                self._memory.relieve()

    def stats(self) -> Statistics:
        """Report what is held at the moment."""
        return Statistics(
            calls=self._boundary.active,
            sessions=len(self._sessions),
            attached_sessions=self._sessions.attached,
            session_bytes=self._sessions.nbytes,
            images=len(self._store),
            image_bytes=self._store.nbytes,
            tasks=len(asyncio.all_tasks()),
            taken=self._ledger.taken(),
            limits={str(resource): self._ledger.limits.of_all(resource) for resource in Resource},
            engine=self._engine.stats(),
        )

    @property
    def draining(self) -> bool:
        """Whether calls are refused because it shuts down."""
        return self._boundary.draining.is_set()

    async def drain(self, seconds: float | None = None) -> bool:
        """Tell health checkers, refuse new calls and wait for those in progress.

        Args:
            seconds: How long to wait at most; None until streams have ended, which do so by themselves.

        Returns:
            Whether all have ended.
        """
        if self._follower is not None:
            self._follower.cancel()
        # The health service itself, which stands for the process being alive, serves to the end.
        await self._set_serving(False, "", *SERVICES)
        return await self._boundary.drain(self._settings.drain_seconds + CLOSE_SECONDS if seconds is None else seconds)

    async def flush_embeddings(self) -> Flushed:
        """Let embeddings go that nobody is about to use."""
        return await self._engine.flush()

    def flush_images(self) -> Flushed:
        """Let images go that are known by digest."""
        count, nbytes = len(self._store), self._store.nbytes
        self._store.shrink(nbytes)
        return Flushed(count - len(self._store), nbytes - self._store.nbytes)

    async def stop(self) -> None:
        """Finish the calls in progress, close the port and unload the models."""
        if not await self.drain():
            log.warning("calls were still in progress after %g s and are cut off", self._settings.drain_seconds)
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self._port.stop()
        await self._engine.stop()
        if self._admin is not None:
            await self._admin.stop()
        await self._telemetry.stop()


def _connection_options(settings: Settings) -> list[tuple[str, int]]:
    pong_ms = round(min(settings.keepalive_seconds, MAX_PONG_SECONDS) * 1e3)
    options = [
        ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it silently
        ("grpc.max_receive_message_length", int(settings.max_message_bytes)),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", settings.max_streams_per_connection),
        # What clients may do: gRPC ends connections with more pings than this.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # What the server does, so that streams of clients that are no longer there end.
        ("grpc.keepalive_time_ms", round(settings.keepalive_seconds * 1e3)),
        ("grpc.keepalive_timeout_ms", pong_ms),
        ("grpc.http2.ping_timeout_ms", pong_ms),  # the one that counts in gRPC 1.85
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if settings.max_connection_age_seconds:
        # Streams that are open then go on as long as they like: that is the default of the grace time.
        options.append(("grpc.max_connection_age_ms", round(settings.max_connection_age_seconds * 1e3)))
    return options
