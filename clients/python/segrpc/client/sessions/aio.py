"""The asyncio driver of sessions: a task reads the stream."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import nullcontext, suppress
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


class AsyncRefineSession(BaseSession[Coroutine[Any, Any, RefineResult]]):
    """`RefineSession` for asyncio: ``async with``, ``async for``, and the edits are awaited; `send` is not."""

    def __init__(self, method: Callable[..., Any], state: SessionState, timeout: float | None) -> None:
        super().__init__(state, nullcontext())
        self._method = method
        self._timeout = timeout
        self._requests: asyncio.Queue[RefineRequest | None] = asyncio.Queue()
        self._call: Any = None
        self._changed = asyncio.Event()  # a new one for each change
        self._task: asyncio.Task[None] | None = None

    async def open(self, timeout: float | None = None) -> ImageInfo:  # noqa: ASYNC109
        """See `RefineSession.open`."""
        self._task = asyncio.create_task(self._run(), name="segrpc-refine")
        try:
            return await self._until(self._state.opened, timeout)
        except BaseException:
            await self._close()
            raise

    async def wait(self, seq: int, timeout: float | None = None) -> RefineResult:  # noqa: ASYNC109
        """See `RefineSession.wait`."""
        return await self._until(lambda: self._state.outcome(seq), timeout)

    async def __aiter__(self) -> AsyncIterator[RefineResult]:
        while taken := await self._until(self._state.unread_result, for_ever=True):
            yield taken[0]

    async def finish(self, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """See `RefineSession.finish`."""
        self._state.finish()
        self._flush()
        try:
            await self._until(self._state.finished, timeout)
        finally:
            await self._close()

    async def detach(self) -> None:
        """See `RefineSession.detach`."""
        self._state.detach()
        self._requests.put_nowait(None)
        self._notify()
        try:
            await self._until(self._state.finished, DETACH_SECONDS)
        except DeadlineExceededError:
            pass  # a server that does not answer: cut it off
        finally:
            await self._close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None and not self._state.failure_told:
                await self.finish()
            elif not self._state.ended:
                await self.detach()
        except SegmentationError:
            if error is None:  # otherwise the error that is on its way matters more
                raise
        finally:
            await self._close()

    def _post(self, message: RefineRequest) -> None:
        self._requests.put_nowait(message)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(
        self,
        look: Callable[[], T | None],
        timeout: float | None = None,  # noqa: ASYNC109
        *,
        for_ever: bool = False,
    ) -> T:
        """Wait until ``look`` finds something."""
        seconds = None if for_ever else self._timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(seconds):
                while (found := look()) is None:
                    await self._changed.wait()
                return found
        except TimeoutError:
            raise no_answer(seconds or 0.0) from None

    async def _close(self) -> None:
        """End the stream and the task; does nothing the second time."""
        self._state.fail(SessionClosedError())
        self._requests.put_nowait(None)
        if self._call is not None:
            self._call.cancel()
        self._notify()
        if self._task is not None:
            await self._task

    # The task

    async def _run(self) -> None:
        try:
            while (delay := await self._stream()) is not None:
                with suppress(DeadlineExceededError):
                    await self._until(lambda: self._state.ended or None, delay)
        finally:
            self._state.fail(SessionClosedError("the session stopped because of an error in the client"))
            self._notify()

    async def _stream(self) -> float | None:
        """Run one stream to its end; return the seconds to wait before the next, or None for the end."""
        if self._state.ended:
            return None
        requests: asyncio.Queue[RefineRequest | None] = asyncio.Queue()
        self._requests = requests
        failure: SegmentationError | None = None
        try:
            self._call = await self._method(_requests(self._state.opening(time.monotonic()), requests))
            async for response in self._call:
                self._state.received(response)
                self._flush()
                self._notify()
        except grpc.RpcError as error:
            failure = error_from(error)
            failure.__cause__ = error
        except SegmentationError as error:  # no token
            failure = error
        except grpc.aio.UsageError as error:  # the client was closed
            failure = SessionClosedError(str(error))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            failure = SessionClosedError("the call was cancelled here")  # by `_close`, or because the client was closed
        finally:
            requests.put_nowait(None)  # grpc's task that reads them waits there still when the connection breaks
        delay = self._state.lost(failure, time.monotonic())
        self._notify()
        return delay


async def _requests(
    opening: Iterator[RefineRequest], queue: asyncio.Queue[RefineRequest | None]
) -> AsyncIterator[RefineRequest]:
    for message in opening:
        yield message
    while (message_or_end := await queue.get()) is not None:
        yield message_or_end
