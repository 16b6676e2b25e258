"""The asyncio client."""

import time
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
from grpc_health.v1.health_pb2_grpc import HealthStub

from segrpc.client import flow
from segrpc.client.channel import (
    DEFAULT_TARGET,
    DEFAULT_TIMEOUT,
    RECONNECT_SECONDS,
    CallMetadata,
    ConnectionOptions,
    open_channel,
)
from segrpc.client.codec import ImageLike, load_image
from segrpc.client.errors import error_from
from segrpc.client.flow import EncodeOptions, Flow, SegmentOptions, SentImages
from segrpc.client.replay import Replay, replay
from segrpc.client.sessions.aio import AsyncRefineSession
from segrpc.client.sessions.source import ExistingSession, NewSession
from segrpc.client.sessions.state import SessionState
from segrpc.client.sessions.types import RefineOptions
from segrpc.client.types import EncodedImage, ImageInfo, ModelInfo, SegmentationResult
from segrpc.v1.model_service_pb2_grpc import ModelServiceStub
from segrpc.v1.refine_pb2 import RefineRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub

R = TypeVar("R")


class AsyncSegmentationClient:
    """`SegmentationClient` for asyncio: the same arguments and methods, awaited; made on the loop that uses it."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        **connection: Unpack[ConnectionOptions],
    ) -> None:
        self._channel = open_channel(target, connection, grpc.aio)
        self._metadata = CallMetadata(connection)
        self._stubs: dict[flow.Service, Any] = {
            "segmentation": SegmentationServiceStub(self._channel),
            "models": ModelServiceStub(self._channel),
            "health": HealthStub(self._channel),
        }
        self._timeout = timeout
        self._sent = SentImages()

    async def segment(
        self,
        image: ImageLike | None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - a deadline that the server is told, not a cancellation
        **options: Unpack[SegmentOptions],
    ) -> SegmentationResult:
        """See `SegmentationClient.segment`."""
        return await self._run(flow.segment(image, self._sent, options), timeout)

    async def encode(
        self,
        image: ImageLike,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
        **options: Unpack[EncodeOptions],
    ) -> EncodedImage:
        """See `SegmentationClient.encode`."""
        return await self._run(flow.encode(image, self._sent, options), timeout)

    def refine(
        self,
        image: ImageLike,
        *,
        timeout: float | None = None,
        reconnect: float = RECONNECT_SECONDS,
        **options: Unpack[RefineOptions],
    ) -> AsyncRefineSession:
        """See `SegmentationClient.refine`; for ``async with``."""
        source = NewSession(load_image(image), self._sent)
        return self._session(source, options, timeout, reconnect)

    def resume(
        self,
        session_id: str,
        resume_token: str,
        *,
        timeout: float | None = None,
        reconnect: float = RECONNECT_SECONDS,
    ) -> AsyncRefineSession:
        """See `SegmentationClient.resume`; for ``async with``."""
        return self._session(ExistingSession(session_id, resume_token), {}, timeout, reconnect)

    async def replay(
        self,
        export: Mapping[str, Any],
        image: ImageLike,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Replay:
        """See `SegmentationClient.replay`."""
        return await self._run(replay(export, image, self._sent), timeout)

    async def upload(self, image: ImageLike, *, timeout: float | None = None) -> ImageInfo:  # noqa: ASYNC109
        """See `SegmentationClient.upload`."""
        return await self._run(flow.upload(image, self._sent), timeout)

    async def models(self, *, timeout: float | None = None) -> list[ModelInfo]:  # noqa: ASYNC109
        """See `SegmentationClient.models`."""
        return await self._run(flow.models(), timeout)

    async def model(self, name: str = "", *, timeout: float | None = None) -> ModelInfo:  # noqa: ASYNC109
        """See `SegmentationClient.model`."""
        return await self._run(flow.model(name), timeout)

    async def health(self, service: str = "", *, timeout: float | None = None) -> bool:  # noqa: ASYNC109
        """See `SegmentationClient.health`."""
        return await self._run(flow.health(service), timeout)

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _session(
        self,
        source: NewSession | ExistingSession,
        options: RefineOptions,
        timeout: float | None,
        reconnect: float,
    ) -> AsyncRefineSession:
        seconds = self._timeout if timeout is None else timeout
        return AsyncRefineSession(self._open_stream, SessionState(source, options, reconnect), seconds)

    async def _open_stream(self, requests: AsyncIterator[RefineRequest]) -> Any:
        return self._stubs["segmentation"].Refine(requests, metadata=await self._metadata.of_call_async())

    async def _run(self, steps: Flow[R], timeout: float | None) -> R:  # noqa: ASYNC109
        """Perform the calls of a flow; the timeout covers all of them."""
        seconds = self._timeout if timeout is None else timeout
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            call = next(steps)
            while True:
                method = getattr(self._stubs[call.service], call.method)
                metadata = await self._metadata.of_call_async()
                remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
                try:
                    response = await method(call.request, timeout=remaining, metadata=metadata)
                except grpc.RpcError as error:
                    failure = error_from(error)
                    failure.__cause__ = error
                    call = steps.throw(failure)
                else:
                    call = steps.send(response)
        except StopIteration as done:
            result: R = done.value
            return result
