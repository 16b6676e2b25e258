"""The blocking client."""

import time
from collections.abc import Iterator, Mapping
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
from segrpc.client.sessions.source import ExistingSession, NewSession
from segrpc.client.sessions.state import SessionState
from segrpc.client.sessions.sync import RefineSession
from segrpc.client.sessions.types import RefineOptions
from segrpc.client.types import EncodedImage, ImageInfo, ModelInfo, SegmentationResult
from segrpc.v1.model_service_pb2_grpc import ModelServiceStub
from segrpc.v1.refine_pb2 import RefineRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub

R = TypeVar("R")


class SegmentationClient:
    """Asks a segrpc server; safe to use from several threads. Use it in a ``with`` statement, or close it.

    An image is sent once: later calls name it by its digest, and send it again only if the server has forgotten it.
    Calls that did not reach the server are tried again, where that is safe.

    Args:
        target: The server as ``HOST:PORT``.
        timeout: Seconds that a method may take, uploads and retries included; None waits for ever.
        connection: TLS, and who calls: see `ConnectionOptions`.

    Raises:
        ValueError: If options do not go together, or a token would travel in the clear.
        OSError: If a certificate cannot be read.

    Every method takes its own ``timeout`` as well, and raises `SegmentationError` of the kind that says what was wrong.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        **connection: Unpack[ConnectionOptions],
    ) -> None:
        self._channel = open_channel(target, connection, grpc)
        self._metadata = CallMetadata(connection)
        self._stubs: dict[flow.Service, Any] = {
            "segmentation": SegmentationServiceStub(self._channel),
            "models": ModelServiceStub(self._channel),
            "health": HealthStub(self._channel),
        }
        self._timeout = timeout
        self._sent = SentImages()

    def segment(
        self, image: ImageLike | None, *, timeout: float | None = None, **options: Unpack[SegmentOptions]
    ) -> SegmentationResult:
        """Segment objects in an image; `SegmentOptions` describes the options, `codec.load_image` the images.

        Raises:
            SegmentationError: If the call failed.
            ValueError: If shapes or lengths do not fit.
            OSError: If the image file cannot be read.
        """
        return self._run(flow.segment(image, self._sent, options), timeout)

    def encode(
        self, image: ImageLike, *, timeout: float | None = None, **options: Unpack[EncodeOptions]
    ) -> EncodedImage:
        """Encode an image ahead of the first click; with ``return_image_embedding`` return the embedding."""
        return self._run(flow.encode(image, self._sent, options), timeout)

    def refine(
        self,
        image: ImageLike,
        *,
        timeout: float | None = None,
        reconnect: float = RECONNECT_SECONDS,
        **options: Unpack[RefineOptions],
    ) -> RefineSession:
        """Work on an image in an interactive session; for ``with``.

        Args:
            image: As for `segment`.
            timeout: Seconds to wait for each answer. Default: the client's.
            reconnect: Seconds to go on trying after the connection broke, before the session ends with the error.
            options: See `RefineOptions`.

        Raises:
            OSError: If the image file cannot be read.
            ValueError: If an option's value is unknown.
        """
        source = NewSession(load_image(image), self._sent)
        return self._session(source, options, timeout, reconnect)

    def resume(
        self,
        session_id: str,
        resume_token: str,
        *,
        timeout: float | None = None,
        reconnect: float = RECONNECT_SECONDS,
    ) -> RefineSession:
        """Take up a session that was detached, or is open elsewhere, where it then ends with `SessionTakenError`.

        The newest results of all its objects arrive at once. For what else see `refine`.
        """
        return self._session(ExistingSession(session_id, resume_token), {}, timeout, reconnect)

    def replay(self, export: Mapping[str, Any], image: ImageLike, *, timeout: float | None = None) -> Replay:
        """Compute the rounds of an exported session again, and compare the masks; see `RefineSession.export`.

        Args:
            export: The export.
            image: The image that it is about.
            timeout: Seconds for all rounds.

        Raises:
            ValueError: If it is no export, or the image is of another size.
        """
        return self._run(replay(export, image, self._sent), timeout)

    def upload(self, image: ImageLike, *, timeout: float | None = None) -> ImageInfo:
        """Upload an image in chunks. `segment` and `encode` do this by themselves for large images."""
        return self._run(flow.upload(image, self._sent), timeout)

    def models(self, *, timeout: float | None = None) -> list[ModelInfo]:
        """List the models that are served; the first is the default."""
        return self._run(flow.models(), timeout)

    def model(self, name: str = "", *, timeout: float | None = None) -> ModelInfo:
        """Describe one model; without a name the default model."""
        return self._run(flow.model(name), timeout)

    def health(self, service: str = "", *, timeout: float | None = None) -> bool:
        """Tell whether the server, or one of its services, is ready."""
        return self._run(flow.health(service), timeout)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _session(
        self,
        source: NewSession | ExistingSession,
        options: RefineOptions,
        timeout: float | None,
        reconnect: float,
    ) -> RefineSession:
        seconds = self._timeout if timeout is None else timeout
        return RefineSession(self._open_stream, SessionState(source, options, reconnect), seconds)

    def _open_stream(self, requests: Iterator[RefineRequest]) -> Any:
        return self._stubs["segmentation"].Refine(requests, metadata=self._metadata.of_call())

    def _run(self, steps: Flow[R], timeout: float | None) -> R:
        """Perform the calls of a flow; the timeout covers all of them."""
        seconds = self._timeout if timeout is None else timeout
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            call = next(steps)
            while True:
                method = getattr(self._stubs[call.service], call.method)
                metadata = self._metadata.of_call()
                remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
                try:
                    response = method(call.request, timeout=remaining, metadata=metadata)
                except grpc.RpcError as error:
                    failure = error_from(error)
                    failure.__cause__ = error
                    call = steps.throw(failure)
                else:
                    call = steps.send(response)
        except StopIteration as done:
            result: R = done.value
            return result
