"""A session without a network: what to send, what has been answered, when to connect again.

A driver (`sync`, `aio`) opens a stream with the messages of `opening`, gives each response to `received` and the
end of the stream to `lost`, and sends what `take_messages` returns after each of these and after `submit`, `cancel` and
`finish`. All waiting is for one of the methods that return None until there is an answer.
"""

from collections.abc import Iterator
from datetime import UTC, datetime

import grpc

from segrpc.client.codec import image_info
from segrpc.client.errors import SegmentationError, SessionClosedError, UnavailableError
from segrpc.client.sessions import codec
from segrpc.client.sessions.edits import Edit
from segrpc.client.sessions.ledger import Ledger
from segrpc.client.sessions.source import ExistingSession, NewSession
from segrpc.client.sessions.types import RefineOptions, RefineResult
from segrpc.client.types import ImageInfo
from segrpc.v1 import refine_pb2

FIRST_DELAY, LAST_DELAY = 0.05, 2.0  # seconds before connecting again; doubles from the one to the other


class SessionState:
    """What a client knows of a session.

    Args:
        source: What to open.
        options: The options of the session.
        reconnect: Seconds to go on trying after the connection broke.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If an option's value is unknown.
    """

    def __init__(self, source: NewSession | ExistingSession, options: RefineOptions, reconnect: float) -> None:
        self.options = options
        self.ledger = Ledger(keep_all=isinstance(source, ExistingSession) or options.get("edit_policy") == "every_edit")
        self.image: ImageInfo | None = None
        self.model = ""  # as the server says
        self.session_id, self.resume_token = "", ""
        if isinstance(source, ExistingSession):
            self.session_id, self.resume_token = source.session_id, source.resume_token
        self.expire_time: datetime | None = None
        self.draining: datetime | None = None
        self.ended = False
        self.failure_told = False

        self._source = source
        self._config = codec.config_message(options)
        self._messages: list[refine_pb2.RefineRequest] = []
        self._connected, self._open = False, False  # a stream is there; the server has answered `opened` on it
        self._finishing, self._detaching = False, False
        self._failure: SegmentationError | None = None
        self._reconnect = reconnect
        self._attempts = 0
        self._began, self._lost_at = 0.0, 0.0  # this stream; the time without one

    # What a driver does

    def opening(self, now: float) -> Iterator[refine_pb2.RefineRequest]:
        """Begin a stream; return its first messages, to be read in any thread.

        Args:
            now: The time in seconds, of a clock that never goes back.
        """
        self._connected, self._open, self._began = True, False, now
        config = refine_pb2.RefineConfig()
        config.CopyFrom(self._config)
        if isinstance(self._source, NewSession) and not self.session_id:
            return self._source.opening(config)
        config.resume.session_id, config.resume.resume_token = self.session_id, self.resume_token
        config.resume.last_revision = self.ledger.complete
        return iter([refine_pb2.RefineRequest(config=config)])

    def take_messages(self) -> list[refine_pb2.RefineRequest]:
        """Return what is to be sent now on the stream, in order."""
        messages, self._messages = self._messages, []
        return messages

    def received(self, response: refine_pb2.RefineResponse) -> None:
        """Take in a response."""
        match response.WhichOneof("payload"):
            case "opened":
                self._opened(response.opened, response.applied_seq)
            case "result":
                self.ledger.result(codec.refine_result(response))
            case "rejected":
                self.ledger.rejected(codec.rejection(response.rejected))
            case "draining":
                self.draining = response.draining.close_time.ToDatetime(UTC)
        self.ledger.applied(response.applied_seq)

    def lost(self, error: SegmentationError | None, now: float) -> float | None:
        """Take in the end of the stream.

        Args:
            error: Its status; None for OK.
            now: The time, of the same clock as in `opening`.

        Returns:
            Seconds after which to open the next stream, or None if the session has ended.
        """
        was_open = self._open
        lasted = was_open and (self.ledger.progress or now > self._began + LAST_DELAY)
        self._connected, self._open = False, False
        self._messages.clear()
        if self.ended:
            return None
        if self._is_orderly(error):
            self.ended = True
            return None
        if self.image is None and isinstance(self._source, NewSession) and self._source.forgotten(error):
            return 0.0
        if lasted:
            self._attempts = 0
        if self._attempts == 0:
            self._lost_at = now
        delay = max(min(FIRST_DELAY * 2.0**self._attempts, LAST_DELAY), (error and error.retry_after) or 0.0)
        self._attempts += 1
        if not self._may_come_back(error, was_open) or now + delay > self._lost_at + self._reconnect:
            self.fail(error or UnavailableError("the server closed the stream", grpc.StatusCode.UNAVAILABLE))
            return None
        return delay

    def fail(self, error: SegmentationError) -> None:
        """End the session with an error, if it has not ended."""
        if not self.ended:
            self.ended, self._failure = True, error

    # What a person does

    def submit(self, edit: Edit) -> int:
        """Number an edit and send it, now or once connected again; return its number.

        Raises:
            SegmentationError: If the session has ended, with what ended it.
            TypeError: If it is no edit.
            ValueError: If shapes or lengths do not fit.
        """
        self._check_usable()
        request = self.ledger.add(codec.edit_message(edit))
        self._send(request)
        return request.seq

    def cancel(self, through_seq: int | None) -> None:
        """Drop edits that have not been computed, up to ``through_seq``; None for all."""
        self._check_usable()
        self._send(self.ledger.cancel(through_seq))

    def finish(self) -> None:
        """End the session once everything is answered."""
        if not self._finishing:
            self._finishing = True
            self._send(refine_pb2.RefineRequest(finish=refine_pb2.Finish()))

    def detach(self) -> None:
        """Leave the session to be resumed; the driver half-closes the stream if there is one."""
        self._detaching = True
        if not self._connected:
            self.ended = True

    # What one waits for: None means not yet

    def opened(self) -> ImageInfo | None:
        """Return the image once the session is open."""
        if self.image is None:
            self._raise_if_ended()
        return self.image

    def outcome(self, seq: int) -> RefineResult | None:
        """Return the newest result of an edit's object once it reflects the edit.

        Raises:
            EditRejectedError: If the edit was rejected.
            SegmentationError: If the session ended before.
            ValueError: If no edit has that number.
        """
        result = self.ledger.outcome(seq)
        if result is None:
            self._raise_if_ended()
        return result

    def unread_result(self) -> tuple[RefineResult] | tuple[()] | None:
        """Return the oldest result that was not taken yet; an empty tuple after the last."""
        result = self.ledger.take_unread()
        if result is not None:
            return (result,)
        return () if self.finished() else None

    def finished(self) -> bool | None:
        """Return True once the session has ended as was asked."""
        if self._failure is not None:
            self._raise_if_ended()
        return self.ended or None

    # Within

    def _send(self, request: refine_pb2.RefineRequest) -> None:
        if self._open:  # otherwise `_opened` sends it
            self._messages.append(request)

    def _check_usable(self) -> None:
        self._raise_if_ended()
        if self._finishing or self._detaching:
            raise SessionClosedError
        if self.image is None:
            raise SessionClosedError("the session is not open: use it in a with statement")

    def _raise_if_ended(self) -> None:
        if self.ended:
            self.failure_told = True
            raise self._failure or SessionClosedError()

    def _opened(self, opened: refine_pb2.SessionOpened, applied_seq: int) -> None:
        self._open = True
        self.image = image_info(opened.image)
        self.session_id, self.resume_token = opened.session_id, opened.resume_token
        self.model = opened.model
        self.expire_time = opened.expire_time.ToDatetime(UTC)
        self.draining = None
        if isinstance(self._source, NewSession):
            self._source.arrived()
        self._messages.extend(self.ledger.begin_stream(applied_seq, opened.last_seq))
        if self._finishing:
            self._messages.append(refine_pb2.RefineRequest(finish=refine_pb2.Finish()))

    def _is_orderly(self, error: SegmentationError | None) -> bool:
        if self._detaching:
            return True
        if not self._finishing:
            return False
        # Unknown after the stream broke, with nothing left to answer: the first stream's `finish` had arrived.
        return error is None or (error.reason == "SESSION_NOT_FOUND" and self.ledger.all_answered)

    def _may_come_back(self, error: SegmentationError | None, was_open: bool) -> bool:
        if self.image is None or isinstance(error, SessionClosedError):
            return False  # while opening, the caller decides
        if error is None or error.code is grpc.StatusCode.UNAVAILABLE or error.reason == "OVERLOADED":
            return True
        if error.code is grpc.StatusCode.UNAUTHENTICATED:
            return was_open  # the key was withdrawn; the next stream asks for a token again
        return error.code is grpc.StatusCode.UNKNOWN and not error.reason
