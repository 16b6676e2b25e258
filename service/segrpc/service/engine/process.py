"""An engine whose models run in worker processes, one for each device; a worker that ends is started again."""

import asyncio
import logging
import time
from typing import Any

from segrpc.service.engine.base import CancelToken, EngineOptions, ServedModel
from segrpc.service.engine.child import Child
from segrpc.service.engine.dispatch import RETRY_AFTER, Dispatcher
from segrpc.service.engine.waiting import until
from segrpc.service.engine.work import Holdings, Work, WorkerLost
from segrpc.service.errors import ModelLoadError, SegrpcError, WorkerUnavailableError

log = logging.getLogger("segrpc.engine")

WAIT_SECONDS = 60.0  # how long a job waits for a worker at most
FIRST_DELAY, LAST_DELAY = 0.25, 10.0  # seconds before another start; it doubles from start to start
STEADY_SECONDS = 10.0  # a worker that lived so long served well: the next start is at once again


class ProcessBackend:
    """The models of one device in a process. See `Backend` for the methods.

    Args:
        options: Which models, and what they may take.
        device: See `LocalCore`.
    """

    def __init__(self, options: EngineOptions, device: str) -> None:
        self._options = options
        self._device = device
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
            raise ModelLoadError(f"{error}; is there enough memory?") from error
        self._child = asyncio.get_running_loop().create_future()
        self._up(child)
        return child.models

    async def stop(self) -> None:
        """End the process."""
        current, self._child = self._child, None
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.wait({self._restarting})
        if current is not None and current.done():
            await current.result().stop()

    async def run(self, work: Work, token: CancelToken) -> Any:
        """Do a work; waits for a worker if there is none.

        Raises:
            WorkerUnavailableError: If none could be started for a minute.
        """
        if self._child is None:
            raise RuntimeError("the engine is not started")
        child = self._ready() or await self._next(self._child, token)
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

    async def _next(self, coming: "asyncio.Future[Child]", token: CancelToken) -> Child:
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                return await until(coming, token)
        except TimeoutError:
            raise WorkerUnavailableError(
                f"no worker process could be started for {WAIT_SECONDS:g} s; the server's log says why", RETRY_AFTER
            ) from None

    def _ready(self) -> Child | None:
        return self._child.result() if self._child is not None and self._child.done() else None

    def _up(self, child: Child) -> None:
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
        if time.monotonic() - self._started >= STEADY_SECONDS:
            self._delay = 0.0
        self._restarting = asyncio.create_task(self._restart(dead))

    async def _restart(self, dead: Child) -> None:
        status = await dead.kill()
        log.error("worker %d ended with status %d; another one is started", dead.pid, status)
        while True:
            await asyncio.sleep(self._delay)
            self._delay = min(max(2 * self._delay, FIRST_DELAY), LAST_DELAY)
            try:
                child = await Child.start(self._options, self._device, self._lost)
            except (SegrpcError, WorkerLost, OSError) as error:
                log.error("a worker cannot be started, next try in %g s: %s", self._delay, error)
            else:
                break
        log.info("worker %d is ready", child.pid)
        self._restarts += 1
        self._up(child)


class ProcessEngine(Dispatcher):
    """An `Engine` that runs the models in worker processes.

    Args:
        options: What to run.
    """

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options, [ProcessBackend(options, device) for device in options.devices or ("",)])
