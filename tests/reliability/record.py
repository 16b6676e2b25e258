"""What callers saw: how long answers took, and what was refused on purpose."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from segrpc.client import SegmentationError

T = TypeVar("T")

LONGEST_PAUSE = 1.0  # seconds that a caller waits who was refused


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        kind: What was asked.
        at: When it came, in seconds since the beginning.
        seconds: How long it took.
    """

    kind: str
    at: float
    seconds: float


class Record:
    """What callers saw. Belongs to one event loop.

    Args:
        refusals: The reasons that a server may give on purpose; the code's name stands for a status without details.
            Any other failure ends the run.
    """

    def __init__(self, refusals: Iterable[str]) -> None:
        self.answers: list[Answer] = []
        self.refusals: Counter[str] = Counter()
        self._allowed = frozenset(refusals)
        self._began = time.monotonic()
        self._changed = asyncio.Condition()

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    async def ask(self, kind: str, call: Callable[[], Awaitable[T]]) -> T | None:
        """Make a call.

        Returns:
            The answer; None if the server refused, after as long as it asks to be left alone.

        Raises:
            SegmentationError: If it failed for another reason.
        """
        start = self.now
        try:
            answer = await call()
        except SegmentationError as error:
            await self._refused(kind, error)
            return None
        self.answers.append(Answer(kind, self.now, self.now - start))
        async with self._changed:
            self._changed.notify_all()
        return answer

    async def insist(self, kind: str, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call until the server does not refuse; otherwise as `ask`."""
        while (answer := await self.ask(kind, call)) is None:
            pass
        return answer

    async def _refused(self, kind: str, error: SegmentationError) -> None:
        reason = error.reason or error.code.name
        if reason not in self._allowed:
            raise error
        self.refusals[f"{kind}: {reason}"] += 1
        await asyncio.sleep(min(error.retry_after or 0.1, LONGEST_PAUSE))

    def count(self, kind: str) -> int:
        """How many answers of a kind came."""
        return sum(answer.kind == kind for answer in self.answers)

    async def wait_for(self, number: int) -> None:
        """Return once that many answers have come."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.answers) >= number)

    def latencies(self) -> dict[str, dict[str, float]]:
        """Return for each kind how many answers came, and the median, 99th percentile and longest in milliseconds."""
        return {kind: _summary(self._seconds(kind)) for kind in sorted({answer.kind for answer in self.answers})}

    def _seconds(self, kind: str) -> list[float]:
        return [answer.seconds for answer in self.answers if answer.kind == kind]


def _summary(seconds: list[float]) -> dict[str, float]:
    p50, p99 = (float(np.percentile(seconds, percent)) * 1e3 for percent in (50, 99))
    return {
        "count": len(seconds),
        "p50_ms": round(p50, 1),
        "p99_ms": round(p99, 1),
        "max_ms": round(max(seconds) * 1e3, 1),
    }


class Effort:
    """Says when enough was done: after a time or, where nothing may depend on time, after a number of operations.

    Args:
        seconds: The time, from when it is first asked.
        operations: The number. One of both is given.
    """

    def __init__(self, *, seconds: float | None = None, operations: int | None = None) -> None:
        if (seconds is None) == (operations is None):
            raise ValueError("give either seconds or operations")
        self._seconds = seconds
        self._left = operations or 0
        self._end: float | None = None

    @property
    def over(self) -> bool:
        """Whether the time is over; never so where operations count."""
        if self._seconds is None:
            return False
        if self._end is None:
            self._end = time.monotonic() + self._seconds
        return time.monotonic() >= self._end

    def more(self) -> bool:
        """Tell whether to do one more operation, which then counts."""
        if self._seconds is not None:
            return not self.over
        self._left -= 1
        return self._left >= 0


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        figures: Numbers by name, as values of JSON.
        claims: Sentences, and whether they are true.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    claims: dict[str, bool] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """The sentences that are not true."""
        return [claim for claim, holds in self.claims.items() if not holds]
