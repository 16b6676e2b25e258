"""What the front asks of a core, and what comes back: values that can travel to another process."""

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pickle import PickleBuffer
from typing import Any, Literal, TypeAlias

from segrpc.service.engine.base import CancelToken, Flushed, SegmentResult, StageTimes
from segrpc.service.images.decode import ImageHeader
from segrpc.service.schemas import FloatType, SegmentationInput


class EmbeddingMissing(Exception):  # noqa: N818 - not an error: an answer that the front acts upon
    """The embedding that a work needs is not in the cache: the image has to be encoded first."""


class WorkerLost(Exception):  # noqa: N818 - the front tries again before it becomes an error
    """The worker process ended before it answered."""


class WorkerBug(RuntimeError):  # noqa: N818
    """An exception that no code raises on purpose came up in a worker process. The message is its traceback."""


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """Prompts on an embedding that is in the cache or in the input; raises `EmbeddingMissing` if it is in neither.

    Attributes:
        model: The model's name.
        digest: The digest of the image.
        input: The input, without the image.
        tensor_dtype: The element type of returned tensors.
        header: The image's size and orientation; needed for an embedding in the input only.
        owner: Who asks: owners take turns. Empty for all that are not identified, and for the server itself.
    """

    model: str
    digest: str
    input: SegmentationInput
    tensor_dtype: FloatType
    header: ImageHeader | None = None
    owner: str = ""

    @property
    def brings_embedding(self) -> bool:
        """Whether the embedding is in the input."""
        return self.input.image_embedding is not None


@dataclass(frozen=True, slots=True)
class TouchWork:
    """Tell whether an embedding is in the cache, and count it as used; raises `EmbeddingMissing` if it is not."""

    model: str
    digest: str
    owner: str = ""


@dataclass(frozen=True, slots=True)
class EncodeWork:
    """Encode an image. Its embedding stays in the cache at least until a `Release` of it.

    Attributes:
        model: The model's name.
        digest: The digest of the image.
        image: The encoded file.
        owner: Who asks, and whose the embedding is.
    """

    model: str
    digest: str
    image: bytes
    owner: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        # The image travels beside the pickle and is not copied into it.
        return EncodeWork, (self.model, self.digest, PickleBuffer(self.image), self.owner)


@dataclass(frozen=True, slots=True)
class PredictWork:
    """An input for a model that has no separate encoding.

    Attributes:
        model: The model's name.
        input: The input, without the image.
        image: The encoded file.
        header: The image's size and orientation.
        owner: Who asks.
    """

    model: str
    input: SegmentationInput
    image: bytes
    header: ImageHeader
    owner: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        return PredictWork, (self.model, self.input, PickleBuffer(self.image), self.header, self.owner)


@dataclass(frozen=True, slots=True)
class FlushWork:
    """Let go of all embeddings that nobody is about to use. It is the server's own."""

    owner: str = ""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """The answer to `EncodeWork` and `TouchWork`.

    Attributes:
        header: The image's size and orientation.
        times: Where the time went.
    """

    header: ImageHeader
    times: StageTimes


@dataclass(frozen=True, slots=True)
class Holdings:
    """What the cache of a core holds; see `EngineStats`."""

    cached_embeddings: int = 0
    cached_bytes: int = 0
    host_embeddings: int = 0
    host_bytes: int = 0
    device_memory: tuple[tuple[str, int], ...] = ()


Work: TypeAlias = DecodeWork | TouchWork | EncodeWork | PredictWork
Order: TypeAlias = Work | FlushWork
Result: TypeAlias = SegmentResult | EncodedImage | Flushed
LaneName: TypeAlias = Literal["decode", "encode"]
Party: TypeAlias = tuple[str, bool]  # an owner, and whether it is about works of several turns


def lane_of(kind: type[Order]) -> LaneName:
    """Tell in which lane a kind of work is done: all of a model that has no separate encoding where images are."""
    return "encode" if issubclass(kind, EncodeWork | PredictWork) else "decode"


def prompts_of(work: Order) -> int:
    """Tell how many prompts a work has; 1 if it is about something else."""
    return max(1, work.input.num_prompts) if isinstance(work, DecodeWork | PredictWork) else 1


def turns_of(work: Order) -> int:
    """Tell how many turns a work needs: each prompt that is decoded has one.

    Where a model decodes them together it is one, which is not known here.
    """
    return prompts_of(work) if isinstance(work, DecodeWork) else 1


def party_of(work: Order) -> Party:
    """Tell among whom a work takes turns: its owner's works of one turn, or those of several.

    They are apart so that a click does not wait for all prompts of a grid that has the same owner.
    """
    return work.owner, turns_of(work) > 1


@dataclass(eq=False, slots=True)
class Ticket:
    """A work in a queue.

    Attributes:
        work: What to do.
        token: Says when to stop.
        future: Gets the result or the exception; never cancelled.
        queued: Since when it waits, by `time.perf_counter`.
        waited: Seconds that it waited for its turns.
        progress: What the core has done of it in the turns that it had.
    """

    work: Order
    token: CancelToken
    future: "Future[Result]" = field(default_factory=Future)
    queued: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    progress: Any = None

    def settle(self, outcome: Result | Exception) -> None:
        """Give the result or the exception to whoever waits; what comes after the first outcome is ignored."""
        if self.future.done():
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
            return
        outcome.times.queue += self.waited
        self.future.set_result(outcome)
