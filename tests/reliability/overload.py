"""More calls than a server can answer: it must go on answering about as many as it can.

First callers that wait for each answer measure the capacity. Then a crowd of such callers asks at once. Then calls
arrive at twice the capacity, whatever becomes of the earlier ones, each with a deadline.
"""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from segrpc.client import AsyncSegmentationClient, DeadlineExceededError, SegmentationError
from tests.reliability.record import Effort, Outcome
from tests.reliability.serving import CALL_SECONDS, Scale, connected, image
from tests.server_process import ServerProcess

REFUSALS = ("OVERLOADED", "OUT_OF_MEMORY")
IN_TIME, REFUSED, TOO_LATE = "in time", "refused", "too late"
LEAST_GOODPUT = 0.9  # of the capacity


@dataclass(frozen=True)
class Load:
    """How much is asked.

    Attributes:
        callers: Who measure the capacity.
        crowd: Callers at once.
        factor: Of the capacity, at which calls arrive.
        deadline: Of calls that arrive at that rate, in seconds.
        clients: How many connections they share.
    """

    callers: int = 4
    crowd: int = 32
    factor: float = 2.0
    deadline: float = 1.0
    clients: int = 4


class Overload:
    """A run.

    Args:
        server: The server.
        scale: The size of images.
        load: How much.

    Attributes:
        rates: Calls per second by what came of them, for each kind of load; the capacity first.
    """

    def __init__(self, server: ServerProcess, scale: Scale, load: Load) -> None:
        self.rates: dict[str, dict[str, float]] = {}
        self._server, self._load = server, load
        self._file = image(0, scale)

    async def run(self, make_effort: Callable[[], Effort]) -> Outcome:
        """Measure under each kind of load, with an effort each.

        Raises:
            SegmentationError: If a call failed, was no deliberate refusal and had time.
        """
        load = self._load
        async with connected(load.clients, self._server.target) as clients:
            for client in clients:
                await client.segment(self._file, points=[(20, 20)])  # from now on the image travels as its digest
            self.rates["capacity"] = await self._callers(clients, load.callers, make_effort())
            self.rates["crowd"] = await self._callers(clients, load.crowd, make_effort())
            rate = load.factor * self.rates["capacity"][IN_TIME]
            self.rates["flood"] = await self._flood(clients, rate, make_effort())
        await asyncio.to_thread(self._server.wait_for, lambda stats: not stats["engine"]["pending"])
        return self._outcome()

    async def _callers(self, clients: list[AsyncSegmentationClient], count: int, effort: Effort) -> dict[str, float]:
        """Ask again and again, each caller when the last call was answered."""
        found: Counter[str] = Counter()

        async def caller(client: AsyncSegmentationClient) -> None:
            while effort.more():
                found[await self._outcome_of(client, CALL_SECONDS)] += 1

        async def callers() -> None:
            async with asyncio.TaskGroup() as group:
                for client in itertools.islice(itertools.cycle(clients), count):
                    group.create_task(caller(client))

        return await _rates(found, callers())

    async def _flood(self, clients: list[AsyncSegmentationClient], rate: float, effort: Effort) -> dict[str, float]:
        """Ask at a rate, in calls per second, without waiting for answers."""
        found: Counter[str] = Counter()

        async def one(client: AsyncSegmentationClient) -> None:
            found[await self._outcome_of(client, self._load.deadline)] += 1

        async def calls() -> None:
            start = time.monotonic()
            async with asyncio.TaskGroup() as group:
                for number, client in enumerate(itertools.cycle(clients)):
                    if not effort.more():
                        return
                    group.create_task(one(client))
                    await asyncio.sleep(max(0.0, start + (number + 1) / rate - time.monotonic()))

        return await _rates(found, calls())

    async def _outcome_of(self, client: AsyncSegmentationClient, deadline: float) -> str:
        try:
            await client.segment(self._file, points=[(20, 20)], timeout=deadline)
        except DeadlineExceededError:
            return TOO_LATE
        except SegmentationError as error:
            if error.reason not in REFUSALS:
                raise
            return REFUSED
        return IN_TIME

    def _outcome(self) -> Outcome:
        capacity = self.rates["capacity"][IN_TIME]
        goodput = {name: rate[IN_TIME] / capacity for name, rate in self.rates.items()}
        rounded = {
            name: {outcome: round(value, 2) for outcome, value in rate.items()} for name, rate in self.rates.items()
        }
        figures = {
            "calls per second": rounded,
            "goodput of the capacity": {name: round(value, 3) for name, value in goodput.items()},
            "deadline of the flood, seconds": self._load.deadline,
        }
        claims = {
            f"goodput of the {name} is at least {LEAST_GOODPUT:.0%} of the capacity": goodput[name] >= LEAST_GOODPUT
            for name in ("crowd", "flood")
        }
        return Outcome(figures, claims)


async def _rates(found: Counter[str], work: Awaitable[None]) -> dict[str, float]:
    """Do a work that counts outcomes; return them per second."""
    start = time.monotonic()
    await work
    seconds = time.monotonic() - start
    return {outcome: found[outcome] / seconds for outcome in (IN_TIME, REFUSED, TOO_LATE)}
