"""What runs models, seen from outside: jobs, results and the `Engine` protocol."""

import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from segrpc.service.engine.logs import LogFormat
from segrpc.service.errors import DeadlineError
from segrpc.service.images.decode import DEFAULT_LIMITS, ImageHeader, ImageLimits
from segrpc.service.schemas import (
    FloatType,
    ModelDeploymentConfig,
    ModelMetadata,
    NDArrayFloat,
    SegmentationInput,
    SegmentationOutput,
)


class CancelToken:
    """Tells work elsewhere that nobody waits for it any more. Checked between stages; safe to use from any thread.

    Args:
        timeout: Seconds until the caller's deadline, or None if there is none.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._cancelled = False
        self._calls: list[Callable[[], object]] = []
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """Ask the work to stop before its next stage."""
        with self._lock:
            self._cancelled = True
            calls, self._calls = self._calls, []
        for call in calls:
            call()

    def check(self) -> None:
        """Raise DeadlineError if the caller left or its deadline passed."""
        if self._cancelled:
            raise DeadlineError("the caller left before the work was done")
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise DeadlineError("the deadline passed before the work was done")

    def remaining(self) -> float | None:
        """Return the seconds until the deadline, at least 0, or None if there is none."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def on_cancel(self, call: Callable[[], object]) -> Callable[[], None]:
        """Have something called when the token is cancelled, by the thread that cancels it; at once if it is already.

        Returns:
            What takes that back; may be called any number of times.
        """
        with self._lock:
            if not self._cancelled:
                self._calls.append(call)
                return lambda: self._forget(call)
        call()
        return lambda: None

    def _forget(self, call: Callable[[], object]) -> None:
        with self._lock, suppress(ValueError):
            self._calls.remove(call)


@dataclass(slots=True)
class StageTimes:
    """Where the time of a job went, in seconds. Stages that did not run are 0.

    Attributes:
        queue: Waiting: for the model, for its worker process to start, for somebody else's encoding of the same image.
        decode_image: From file to pixels.
        encode_image: From pixels to embedding.
        decode_mask: From embedding and prompts to logits.
        postprocess: From logits to masks.
        embedding_cached: Whether the embedding was at hand, from the cache or from the request. False for a job that
            waited for somebody else to encode its image; its ``encode_image`` is 0 all the same.
        batch: How many jobs were decoded together, this one included, and so share ``decode_mask``; 0 if none was.
    """

    queue: float = 0.0
    decode_image: float = 0.0
    encode_image: float = 0.0
    decode_mask: float = 0.0
    postprocess: float = 0.0
    embedding_cached: bool = False
    batch: int = 0

    def add(self, other: "StageTimes") -> None:
        """Add the times of another part of the same job; ``embedding_cached`` and ``batch`` stay."""
        self.queue += other.queue
        self.decode_image += other.decode_image
        self.encode_image += other.encode_image
        self.decode_mask += other.decode_mask
        self.postprocess += other.postprocess


@dataclass(frozen=True, slots=True)
class SegmentJob:
    """An input for a model.

    Attributes:
        model: The model's name.
        digest: The digest of the image.
        input: The input; ``image`` is the encoded file as bytes.
        tensor_dtype: The element type of returned tensors.
        header: The image's size and orientation if the caller knows it; otherwise it is read when it is needed.
        owner: Who asks: owners take turns, and none takes the places of all. Empty where callers are not identified.
    """

    model: str
    digest: str
    input: SegmentationInput
    tensor_dtype: FloatType = "float32"
    header: ImageHeader | None = None
    owner: str = ""


@dataclass(frozen=True, slots=True)
class SegmentResult:
    """A model's answer.

    Attributes:
        output: The masks and what else was asked for.
        header: The image's size and orientation.
        times: Where the time went.
    """

    output: SegmentationOutput
    header: ImageHeader
    times: StageTimes


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """An image to encode.

    Attributes:
        model: The model's name.
        digest: The digest of the image.
        image: The encoded file.
        return_embedding: Whether to return the embedding besides keeping it.
        tensor_dtype: The element type of returned tensors.
        owner: Who asks, as in `SegmentJob`.
    """

    model: str
    digest: str
    image: bytes = field(repr=False)
    return_embedding: bool = False
    tensor_dtype: FloatType = "float32"
    owner: str = ""


