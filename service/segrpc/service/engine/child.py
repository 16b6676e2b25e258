"""One life of a worker process, seen from the front."""

import asyncio
import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Self

from segrpc.service.engine.base import CancelToken, EngineOptions, SegmentResult, ServedModel
from segrpc.service.engine.messages import DUMP_SIGNAL, Answer, Call, Cancel, Failed, Ready, Release, Start, Stop
from segrpc.service.engine.watchdog import LOOKS, Watchdog
from segrpc.service.engine.wire import Connection
from segrpc.service.engine.work import DecodeWork, EncodeWork, Holdings, Order, PredictWork, WorkerLost, lane_of

log = logging.getLogger("segrpc.engine")

STOP_SECONDS = 10.0  # for unloading the models; then the process is killed
LOAD_SECONDS = 600.0  # for loading the models, at least: disks may be far away
DUMP_SECONDS = 1.0  # for writing down where its threads are, before a process that is stuck is killed
# For the system to end a process that is killed: it frees its memory first. One that waits in a driver may never end.
KILL_SECONDS = 15.0

# What the operator's environment may override. Threads that wait for each other must not spin: the other lane needs the
# processor (docs/adr/0006-worker.md).
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}

# -P: no code is imported from the folder that the server happens to be started in.
_COMMAND = (sys.executable, "-P", "-m", "segrpc.service.engine.worker")


