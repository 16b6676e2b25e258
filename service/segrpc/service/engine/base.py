"""What runs models, seen from outside: jobs, results and the `Engine` protocol."""

import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

from segrpc.service.errors import DeadlineError
from segrpc.service.images.decode import ImageHeader
from segrpc.service.schemas import FloatType, ModelMetadata, NDArrayFloat, SegmentationInput, SegmentationOutput


class CancelToken:
    """Tells work in another thread that nobody waits for it any more. Checked between stages.

    Args:
        timeout: Seconds until the caller's deadline, or None if there is none.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ask the work to stop before its next stage."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise DeadlineError if the caller left or its deadline passed."""
        if self._cancelled.is_set():
            raise DeadlineError("the caller left before the work was done")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise DeadlineError("the deadline passed before the work was done")


@dataclass(slots=True)
class StageTimes:
    """Where the time of a job went, in seconds. Stages that did not run are 0.

    Attributes:
        queue: Waiting for the model.
        decode_image: From file to pixels.
        encode_image: From pixels to embedding.
        decode_mask: From embedding and prompts to logits.
        postprocess: From logits to masks.
        embedding_cached: Whether the embedding was at hand, from the cache or from the request.
    """

    queue: float = 0.0
    decode_image: float = 0.0
    encode_image: float = 0.0
    decode_mask: float = 0.0
    postprocess: float = 0.0
    embedding_cached: bool = False


@dataclass(frozen=True, slots=True)
class SegmentJob:
    """An input for a model.

    Attributes:
        model: The model's name.
        digest: The digest of the image.
        input: The input; ``image`` is the encoded file as bytes.
        tensor_dtype: The element type of returned tensors.
    """

    model: str
    digest: str
    input: SegmentationInput
    tensor_dtype: FloatType = "float32"


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
    """

    model: str
    digest: str
    image: bytes = field(repr=False)
    return_embedding: bool = False
    tensor_dtype: FloatType = "float32"


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
    """

    name: str
    metadata: ModelMetadata


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine holds at the moment.

    Attributes:
        pending: Jobs that run or wait.
        cached_embeddings: Embeddings in the cache.
        cached_bytes: Their size in bytes.
    """

    pending: int
    cached_embeddings: int
    cached_bytes: int


class Engine(Protocol):
    """Runs models for a server. Its methods are called on the event loop and never block it."""

    async def start(self) -> None:
        """Load the models.

        Raises:
            ModelLoadError: If one cannot be loaded.
        """

    async def stop(self) -> None:
        """Wait for the work in progress and unload the models."""

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """The models that are ready; the first is the default."""

    async def segment(self, job: SegmentJob, token: CancelToken) -> SegmentResult:
        """Answer an input.

        Raises:
            SegrpcError: Of the kind that says what was wrong: see `segrpc.service.errors`.
        """

    async def encode(self, job: EncodeJob, token: CancelToken) -> EncodeResult:
        """Encode an image and keep the embedding.

        Raises:
            SegrpcError: As `segment`.
        """

    def stats(self) -> EngineStats:
        """Report what is held at the moment."""
