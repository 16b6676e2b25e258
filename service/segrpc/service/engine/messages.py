"""What the front and a worker process say to each other."""

import signal
import traceback
from dataclasses import dataclass

from segrpc.service import errors
from segrpc.service.engine.base import EngineOptions, ServedModel
from segrpc.service.engine.work import EmbeddingMissing, Holdings, Order, Result, WorkerBug

DUMP_SIGNAL = signal.SIGUSR2  # has a worker write to standard error where its threads are


@dataclass(frozen=True, slots=True)
class Start:
    """The first message to a worker: what to load."""

    options: EngineOptions
    device: str


@dataclass(frozen=True, slots=True)
class Call:
    """A work, its number, and the seconds until its deadline if there is one."""

    number: int
    work: Order
    timeout: float | None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for a call any more. Follows the call on the same connection."""

    number: int


@dataclass(frozen=True, slots=True)
class Release:
    """Let an embedding go that an `EncodeWork` had kept."""

    model: str
    digest: str


@dataclass(frozen=True, slots=True)
class Stop:
    """The last message to a worker: do what was asked for, unload and end."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The first message of a worker: the models are loaded."""

    models: tuple[ServedModel, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """The only message of a worker that cannot load its models."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a call, and what the cache holds now."""

    number: int
    outcome: Result | Exception
    holdings: Holdings


def portable(error: Exception) -> Exception:
    """Turn an exception into one that the front can read without importing what the worker imported."""
    if isinstance(error, EmbeddingMissing):
        return EmbeddingMissing()
    if not isinstance(error, errors.SegrpcError):
        return WorkerBug("".join(traceback.format_exception(error)))
    # A model's package may have subclasses of its own: the nearest of ours says the same to clients.
    ours = (kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    kind = next(kind for kind in ours if issubclass(kind, errors.SegrpcError))
    copy = kind.__new__(kind, error.message)
    copy.__dict__.update({k: v for k, v in vars(error).items() if k in ("message", "violations", "retry_after")})
    return copy
