"""A driver of Refine for tests: sends what it is told, and gives every response as it comes."""

import queue
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import grpc
import pytest

from segrpc.v1.refine_pb2 import (
    AddPoints,
    CancelThrough,
    Edit,
    EditRejected,
    Finish,
    ImageChunk,
    MaskResult,
    RefineConfig,
    RefineRequest,
    RefineResponse,
    Resume,
    Round,
    SessionOpened,
    Undo,
)
from segrpc.v1.segmentation_service_pb2 import SegmentRequest, SegmentResponse
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import POINT_LABEL_BACKGROUND, POINT_LABEL_FOREGROUND, Image, OutputOptions, Point, Tensor
from tests.blackbox.failure import Failure, chunks, parse

METHOD = "/segrpc.v1.SegmentationService/Refine"


def points(*positions: tuple[float, float], label: int = 1, ids: tuple[str, ...] = ()) -> AddPoints:
    """Make an edit's clicks."""
    kind = POINT_LABEL_FOREGROUND if label else POINT_LABEL_BACKGROUND
    return AddPoints(points=[Point(x=x, y=y, label=kind) for x, y in positions], point_ids=ids)


class RefineStream:
    """One stream. Use it in a ``with`` statement, which cancels it at the end.

    Args:
        channel: The connection.
        *first: Messages to begin with; a config may be given as it is, and bytes are sent as they are.
        timeout: The stream's deadline in seconds: every read ends by then.
        metadata: Of the call, such as a credential.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        *first: RefineConfig | RefineRequest | bytes,
        timeout: float = 60.0,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self._queue: queue.SimpleQueue[RefineRequest | bytes | None] = queue.SimpleQueue()
        self.seen: list[RefineResponse] = []
        self.next_seq = 2  # in steps of 2, so that there are unseen numbers in between
        self.session = SessionOpened()
        for message in first:
            self.send(RefineRequest(config=message) if isinstance(message, RefineConfig) else message)
        method: Any = channel.stream_stream(METHOD, _serialise, RefineResponse.FromString)
        self.call = method(iter(self._queue.get, None), timeout=timeout, metadata=metadata)

    # Sending

    def send(self, message: RefineRequest | bytes) -> None:
        """Send a message."""
        self._queue.put(message)

    def edit(self, object_id: str = "1", *, seq: int | None = None, **action: Any) -> int:
        """Send an edit, such as ``add_points=points((1, 2))``, under the next number; return the number."""
        number = self.next_seq if seq is None else seq
        self.next_seq = max(self.next_seq, number + 2)
        self.send(RefineRequest(seq=number, edit=Edit(object_id=object_id, **action)))
        return number

    def upload(self, data: bytes, size: int = 2**16) -> None:
        """Send an image in chunks."""
        for offset, piece in chunks(data, size):
            self.send(RefineRequest(image=ImageChunk(offset=offset, data=piece)))

    def cancel_through(self, seq: int) -> None:
        """Cancel edits."""
        self.send(RefineRequest(cancel=CancelThrough(seq=seq)))

    def finish(self) -> None:
        """End the session."""
        self.send(RefineRequest(finish=Finish()))

    def half_close(self) -> None:
        """Say that nothing more will be sent."""
        self._queue.put(None)

    # Receiving

    def next(self) -> RefineResponse:
        """Wait for the next response."""
        response: RefineResponse = next(self.call)
        self.seen.append(response)
        return response

    def opened(self) -> RefineResponse:
        """Wait for the session to be open; progress of an upload may come before."""
        while not (response := self.next()).HasField("opened"):
            assert response.HasField("upload"), response
        self.session = response.opened
        return response

    def result(self) -> MaskResult:
        """Wait for the next response, which must be a result."""
        response = self.next()
        assert response.HasField("result"), response
        return response.result

    def rejected(self) -> EditRejected:
        """Wait for the next response, which must be a rejection."""
        response = self.next()
        assert response.HasField("rejected"), response
        return response.rejected

    def rest(self) -> list[RefineResponse]:
        """Wait for the end, which must be clean, and return what came before it."""
        rest = []
        while True:
            try:
                rest.append(self.next())
            except StopIteration:
                return rest

    def failure(self) -> Failure:
        """Wait for the end, which must be a failure; what comes before it is in `seen`."""
        with pytest.raises(grpc.RpcError) as caught:
            self.rest()
        return parse(caught.value)

    def barrier(self) -> None:
        """Return once the server has all edits that were sent, and nothing but this answer has come meanwhile.

        An edit under a number that was left out is rejected at once, whatever is being computed.
        """
        unseen = self.next_seq - 3
        assert unseen > 0, "an edit must have been sent before"
        self.edit("barrier", seq=unseen, undo=Undo())
        assert self.rejected().seq == unseen

    # Session

    def resuming(self, last_revision: int = 0) -> RefineConfig:
        """Make the config that takes the session up again."""
        session_id, token = self.session.session_id, self.session.resume_token
        return RefineConfig(resume=Resume(session_id=session_id, resume_token=token, last_revision=last_revision))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.call.cancel()
        self._queue.put(None)


def _serialise(message: RefineRequest | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


def results(responses: list[RefineResponse]) -> list[RefineResponse]:
    """Choose the results."""
    return [response for response in responses if response.HasField("result")]


def replay(
    channel: grpc.Channel,
    image: bytes,
    rounds: list[Round],
    model: str = "",
    masks: dict[int, Tensor] | None = None,
) -> Iterator[SegmentResponse]:
    """Compute rounds again with Segment.

    Args:
        channel: The connection.
        image: The encoded image.
        rounds: All rounds of an object that count, in order.
        model: The model's name.
        masks: The masks that were set, by the number of the edit.
    """
    stub = SegmentationServiceStub(channel)
    logits: dict[int, list[Tensor]] = {}
    for one in rounds:
        prompt = one.prompt
        if one.mask_seq:
            prompt.mask_input.CopyFrom((masks or {})[one.mask_seq])
        elif one.mask_revision:
            prompt.mask_input.CopyFrom(logits[one.mask_revision][one.mask_index])
        output = OutputOptions(multimask_output=one.multimask_output, return_logits=True)
        request = SegmentRequest(model=model, image=Image(data=image), prompts=[prompt], output=output)
        response = stub.Segment(request)
        logits[one.revision] = _candidates(response.mask_logits)
        yield response


def _candidates(logits: Tensor) -> list[Tensor]:
    """Split logits ``[1, n, m, m]`` into n tensors ``[1, m, m]``."""
    _, count, *sides = logits.shape
    size = len(logits.data) // count
    return [
        Tensor(dtype=logits.dtype, shape=[1, *sides], data=logits.data[i * size : (i + 1) * size]) for i in range(count)
    ]
