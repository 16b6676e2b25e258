"""An engine in the server's own process: each model has one thread."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from segrpc.service.engine.base import (
    CancelToken,
    EncodeJob,
    EncodeResult,
    EngineStats,
    SegmentJob,
    SegmentResult,
    ServedModel,
)
from segrpc.service.engine.cache import EmbeddingCache
from segrpc.service.engine.core import ModelCore
from segrpc.service.errors import ModelNotFoundError, OverloadedError
from segrpc.service.images.decode import ImageLimits
from segrpc.service.models.base import SegmentationModel
from segrpc.service.models.registry import create_model
from segrpc.service.schemas import ModelDeploymentConfig

R = TypeVar("R", SegmentResult, EncodeResult)

RETRY_AFTER = 1.0  # seconds: about as long as an image takes to encode on a CPU


@dataclass(frozen=True, slots=True)
class _Lane:
    """A loaded model and the thread that it lives in."""

    served: ServedModel
    model: SegmentationModel
    core: ModelCore
    thread: ThreadPoolExecutor


class InlineEngine:
    """Runs each model in a thread of its own. See `Engine` for the methods.

    Because a model's jobs follow each other, two first requests for one image encode it once.

    Args:
        configs: The models; the first is the default.
        limits: What images must keep to.
        cache_bytes: The budget of the embeddings of all models.
        max_pending: How many jobs may run or wait; more are refused.
    """

    def __init__(
        self,
        configs: Sequence[ModelDeploymentConfig],
        limits: ImageLimits,
        cache_bytes: int,
        max_pending: int,
    ) -> None:
        self._configs = tuple(configs)
        self._limits = limits
        self._cache = EmbeddingCache(cache_bytes)
        self._max_pending = max_pending
        self._lanes: dict[str, _Lane] = {}
        self._pending = 0

    async def start(self) -> None:
        """Load the models, one after the other."""
        for config in self._configs:
            thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"model-{config.name}")
            loop = asyncio.get_running_loop()
            self._lanes[config.name] = await loop.run_in_executor(thread, self._load, config, thread)

    def _load(self, config: ModelDeploymentConfig, thread: ThreadPoolExecutor) -> _Lane:
        model = create_model(config)
        model.load_model()
        core = ModelCore(config.name, model, self._cache, self._limits)
        return _Lane(ServedModel(config.name, model.metadata), model, core, thread)

    async def stop(self) -> None:
        """Wait for the work in progress and unload the models."""
        loop = asyncio.get_running_loop()
        for lane in self._lanes.values():
            await loop.run_in_executor(lane.thread, lane.model.unload)
            lane.thread.shutdown()
        self._lanes.clear()
        self._cache.clear()

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """The models that are ready; the first is the default."""
        return tuple(lane.served for lane in self._lanes.values())

    async def segment(self, job: SegmentJob, token: CancelToken) -> SegmentResult:
        """Answer an input."""
        lane = self._lane(job.model)
        return await self._run(lane, partial(lane.core.segment, job, token), token)

    async def encode(self, job: EncodeJob, token: CancelToken) -> EncodeResult:
        """Encode an image and keep the embedding."""
        lane = self._lane(job.model)
        return await self._run(lane, partial(lane.core.encode, job, token), token)

    def stats(self) -> EngineStats:
        """Report what is held at the moment."""
        return EngineStats(self._pending, len(self._cache), self._cache.nbytes)

    def _lane(self, model: str) -> _Lane:
        lane = self._lanes.get(model)
        if lane is None:
            raise ModelNotFoundError(f"model {model!r} is not served; served are: {', '.join(self._lanes)}")
        return lane

    async def _run(self, lane: _Lane, work: Callable[[], R], token: CancelToken) -> R:
        if self._pending >= self._max_pending:
            raise OverloadedError(f"{self._pending} jobs are running or waiting already; try again", RETRY_AFTER)
        queued = time.perf_counter()

        def run() -> R:
            waited = time.perf_counter() - queued
            token.check()
            result = work()
            result.times.queue = waited
            return result

        # A job counts until its thread is done with it, also when nobody waits for it any more.
        self._pending += 1
        future = asyncio.get_running_loop().run_in_executor(lane.thread, run)
        future.add_done_callback(self._done)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            token.cancel()
            raise

    def _done(self, future: "asyncio.Future[R]") -> None:
        self._pending -= 1
        if not future.cancelled():
            future.exception()  # looked at, so that asyncio does not report it for a caller who left
