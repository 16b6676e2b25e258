"""An engine whose models run in worker processes, one for each device; a worker that ends is started again."""

import asyncio
import logging
import time
from typing import Any

from segrpc.service.engine.base import CancelToken, EngineOptions, ServedModel
from segrpc.service.engine.child import Child
from segrpc.service.engine.dispatch import Dispatcher
from segrpc.service.engine.pacing import RETRY_AFTER
from segrpc.service.engine.waiting import until
from segrpc.service.engine.warm_up import warm_up
from segrpc.service.engine.work import Holdings, Order, WorkerLost
from segrpc.service.errors import ModelLoadError, SegrpcError, WorkerUnavailableError

log = logging.getLogger("segrpc.engine")

GRACE_SECONDS = 30.0  # without a worker: that long jobs wait for it, and the device counts as served
BARREN_LIVES = 5  # of workers in a row that answered nothing: more than one bad edit of a client costs
FIRST_DELAY, LAST_DELAY = 0.25, 10.0  # seconds before another start; it doubles from start to start
STEADY_SECONDS = 10.0  # a worker that lived so long served well: the next start is at once again


class ProcessBackend:
    """The models of one device in a process. See `Backend` for the methods.

    Args:
        options: Which models, and what they may take.
        device: See `LocalCore`.
        changed: Set when `trouble` has changed.
    """

    def __init__(self, options: EngineOptions, device: str, changed: asyncio.Event) -> None:
        self._options = options
        self._device = device
        self._changed = changed
        self._trouble = ""
        self._barren_lives = 0
        self._alarm: asyncio.TimerHandle | None = None  # set while none is ready
        self._child: asyncio.Future[Child] | None = None  # not done while none is ready
        self._started = 0.0
        self._delay = 0.0
        self._restarts = 0
        self._restarting: asyncio.Task[None] | None = None

    async def start(self) -> tuple[ServedModel, ...]:
        """Start the first process."""
        try:
            child = await Child.start(self._options, self._device, self._lost)
        except WorkerLost as error:
            raise ModelLoadError(str(error)) from error
        self._child = asyncio.get_running_loop().create_future()
        self._up(child)
        return child.models

    async def stop(self) -> None:
        """End the process."""
        current, self._child = self._child, None
        self._disarm()
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.wait({self._restarting})
        if current is not None and current.done():
            await current.result().stop()

    async def run(self, work: Order, token: CancelToken) -> Any:
        """Do a work; waits for a worker if there is none.

        Raises:
            WorkerUnavailableError: If there is trouble with starting one, at once, or if it comes to that.
        """
        if self._child is None:
            raise RuntimeError("the engine is not started")
        if self._trouble:
            raise self._unavailable()
        child = self._ready()
        if child is None:
            child = await until(self._child, token)
        return await child.run(work, token)

    def release(self, model: str, digest: str) -> None:
        """Let an embedding go; it is gone with a worker that ended."""
        child = self._ready()
        if child is not None:
            child.release(model, digest)

    def holdings(self) -> Holdings:
        """Report what the cache held when the worker last answered."""
        child = self._ready()
        return child.holdings if child is not None else Holdings()

    @property
    def restarts(self) -> int:
        """How often the process was started again."""
        return self._restarts

    @property
    def pid(self) -> int | None:
        """The process, or None while there is none."""
        child = self._ready()
        return child.pid if child is not None else None

    @property
    def trouble(self) -> str:
        """Why the device is not served, or nothing."""
        return self._trouble

    def _ready(self) -> Child | None:
        return self._child.result() if self._child is not None and self._child.done() else None

    def _up(self, child: Child) -> None:
        self._disarm()
        if self._trouble:
            self._trouble, self._barren_lives = "", 0
            self._changed.set()
            log.warning("worker %d answers: the device is served again", child.pid)
        self._started = time.monotonic()
        if self._child is not None:
            self._child.set_result(child)
        if child.ended:  # before anyone could be told
            self._lost()

    def _lost(self) -> None:
        """Start another process. Jobs that come from now on, or are tried again, wait for it."""
        dead = self._ready()
        if dead is None:
            return
        self._child = asyncio.get_running_loop().create_future()
        self._alarm = asyncio.get_running_loop().call_later(
            GRACE_SECONDS, self._give_up, f"no worker process could be started for {GRACE_SECONDS:g} s"
        )
        steady = time.monotonic() - self._started >= STEADY_SECONDS
        if steady:
            self._delay = 0.0
        if steady or dead.answered:
            self._barren_lives = 0
        else:
            self._count_barren_life()
        self._restarting = asyncio.create_task(self._restart(dead))

    async def _restart(self, dead: Child) -> None:
        fate = await dead.kill()
        log.error("worker %d %s; another one is started", dead.pid, fate)
        while True:
            await asyncio.sleep(self._delay)
            self._delay = min(max(2 * self._delay, FIRST_DELAY), LAST_DELAY)
            try:
                child = await self._next()
            except (SegrpcError, WorkerLost, OSError) as error:
                log.error("a worker cannot be started, next try in %g s: %s", self._delay, error)
                self._count_barren_life()
            else:
                break
        log.info("worker %d is ready", child.pid)
        self._restarts += 1
        self._up(child)

    async def _next(self) -> Child:
        """Start a process. While jobs wait for it, the first of them shows what it can do; if none may, a warm-up."""
        child = await Child.start(self._options, self._device, self._lost)
        if self._trouble:
            try:
                await warm_up(child, child.models)
            except BaseException:
                await child.kill()
                raise
        return child

    # Trouble

    def _count_barren_life(self) -> None:
        self._barren_lives += 1
        if self._barren_lives >= BARREN_LIVES:
            self._give_up(f"{self._barren_lives} worker processes in a row ended before they answered anything")

    def _give_up(self, trouble: str) -> None:
        """Refuse jobs, those that wait included, until a worker has answered a warm-up."""
        if self._trouble or self._child is None:
            return
        self._trouble = trouble
        self._changed.set()
        log.critical(
            "%s%s: calls are refused, and health is NOT_SERVING, until a worker answers. See the lines around this one "
            "for why workers end, and whether there is memory for them; they are tried again, every %g s at the latest",
            f"device {self._device}: " if self._device else "",
            trouble,
            LAST_DELAY,
        )
        waited_for, self._child = self._child, asyncio.get_running_loop().create_future()
        waited_for.set_exception(self._unavailable())
        waited_for.exception()  # looked at, so that asyncio does not report it when nobody waits

    def _unavailable(self) -> WorkerUnavailableError:
        return WorkerUnavailableError(f"{self._trouble}; the server's log says why", RETRY_AFTER)

    def _disarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None


class ProcessEngine(Dispatcher):
    """An `Engine` that runs the models in worker processes.

    Args:
        options: What to run.
    """

    def __init__(self, options: EngineOptions) -> None:
        changed = asyncio.Event()
        backends = [ProcessBackend(options, device, changed) for device in options.devices or ("",)]
        super().__init__(options, backends, changed)
