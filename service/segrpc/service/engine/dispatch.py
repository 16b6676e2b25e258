"""The front's side of every engine: admission, one encoding for all who need it, another try when a worker is lost."""

import asyncio
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from segrpc.service.engine.backend import Backend
from segrpc.service.engine.base import (
    CancelToken,
    EncodeJob,
    EncodeResult,
    EngineOptions,
    EngineStats,
    Flushed,
    SegmentJob,
    SegmentResult,
    ServedModel,
    StageTimes,
)
from segrpc.service.engine.pacing import RETRY_AFTER, Device
from segrpc.service.engine.sharing import SharedEncode, SharedEncodes
from segrpc.service.engine.waiting import until
from segrpc.service.engine.warm_up import warm_up
from segrpc.service.engine.work import (
    DecodeWork,
    EmbeddingMissing,
    EncodedImage,
    EncodeWork,
    FlushWork,
    PredictWork,
    TouchWork,
    WorkerLost,
)
from segrpc.service.errors import (
    CapabilityMissingError,
    DrainingError,
    InvalidFieldError,
    ModelNotFoundError,
    OverloadedError,
    WorkerUnavailableError,
)
from segrpc.service.images.decode import ImageHeader, read_header
from segrpc.service.models.base import check_capabilities
from segrpc.service.schemas import SegmentationInput

R = TypeVar("R")

MAX_LOSSES = 2  # of the worker during one job: the job may be what ends it
MAX_ENCODES = 3  # of one image for one job: more than one is needed only when memory runs out or a worker is lost


