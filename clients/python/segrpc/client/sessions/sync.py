"""The blocking driver of sessions: a thread reads the stream."""

import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from segrpc.client.errors import DeadlineExceededError, SegmentationError, SessionClosedError, error_from, no_answer
from segrpc.client.sessions.methods import DETACH_SECONDS, BaseSession
from segrpc.client.sessions.state import SessionState
from segrpc.client.sessions.types import RefineResult
from segrpc.client.types import ImageInfo
from segrpc.v1.refine_pb2 import RefineRequest

T = TypeVar("T")


class RefineSession(BaseSession[RefineResult]):
    """An interactive session; see `BaseSession` for the edits. Safe to use from several threads.

    Use it in a ``with`` statement: it opens the session and finishes it at the end, and after an exception leaves it on
    the server to be resumed. Iterating yields results as they arrive, until the session ends: under ``latest_wins`` the
    newest of each object, under ``every_edit`` each one (of those that nobody takes, the last 1000 are kept).

    Args:
        method: Opens a stream, given the requests.
        state: The session.
        timeout: Seconds to wait for an answer; None waits for ever.
    """

    def __init__(self, method: Callable[..., Any], state: SessionState, timeout: float | None) -> None:
        self._changed = threading.Condition()
        super().__init__(state, self._changed)
        self._method = method
        self._timeout = timeout
        self._requests: SimpleQueue[RefineRequest | None] = SimpleQueue()
        self._call: Any = None
        self._thread = threading.Thread(target=self._run, name="segrpc-refine", daemon=True)

    def open(self, timeout: float | None = None) -> ImageInfo:
        """Open the session and return its image; a ``with`` statement does this.

        Raises:
            SegmentationError: If it could not be opened: `OverloadedError` if the server has no room for it.
        """
        self._thread.start()
        try:
            return self._until(self._state.opened, timeout)
        except BaseException:
            self._close()
            raise

    def wait(self, seq: int, timeout: float | None = None) -> RefineResult:
        """Wait for the result that reflects an edit, given the number that `send` returned."""
        return self._until(lambda: self._state.outcome(seq), timeout)

    def __iter__(self) -> Iterator[RefineResult]:
        while taken := self._until(self._state.unread_result, for_ever=True):
            yield taken[0]

    def finish(self, timeout: float | None = None) -> None:
        """End the session, after what was sent before is answered; the server forgets it."""
        with self._changed:
            self._state.finish()
            self._flush()
        try:
            self._until(self._state.finished, timeout)
        finally:
            self._close()

    def detach(self) -> None:
        """Close the stream and leave the session on the server, to be taken up with `resume`."""
        with self._changed:
            self._state.detach()
            self._requests.put(None)
            self._changed.notify_all()
        try:
            self._until(self._state.finished, DETACH_SECONDS)
        except DeadlineExceededError:
            pass  # a server that does not answer: cut it off
        finally:
            self._close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None and not self._state.failure_told:
                self.finish()
            elif not self._state.ended:
                self.detach()
        except SegmentationError:
            if error is None:  # otherwise the error that is on its way matters more
                raise
        finally:
            self._close()

    def _post(self, message: RefineRequest) -> None:
        self._requests.put(message)

    def _until(self, look: Callable[[], T | None], timeout: float | None = None, *, for_ever: bool = False) -> T:
        """Wait until ``look`` finds something."""
        seconds = None if for_ever else self._timeout if timeout is None else timeout
        deadline = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            while (found := look()) is None:
                remaining = None if deadline is None else deadline - time.monotonic()
                if seconds is not None and remaining is not None and remaining <= 0:
                    raise no_answer(seconds)
                self._changed.wait(remaining)
            return found

    def _close(self) -> None:
        """End the stream and the thread; does nothing the second time."""
        with self._changed:
            self._state.fail(SessionClosedError())
            self._requests.put(None)
            if self._call is not None:
                self._call.cancel()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # The thread

    def _run(self) -> None:
        try:
            while (delay := self._stream()) is not None:
                with self._changed:
                    self._changed.wait_for(lambda: self._state.ended, delay)
        finally:
            with self._changed:
                self._state.fail(SessionClosedError("the session stopped because of an error in the client"))
                self._changed.notify_all()

    def _stream(self) -> float | None:
        """Run one stream to its end; return the seconds to wait before the next, or None for the end."""
        requests: SimpleQueue[RefineRequest | None] = SimpleQueue()
        failure: SegmentationError | None = None
        try:
            with self._changed:
                if self._state.ended:
                    return None
                self._requests = requests
                opening = self._state.opening(time.monotonic())
            # Without the lock: it may have to get a token first.
            call = self._method(chain(opening, iter(requests.get, None)))
            with self._changed:
                self._call = call
                if self._state.ended:
                    call.cancel()
            for response in self._call:
                with self._changed:
                    self._state.received(response)
                    self._flush()
                    self._changed.notify_all()
        except grpc.RpcError as error:
            failure = error_from(error)
            failure.__cause__ = error
        except SegmentationError as error:  # no token
            failure = error
        except ValueError as error:  # what grpc raises when the client was closed
            failure = SessionClosedError(str(error))
        finally:
            requests.put(None)  # ends the thread of grpc that sends them
        with self._changed:
            delay = self._state.lost(failure, time.monotonic())
            self._changed.notify_all()
            return delay
