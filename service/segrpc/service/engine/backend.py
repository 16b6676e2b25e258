"""What does the work of one device, seen from the dispatcher."""

from typing import Any, Protocol

from segrpc.service.engine.base import CancelToken, ServedModel
from segrpc.service.engine.work import Holdings, Order


class Backend(Protocol):
    """The models of one device, wherever they run. Used on the event loop, which it never blocks."""

    async def start(self) -> tuple[ServedModel, ...]:
        """Load the models.

        Raises:
            ModelLoadError: If one cannot be loaded.
        """

    async def stop(self) -> None:
        """Unload the models; nothing is running any more."""

    async def run(self, work: Order, token: CancelToken) -> Any:
        """Do a work; returns its `Result` once the work has ended, also when its token is cancelled meanwhile.

        Raises:
            EmbeddingMissing: If the work needs an embedding that is not in the cache.
            WorkerLost: If the process that did it ended.
            SegrpcError: If the work is wrong or was stopped.
        """

    def release(self, model: str, digest: str) -> None:
        """Let an embedding go that an `EncodeWork` had kept."""

    def holdings(self) -> Holdings:
        """Report what the cache holds, as far as it is known here."""

    @property
    def restarts(self) -> int:
        """How often its process was started again."""

    @property
    def pid(self) -> int | None:
        """The process that it runs in; None if it is this one, or if none is running."""

    @property
    def trouble(self) -> str:
        """Why works are refused for the time being, for the operator; empty if they are not."""
