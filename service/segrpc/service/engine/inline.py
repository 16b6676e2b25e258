"""An engine in the server's own process."""

import asyncio
from typing import Any

from segrpc.service.engine.base import CancelToken, EngineOptions, ServedModel
from segrpc.service.engine.dispatch import Dispatcher
from segrpc.service.engine.local import LocalCore
from segrpc.service.engine.work import Holdings, Order


class InlineBackend:
    """The models of one device in threads of this process. See `Backend` for the methods.

    Args:
        options: Which models, and what they may take.
        device: See `LocalCore`.
    """

    def __init__(self, options: EngineOptions, device: str) -> None:
        self._options = options
        self._device = device
        self._core: LocalCore | None = None

    async def start(self) -> tuple[ServedModel, ...]:
        """Load the models."""
        # Making them may already import packages that take seconds.
        core = await asyncio.to_thread(LocalCore, self._options, self._device)
        models = await asyncio.to_thread(core.start)
        self._core = core
        return models

    async def stop(self) -> None:
        """Unload the models."""
        core, self._core = self._core, None
        if core is not None:
            await asyncio.to_thread(core.stop)

    async def run(self, work: Order, token: CancelToken) -> Any:
        """Do a work."""
        return await asyncio.wrap_future(self._running().submit(work, token))

    def release(self, model: str, digest: str) -> None:
        """Let an embedding go."""
        if self._core is not None:
            self._core.release(model, digest)

    def holdings(self) -> Holdings:
        """Report what the cache holds."""
        return self._core.holdings() if self._core is not None else Holdings()

    restarts = 0
    pid = None
    trouble = ""

    def _running(self) -> LocalCore:
        if self._core is None:
            raise RuntimeError("the engine is not started")
        return self._core


class InlineEngine(Dispatcher):
    """An `Engine` that runs the models in threads of this process: for tests and notebooks.

    Args:
        options: What to run.
    """

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options, [InlineBackend(options, device) for device in options.devices or ("",)])
