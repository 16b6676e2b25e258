"""Instruments: counters and histograms.

They belong to the event loop, so that they need no locks; exporters get frozen `Family`s. OpenTelemetry's own
instruments take more time than a click has for being counted (docs/adr/0013-telemetry.md).
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind = Literal["counter", "gauge", "histogram"]
Labels: TypeAlias = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Distribution:
    """What a histogram has seen with the same labels.

    Attributes:
        counts: How many values were at most as large as each bound and above the one before, then those above all.
        total: The sum of all values.
    """

    counts: tuple[int, ...]
    total: float


@dataclass(frozen=True, slots=True)
class Family:
    """What an instrument has measured, with all labels.

    Attributes:
        name: Its name, as OpenTelemetry writes names: ``grpc.server.call.duration``.
        kind: Counters only rise.
        unit: As in UCUM: ``s``, ``By``, ``{call}``.
        description: What it measures.
        labels: The names of the labels.
        points: The values of the labels, and what was measured with them.
        bounds: Of a histogram: the upper bounds of its buckets, but the last one, which has none.
    """

    name: str
    kind: Kind
    unit: str
    description: str
    labels: Labels
    points: tuple[tuple[Labels, float | Distribution], ...]
    bounds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Description:
    """What an instrument is called and measures; see `Family`."""

    name: str
    unit: str
    description: str
    labels: Labels = ()


class Counter:
    """Adds up.

    Args:
        described: What it counts.
    """

    def __init__(self, described: Description) -> None:
        self._described = described
        self._sums: dict[Labels, float] = {}

    def add(self, amount: float, *labels: str) -> None:
        """Add an amount, 0 or more."""
        self._sums[labels] = self._sums.get(labels, 0) + amount

    def family(self) -> Family:
        """Tell what was counted."""
        one = self._described
        return Family(one.name, "counter", one.unit, one.description, one.labels, tuple(self._sums.items()))


class Histogram:
    """Counts values by their size.

    Args:
        described: What it measures.
        bounds: The upper bounds of its buckets, rising.
    """

    def __init__(self, described: Description, bounds: Sequence[float]) -> None:
        self._described = described
        self._bounds = tuple(bounds)
        self._series: dict[Labels, _Series] = {}

    def record(self, value: float, *labels: str) -> None:
        """Count a value."""
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = _Series(len(self._bounds) + 1)
        series.counts[bisect_left(self._bounds, value)] += 1
        series.total += value

    def family(self) -> Family:
        """Tell what was measured."""
        one = self._described
        points = tuple((labels, Distribution(tuple(s.counts), s.total)) for labels, s in self._series.items())
        return Family(one.name, "histogram", one.unit, one.description, one.labels, points, self._bounds)


class _Series:
    __slots__ = ("counts", "total")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * buckets
        self.total = 0.0