class Dispatcher:
    """An `Engine` that has its work done by one or several backends. See `Engine` for the methods.

    Args:
        options: What to run; the limits of admission.
        backends: Where to run it. An image always goes to the same one, which its digest chooses.
        changed: Set by the backends when the trouble of one has changed. Default: it never does.
    """

    def __init__(
        self, options: EngineOptions, backends: Sequence[Backend], changed: asyncio.Event | None = None
    ) -> None:
        self._options = options
        self._devices = tuple(Device(backend, options) for backend in backends)
        self._cache_hits = self._cache_misses = 0
        self._changed = changed or asyncio.Event()
        self._models: dict[str, ServedModel] = {}
        self._encodes = SharedEncodes()
        self._jobs: set[asyncio.Task[Any]] = set()
        self._stopping = False

    @property
    def _backends(self) -> tuple[Backend, ...]:
        return tuple(device.backend for device in self._devices)

    async def start(self) -> None:
        """Load the models on all devices at once."""
        started = await asyncio.gather(*(backend.start() for backend in self._backends), return_exceptions=True)
        failed = [outcome for outcome in started if isinstance(outcome, BaseException)]
        if failed:
            await self._stop_backends()
            raise failed[0]
        self._models = {model.name: model for models in started[:1] if isinstance(models, tuple) for model in models}

    async def warm_up(self) -> None:
        """Have each model answer on all devices at once."""
        await asyncio.gather(*(warm_up(backend, self.models) for backend in self._backends))

    async def troubles(self) -> AsyncIterator[tuple[str, ...]]:
        """Tell what keeps devices from being served."""
        while True:
            self._changed.clear()
            yield tuple(backend.trouble for backend in self._backends if backend.trouble)
            await self._changed.wait()

    async def stop(self) -> None:
        """Wait for the work in progress and unload the models. New jobs are refused meanwhile."""
        self._stopping = True
        while self._jobs:
            await asyncio.wait(self._jobs)
        await self._stop_backends()
        self._models = {}

    async def _stop_backends(self) -> None:
        await asyncio.gather(*(backend.stop() for backend in self._backends))

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """The models that are ready; the first is the default."""
        return tuple(self._models.values())

    def stats(self) -> EngineStats:
        """Report what is held at the moment."""
        held = [backend.holdings() for backend in self._backends]
        return EngineStats(
            pending=len(self._jobs),
            cached_embeddings=sum(one.cached_embeddings for one in held),
            cached_bytes=sum(one.cached_bytes for one in held),
            host_embeddings=sum(one.host_embeddings for one in held),
            host_bytes=sum(one.host_bytes for one in held),
            encodes=self._encodes.count,
            encoding=sum(len(device.encodes) for device in self._devices),
            decoding=sum(len(device.decodes) for device in self._devices),
            cache_hits=self._cache_hits,
            cache_misses=self._cache_misses,
            device_memory=tuple(pair for one in held for pair in one.device_memory),
            worker_restarts=sum(backend.restarts for backend in self._backends),
            worker_pids=tuple(backend.pid for backend in self._backends if backend.pid is not None),
        )

    def check(self, model: str, owner: str, token: CancelToken) -> None:
        """Refuse a job at once that no device would take."""
        kind = (DecodeWork if self._served(model).promptable else PredictWork), model
        refusals: list[OverloadedError] = []
        for device in self._devices:
            try:
                return device.check(kind, owner, token)
            except OverloadedError as error:
                refusals.append(error)
        raise refusals[0]

    async def flush(self) -> Flushed:
        """Let embeddings go that nobody is about to use."""
        flushed = await asyncio.gather(*map(_flushed, self._backends))
        return Flushed(sum(one.count for one in flushed), sum(one.nbytes for one in flushed))

    async def segment(self, job: SegmentJob, token: CancelToken) -> SegmentResult:
        """Answer an input."""
        served = self._served(job.model)
        if not isinstance(job.input.image, bytes):
            raise TypeError("a job's image must be the encoded file as bytes")
        answer = self._prompt if served.promptable else self._predict
        return await self._start(lambda: _retried(lambda times: answer(served, job, token, times)), token)

    async def encode(self, job: EncodeJob, token: CancelToken) -> EncodeResult:
        """Encode an image and keep the embedding."""
        served = self._served(job.model)
        if not served.promptable:
            raise CapabilityMissingError(f"model {job.model!r} has no embeddings")
        return await self._start(lambda: _retried(lambda times: self._encode(served, job, token, times)), token)

    def _served(self, name: str) -> ServedModel:
        if self._stopping:
            raise DrainingError("the server is shutting down", RETRY_AFTER)
        served = self._models.get(name)
        if served is None:
            raise ModelNotFoundError(f"model {name!r} is not served; served are: {', '.join(self._models)}")
        return served

    def _device(self, digest: str) -> Device:
        return self._devices[zlib.crc32(digest.encode()) % len(self._devices)]

    async def _start(self, job: Callable[[], Coroutine[Any, Any, R]], token: CancelToken) -> R:
        """Start a job, and wait for it as long as the token allows.

        It counts until its work has ended, also when nobody waits for it any more.
        """
        task = asyncio.create_task(job())
        self._jobs.add(task)
        task.add_done_callback(self._done)
        try:
            return await until(task, token)
        finally:
            if not task.done():
                token.cancel()

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._jobs.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not report it for a caller who left

    async def _predict(
        self, served: ServedModel, job: SegmentJob, token: CancelToken, times: StageTimes
    ) -> SegmentResult:
        check_capabilities(job.input, served.metadata, job.model)
        image, header = await self._checked(job.input, job.header)
        work = PredictWork(job.model, _bare(job.input), image, header, job.owner)
        device = self._device(job.digest)
        result: SegmentResult = await device.run(device.admit(work, token), token)
        result.times.add(times)
        return result

    async def _prompt(
        self, served: ServedModel, job: SegmentJob, token: CancelToken, times: StageTimes
    ) -> SegmentResult:
        work = DecodeWork(job.model, job.digest, _bare(job.input), job.tensor_dtype, owner=job.owner)
        if work.brings_embedding:
            check_capabilities(job.input, served.metadata, job.model)
            _, header = await self._checked(job.input, job.header)
            work = replace(work, header=header)
        result: SegmentResult = await self._with_embedding(work, job.input, job.header, token, times)
        return result

    async def _encode(self, served: ServedModel, job: EncodeJob, token: CancelToken, times: StageTimes) -> EncodeResult:
        given = SegmentationInput(image=job.image, return_image_embedding=True)
        if not job.return_embedding:
            touch = TouchWork(job.model, job.digest, job.owner)
            touched: EncodedImage = await self._with_embedding(touch, given, None, token, times)
            return EncodeResult(None, [], touched.header, touched.times)
        work = DecodeWork(job.model, job.digest, _bare(given), job.tensor_dtype, owner=job.owner)
        result: SegmentResult = await self._with_embedding(work, given, None, token, times)
        output = result.output
        return EncodeResult(output.image_embedding, output.high_resolution_features or [], result.header, result.times)

    async def _with_embedding(
        self,
        work: DecodeWork | TouchWork,
        given: SegmentationInput,
        header: ImageHeader | None,
        token: CancelToken,
        times: StageTimes,
    ) -> Any:
        """Run a work; if its embedding is not at hand, have it made first. Only then does the image travel."""
        device = self._device(work.digest)
        start = time.perf_counter()
        # A look into the cache takes no time.
        place = device.enter(work) if isinstance(work, TouchWork) else device.admit(work, token)
        try:
            result = await device.run(place, token)
        except EmbeddingMissing:
            times.queue += time.perf_counter() - start
            self._cache_misses += 1
        else:
            self._cache_hits += not (isinstance(work, DecodeWork) and work.brings_embedding)
            result.times.add(times)
            result.times.embedding_cached = True
            return result
        image, _ = await self._checked(given, header)
        encode: SharedEncode | None = None
        for _ in range(MAX_ENCODES):
            to_encode = EncodeWork(work.model, work.digest, image, work.owner)
            async with self._encodes.use(device, to_encode, token, times, encode) as encode:
                try:
                    result = await device.run(device.enter(work), token)
                except EmbeddingMissing:
                    continue
            result.times.add(times)
            return result
        raise WorkerUnavailableError("the image's embedding was lost as often as it was made; try again", RETRY_AFTER)

    async def _checked(self, given: SegmentationInput, header: ImageHeader | None) -> tuple[bytes, ImageHeader]:
        """Read the image's size and check the prompts against it, before any costly stage."""
        assert isinstance(given.image, bytes)
        image = given.image

        def check() -> ImageHeader:
            found = header or read_header(image, self._options.limits)
            violations = tuple(given.violations_in(found.width, found.height))
            if violations:
                raise InvalidFieldError.of_all(violations)
            return found

        return image, await asyncio.to_thread(check)


async def _flushed(backend: Backend) -> Flushed:
    try:
        flushed: Flushed = await backend.run(FlushWork(), CancelToken())
    except (WorkerLost, WorkerUnavailableError):
        return Flushed()  # embeddings went with the worker
    return flushed


async def _retried(attempt: Callable[[StageTimes], Awaitable[R]]) -> R:
    """Make a job's attempt, and once more if the worker is lost. Lost time counts as waiting."""
    start = time.perf_counter()
    lost = 0.0
    for _ in range(MAX_LOSSES):
        try:
            return await attempt(StageTimes(queue=lost))
        except WorkerLost:
            lost = time.perf_counter() - start
    raise WorkerUnavailableError(
        f"the worker process ended {MAX_LOSSES} times while it worked on this; this may be what ends it", RETRY_AFTER
    )


def _bare(given: SegmentationInput) -> SegmentationInput:
    """Take the image out: it travels only if it must."""
    return given.model_copy(update={"image": None})