class Link:
    """A connection with a thread for each direction, so that neither pickling nor copying happens on the event loop.

    Args:
        connection: The front's end.
        name: Of the threads.
        received: Gets each message, on the loop.
        ended: Called once, on the loop, when the other end is closed.
    """

    def __init__(
        self, connection: Connection, name: str, received: Callable[[Any], None], ended: Callable[[], None]
    ) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._received, self._ended = received, ended
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self._threads = [
            threading.Thread(target=target, name=f"{name}-{direction}", daemon=True)
            for direction, target in (("send", self._send), ("receive", self._receive))
        ]
        for thread in self._threads:
            thread.start()

    def send(self, message: Any) -> None:
        """Send a message; never blocks."""
        self._outbox.put(message)

    def shut(self) -> None:
        """End the connection, as if the other end were closed; never blocks."""
        self._connection.shut()

    def close(self) -> None:
        """End the threads and free the connection; blocks for a moment."""
        self.shut()
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()
        self._connection.close()

    def _send(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._connection.send(message)
            except OSError:
                return  # the process has ended: the other thread tells

    def _receive(self) -> None:
        try:
            while True:
                self._tell(self._received, self._connection.receive())
        except EOFError:
            pass
        except Exception:
            log.exception("a worker's message cannot be read")
            self._connection.shut()  # which ends the worker
        self._tell(self._ended)

    def _tell(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            return  # the loop is closed: nobody listens


class Child:
    """A worker process. Made by `start`; used on the event loop, which it never blocks.

    Attributes:
        models: What it serves.
        holdings: What its cache held when it last answered.
        answered: Whether it ever answered a prompt, with masks.
    """

    models: tuple[ServedModel, ...]

    def __init__(self, process: "subprocess.Popen[bytes]", ends: list[socket.socket], lost: Callable[[], None]) -> None:
        self.holdings = Holdings()
        self.answered = False
        self._process = process
        self._lost = lost
        self._first: asyncio.Future[Ready | Failed] = asyncio.get_running_loop().create_future()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._open_links = 2
        self._watchdog = Watchdog()
        self._look_next: asyncio.TimerHandle | None = None
        # Large messages use a link of their own, so that small ones never wait behind them.
        self._quick, self._bulk = (
            Link(Connection(end), f"worker-{process.pid}-{name}", self._received, self._end)
            for name, end in zip(("quick", "bulk"), ends, strict=True)
        )

    @classmethod
    async def start(cls, options: EngineOptions, device: str, lost: Callable[[], None]) -> Self:
        """Start a process and have it load the models.

        Args:
            options: Which models, and what they may take.
            device: See `Core`.
            lost: Called when the process ends by itself after it was ready, before its calls fail.

        Raises:
            ModelLoadError: If a model cannot be loaded.
            WorkerLost: If the process ended before it was ready.
        """
        pairs = [socket.socketpair() for _ in range(2)]
        try:
            process = await asyncio.to_thread(_spawn, [theirs.fileno() for _, theirs in pairs])
        except BaseException:
            for ours, _ in pairs:
                ours.close()
            raise
        finally:
            for _, theirs in pairs:
                theirs.close()  # or its end of the file would never come
        child = cls(process, [ours for ours, _ in pairs], lost)
        try:
            child._quick.send(Start(options, device))
            first = await child._loaded(options.hang_seconds)
            if isinstance(first, Failed):
                raise first.error
        except WorkerLost:
            fate = await child.kill()
            text = f"a worker {fate} while it loaded the models; is there enough memory?"
            raise WorkerLost(text) from None
        except BaseException:
            await child.kill()
            raise
        child.models = first.models
        child._watch(options.hang_seconds)
        return child

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._open_links == 0

    async def run(self, work: Order, token: CancelToken) -> Any:
        """Have a work done; see `Backend.run`."""
        if self.ended:
            raise WorkerLost
        token.check()
        number = next(self._numbers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        lane = lane_of(type(work))
        self._watchdog.asked(lane)
        link = self._bulk if _is_large(work) else self._quick
        link.send(Call(number, work, token.remaining()))
        forget = token.on_cancel(lambda: link.send(Cancel(number)))
        try:
            return await answer
        finally:
            forget()
            self._calls.pop(number, None)
            self._watchdog.answered(lane)

    def release(self, model: str, digest: str) -> None:
        """Let an embedding go that an `EncodeWork` had kept."""
        self._quick.send(Release(model, digest))

    async def stop(self) -> None:
        """Have it unload the models and end; kill it if it does not."""
        self._lost = _nobody
        self._quick.send(Stop())
        try:
            await asyncio.to_thread(self._process.wait, STOP_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("worker %d did not end within %g s and is killed", self.pid, STOP_SECONDS)
        await self.kill()

    async def kill(self) -> str:
        """End it at once, if it has not ended, and free what it took here.

        Returns:
            How it ended, to go on after "worker N": its exit status, negative for the signal that ended it.
        """
        self._lost = _nobody
        self._unwatch()
        self._process.kill()
        return await asyncio.to_thread(self._close)

    def _close(self) -> str:
        try:
            fate = f"ended with status {self._process.wait(KILL_SECONDS)}"
        except subprocess.TimeoutExpired:
            fate = "cannot be ended"
            log.critical(
                "worker %d has not ended %g s after it was killed: it hangs in the system, perhaps in the driver of "
                "its device (see dmesg). What it holds of that and of memory may stay taken until the machine restarts",
                self.pid,
                KILL_SECONDS,
            )
        self._quick.close()
        self._bulk.close()
        return fate

    # A worker that is stuck

    async def _loaded(self, hang_seconds: float) -> Ready | Failed:
        """Wait until it has loaded the models, or says that it cannot; end it if it takes too long."""
        timeout = max(hang_seconds, LOAD_SECONDS) if hang_seconds else None
        done, _ = await asyncio.wait({self._first}, timeout=timeout)
        if not done:
            log.error("worker %d has not loaded its models within %g s (hang_seconds)", self.pid, timeout)
            self._end_stuck()
        return await self._first

    def _watch(self, hang_seconds: float) -> None:
        """Look from now on whether it answers; end it if not."""
        if hang_seconds:
            self._look_next = asyncio.get_running_loop().call_later(hang_seconds / LOOKS, self._look, hang_seconds)

    def _look(self, hang_seconds: float) -> None:
        stuck = self._watchdog.look()
        if stuck is None:
            self._watch(hang_seconds)
            return
        log.error(
            "worker %d owes answers, and its thread %r has given none for %g s (hang_seconds)",
            self.pid,
            stuck,
            hang_seconds,
        )
        self._end_stuck()

    def _end_stuck(self) -> None:
        log.error("worker %d is ended; this is where its threads are:", self.pid)
        self._process.send_signal(DUMP_SIGNAL)
        self._look_next = asyncio.get_running_loop().call_later(DUMP_SECONDS, self._abandon)

    def _abandon(self) -> None:
        """Kill it and take it for gone: its calls must not wait for a process that hangs in a driver and never ends."""
        self._process.kill()
        self._quick.shut()
        self._bulk.shut()

    def _unwatch(self) -> None:
        if self._look_next is not None:
            self._look_next.cancel()
            self._look_next = None

    def _received(self, message: Any) -> None:
        if isinstance(message, Answer):
            self.holdings = message.holdings
            self.answered = self.answered or isinstance(message.outcome, SegmentResult)
            waiting = self._calls.get(message.number)
            if waiting is None or waiting.done():
                return
            if isinstance(message.outcome, Exception):
                waiting.set_exception(message.outcome)
            else:
                waiting.set_result(message.outcome)
        elif not self._first.done():
            self._first.set_result(message)

    def _end(self) -> None:
        """Tell everybody that the process is gone; called for each link, and true of the last.

        Only then has all been received that the process sent: one link may end before the other's last message is read.
        """
        self._open_links -= 1
        if self._open_links:
            return
        if not self._first.done():
            self._first.set_exception(WorkerLost())
            self._first.exception()  # looked at, so that asyncio does not report it when nobody waits any more
        else:
            self._lost()
        for waiting in self._calls.values():
            if not waiting.done():
                waiting.set_exception(WorkerLost())


def _spawn(sockets: list[int]) -> "subprocess.Popen[bytes]":
    # A new session: a signal to the server's process group must not end the worker before calls have ended.
    # Its standard output is the server's standard error: what models print must not mix with the server's own output.
    return subprocess.Popen(
        [*_COMMAND, *map(str, sockets)],
        pass_fds=sockets,
        stdin=subprocess.DEVNULL,
        stdout=2,
        start_new_session=True,
        env={**WORKER_ENVIRONMENT, **os.environ},
    )


def _is_large(work: Order) -> bool:
    """Whether a work or its result carries an image file or an embedding."""
    if isinstance(work, DecodeWork):
        return work.brings_embedding or work.input.return_image_embedding
    return isinstance(work, EncodeWork | PredictWork)


def _nobody() -> None:
    """Be told of an end that was wanted."""