@dataclass(frozen=True, slots=True)
class EncodeResult:
    """An encoded image.

    Attributes:
        image_embedding: The embedding, if it was asked for.
        high_resolution_features: Its finer levels, if asked for; otherwise empty.
        header: The image's size and orientation.
        times: Where the time went.
    """

    image_embedding: NDArrayFloat | None
    high_resolution_features: list[NDArrayFloat]
    header: ImageHeader
    times: StageTimes


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that is ready.

    Attributes:
        name: The name that clients use.
        metadata: What it is and can do.
        promptable: Whether it is a `PromptableModel`, so that images are encoded once for many prompts.
    """

    name: str
    metadata: ModelMetadata
    promptable: bool = True


@dataclass(frozen=True, slots=True)
class Flushed:
    """What was let go.

    Attributes:
        count: How many things.
        nbytes: How many bytes they took.
        times: Where the time went.
    """

    count: int = 0
    nbytes: int = 0
    times: StageTimes = field(default_factory=StageTimes)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine holds at the moment, and what it did so far.

    Attributes:
        pending: Jobs that run or wait.
        cached_embeddings: Embeddings on the devices.
        cached_bytes: Their size in bytes.
        host_embeddings: Embeddings that were moved from the devices to the host's memory.
        host_bytes: Their size in bytes.
        encodes: Images encoded since the start.
        encoding: Works that run or wait in the lanes that encode; models without embeddings do all their work there.
        decoding: Works that run or wait in the lanes that decode.
        cache_hits: Jobs since the start whose embedding was in the cache.
        cache_misses: Jobs since the start whose embedding had to be made, by them or by another for the same image.
        device_memory: The memory that workers hold on devices that have their own: names such as ``cuda:0``, and bytes.
        worker_restarts: How often a worker process was started again.
        worker_pids: The worker processes that are running; empty if the models run in this process.
    """

    pending: int
    cached_embeddings: int
    cached_bytes: int
    host_embeddings: int = 0
    host_bytes: int = 0
    encodes: int = 0
    encoding: int = 0
    decoding: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    device_memory: tuple[tuple[str, int], ...] = ()
    worker_restarts: int = 0
    worker_pids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine runs, and how much of everything it may take.

    Attributes:
        models: The models; the first is the default. Each is loaded on every device.
        limits: What images must keep to.
        cache_bytes: The budget of the embeddings of all models on one device.
        host_cache_bytes: The budget of what had to leave one device for the host's memory.
        max_pending_encodes: How many images may be encoded or wait for it, on each device; more are refused. Models
            that have no separate encoding count here.
        max_pending_decodes: How many jobs may have prompts decoded or wait for it, on each device; more are refused.
        principal_share: The part of both that one owner may have, and of the embeddings when there is no room for all;
            above 0, at most 1.
        hang_seconds: After so long without an answer that it owes a worker process is ended, and another started; it
            may take ten minutes for loading the models even if this is less. 0: never.
        devices: Where to run, such as ``cuda:0``; each device gets its own share of the images. Empty: once, on the
            device that the models choose themselves.
        log_level: What worker processes log, as a level of `logging`.
        log_format: How they log.
    """

    models: tuple[ModelDeploymentConfig, ...]
    limits: ImageLimits = DEFAULT_LIMITS
    cache_bytes: int = 2 * 2**30
    host_cache_bytes: int = 4 * 2**30
    max_pending_encodes: int = 64
    max_pending_decodes: int = 64
    principal_share: float = 0.5
    hang_seconds: float = 600.0
    devices: tuple[str, ...] = ()
    log_level: str = "WARNING"
    log_format: LogFormat = "text"


class Engine(Protocol):
    """Runs models for a server. Its methods are called on the event loop and never block it."""

    async def start(self) -> None:
        """Load the models.

        Raises:
            ModelLoadError: If one cannot be loaded.
        """

    async def warm_up(self) -> None:
        """Have each model answer a first prompt on a small image, on every device.

        Raises:
            ModelLoadError: If one does not answer.
        """

    def troubles(self) -> AsyncIterator[tuple[str, ...]]:
        """Tell why devices are not served, now and after each change, to one listener; nothing if all are.

        Jobs on such a device are refused at once (`WorkerUnavailableError`), until a worker has answered a warm-up.
        """

    async def stop(self) -> None:
        """Wait for the work in progress and unload the models."""

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """The models that are ready; the first is the default."""

    def check(self, model: str, owner: str, token: CancelToken) -> None:
        """Look whether `segment` would be refused, before anybody does work for it.

        Args:
            model: The model's name.
            owner: Who asks.
            token: Says when the answer must be there.

        Raises:
            OverloadedError: If it would be on every device, because too many jobs wait or there is no time left.
            ModelNotFoundError: If the model is not served.
        """

    async def segment(self, job: SegmentJob, token: CancelToken) -> SegmentResult:
        """Answer an input.

        A caller that is cancelled, and a token that is cancelled or whose deadline passes, end the call at once and the
        work before its next stage.

        Raises:
            SegrpcError: Of the kind that says what was wrong: see `segrpc.service.errors`.
        """

    async def encode(self, job: EncodeJob, token: CancelToken) -> EncodeResult:
        """Encode an image and keep the embedding. Every promptable model can; not all can return it.

        Raises:
            SegrpcError: As `segment`.
        """

    async def flush(self) -> Flushed:
        """Let embeddings go, on the devices and in the host's memory, but those that jobs are about to use."""

    def stats(self) -> EngineStats:
        """Report what is held at the moment."""
