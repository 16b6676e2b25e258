"""A core with its two lanes, in this process."""

from concurrent.futures import Future

from segrpc.service.engine.base import CancelToken, EngineOptions, ServedModel
from segrpc.service.engine.core import Core
from segrpc.service.engine.lanes import Lane
from segrpc.service.engine.work import Holdings, LaneName, Order, Result, lane_of

ENCODE_NICE = 10  # measured: docs/adr/0006-worker.md
MOST_TOGETHER = 16  # works that a model which batches gets at once: more take memory and gain little


class LocalCore:
    """Does works on the models of one device: decodes in one thread, encodes in another of lower priority.

    Args:
        options: Which models, and what they may take.
        device: See `Core`.
    """

    def __init__(self, options: EngineOptions, device: str = "") -> None:
        self._core = Core(options, device)
        self._lanes: dict[LaneName, Lane] = {}

    def start(self) -> tuple[ServedModel, ...]:
        """Load the models; blocks.

        Raises:
            ModelLoadError: If one cannot be loaded.
        """
        models = self._core.load()
        self._lanes = {
            "encode": Lane("encode", self._core.encode, nice=ENCODE_NICE),
            "decode": Lane("decode", self._core.decode, most=MOST_TOGETHER if self._core.batches else 1),
        }
        return models

    def stop(self) -> None:
        """Do what was submitted, end the threads and unload the models; blocks."""
        for lane in self._lanes.values():
            lane.close()
        self._lanes = {}
        self._core.unload()

    def submit(self, work: Order, token: CancelToken) -> "Future[Result]":
        """Put a work in its lane's queue.

        Raises:
            RuntimeError: If it is not started.
        """
        if not self._lanes:
            raise RuntimeError("the core is not started")
        return self._lanes[lane_of(type(work))].submit(work, token)

    def release(self, model: str, digest: str) -> None:
        """See `Core.release`."""
        self._core.release(model, digest)

    def holdings(self) -> Holdings:
        """See `Core.holdings`."""
        return self._core.holdings()
