"""Counting what is in a backend's lanes."""

from typing import Any

from segrpc.service.engine.base import CancelToken, ServedModel
from segrpc.service.engine.sharing import Backend
from segrpc.service.engine.work import DecodeWork, Holdings, TouchWork, Work


class CountedBackend:
    """A `Backend` that counts the works that wait or run; see there for the methods.

    Args:
        backend: Does the work.

    Attributes:
        encoding: How many works are in the lane that encodes.
        decoding: How many are in the lane that decodes.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.encoding = self.decoding = 0

    async def start(self) -> tuple[ServedModel, ...]:
        """Load the models."""
        return await self._backend.start()

    async def stop(self) -> None:
        """Unload the models."""
        await self._backend.stop()

    async def run(self, work: Work, token: CancelToken) -> Any:
        """Do a work."""
        decodes = isinstance(work, DecodeWork | TouchWork)
        self.decoding += decodes
        self.encoding += not decodes
        try:
            return await self._backend.run(work, token)
        finally:
            self.decoding -= decodes
            self.encoding -= not decodes

    def release(self, model: str, digest: str) -> None:
        """Let an embedding go."""
        self._backend.release(model, digest)

    def holdings(self) -> Holdings:
        """Report what the cache holds."""
        return self._backend.holdings()

    @property
    def restarts(self) -> int:
        """How often its process was started again."""
        return self._backend.restarts

    @property
    def pid(self) -> int | None:
        """The process that it runs in."""
        return self._backend.pid

    @property
    def trouble(self) -> str:
        """Why works are refused."""
        return self._backend.trouble
