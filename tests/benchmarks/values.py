"""What the benchmark measures, as plain values; `report` prints them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, Self, TypeVar

import numpy as np

Device = Literal["cpu", "cuda"]
DType = Literal["float32", "bfloat16"]
Logits = Literal["smooth", "rough"]


@dataclass(frozen=True)
class Setup:
    """What computes: both the service and the reference."""

    device: Device
    model: str
    dtype: DType


@dataclass(frozen=True)
class Stats:
    """What is kept of measurements, in seconds."""

    p50: float
    p99: float
    min: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        """Sum up measurements."""
        p50, p99 = np.quantile(seconds, (0.5, 0.99))
        return cls(float(p50), float(p99), float(min(seconds)), len(seconds))


@dataclass(frozen=True)
class Stages:
    """Where the median of a click on a stream goes, in seconds.

    Attributes:
        queue: Waiting for the model.
        decode_mask: From embedding and prompts to logits.
        postprocess: From logits to masks.
        rest: All else: client, transport, session, the way to the worker and back.
    """

    queue: float
    decode_mask: float
    postprocess: float
    rest: float


@dataclass(frozen=True)
class Row:
    """Something that was measured."""

    kind: ClassVar[str]

    def ratios(self) -> dict[str, float]:
        """The service's numbers in those of the reference, or of the service at rest."""
        return {}


@dataclass(frozen=True)
class Click(Row):
    """A click, an edit of a session or a box on an image that is encoded."""

    kind = "clicks"
    workload: str
    masks: int
    width: int
    height: int
    logits: Logits
    reference: Stats
    unary: Stats
    stream: Stats
    stages: Stages

    def ratios(self) -> dict[str, float]:
        return {"unary": self.unary.p50 / self.reference.p50, "stream": self.stream.p50 / self.reference.p50}


@dataclass(frozen=True)
class Start(Row):
    """What a new image costs: ``encode`` or ``first mask``."""

    kind = "starts"
    what: str
    width: int
    height: int
    reference: Stats
    service: Stats

    def ratios(self) -> dict[str, float]:
        return {"service": self.service.p50 / self.reference.p50}


@dataclass(frozen=True)
class ColdStart(Row):
    """From starting the server's process to its address and to the first mask."""

    kind = "cold_start"
    address: Stats
    first_mask: Stats


@dataclass(frozen=True)
class Traffic(Row):
    """Bytes on the connection for each click, HTTP/2 included, TCP and IP not."""

    kind = "traffic"
    workload: str
    logits: Logits
    unary_to_server: float
    unary_to_client: float
    stream_to_server: float
    stream_to_client: float


@dataclass(frozen=True)
class Added(Row):
    """What a click on a stream takes beside the decoding and the masks of the same click in the worker.

    Attributes:
        click: At the client.
        computing: In the worker.
        added: The difference.
        bare: The same difference where nothing is done on the same way; see `tests.benchmarks.bare`.
    """

    kind = "added"
    click: Stats
    computing: Stats
    added: Stats
    bare: Stats


@dataclass(frozen=True)
class Meanwhile(Row):
    """Clicks on an idle server, and while another client has images encoded all the time."""

    kind = "meanwhile"
    idle: Stats
    busy: Stats
    encoded: int

    def ratios(self) -> dict[str, float]:
        return {"p50": self.busy.p50 / self.idle.p50, "p99": self.busy.p99 / self.idle.p99}


@dataclass(frozen=True)
class Memory(Row):
    """How much the server grows with each open session, in bytes: its process, and its worker."""

    kind = "memory"
    sessions: int
    server: float
    worker: float


@dataclass(frozen=True)
class Throughput(Row):
    """Sessions that click as soon as they are answered, and one loop of the reference; clicks per second."""

    kind = "throughput"
    sessions: int
    reference: float
    service: float
    latency: Stats

    def ratios(self) -> dict[str, float]:
        return {"clicks_per_second": self.service / self.reference}


R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class Measured:
    """All that was measured of a setup."""

    setup: Setup
    rows: tuple[Row, ...]

    def of(self, kind: type[R]) -> list[R]:
        """The rows of a kind."""
        return [row for row in self.rows if isinstance(row, kind)]


@dataclass(frozen=True)
class Machine:
    """What it ran on."""

    cpu: str
    cores: int
    memory_gib: float
    gpu: str | None


@dataclass(frozen=True)
class Run:
    """A run of the benchmark."""

    commit: str
    dirty: bool
    date: str
    quick: bool
    versions: dict[str, str]
    machine: Machine
    measured: tuple[Measured, ...]


def stage_names() -> list[str]:
    """The stages of a click, in the order in which they follow."""
    return [field.name for field in fields(Stages)]
