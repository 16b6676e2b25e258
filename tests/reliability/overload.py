"""More calls than a server can answer: it must go on answering about as many as it can.

First callers that wait for each answer measure the capacity. Then a crowd of such callers asks at once. Then calls
arrive at twice the capacity, whatever becomes of the earlier ones, each with a deadline. A long run does so in rounds,
so that a machine that becomes slower or quicker meanwhile does it to all three.
"""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from segrpc.client import AsyncSegmentationClient, DeadlineExceededError, SegmentationError
from tests.reliability.record import Effort, Outcome
from tests.reliability.serving import CALL_SECONDS, Scale, connected, image
from tests.server_process import ServerProcess

REFUSALS = ("OVERLOADED", "OUT_OF_MEMORY")
IN_TIME, REFUSED, TOO_LATE = "in time", "refused", "too late"
LEAST_GOODPUT = 0.9  # of the capacity
ROUND_SECONDS = 30.0


@dataclass(frozen=True)
class Load:
    """How much is asked.

    Attributes:
        callers: Who measure the capacity.
        crowd: Callers at once.
        factor: Of the capacity, at which calls arrive.
        deadline: Of calls that arrive at that rate, in seconds.
        clients: How many connections they share.
        rounds: How often capacity, crowd and flood take turns.
    """

    callers: int = 4
    crowd: int = 32
    factor: float = 2.0
    deadline: float = 1.0
    clients: int = 4
    rounds: int = 1


@dataclass
class Tally:
    """What came of calls under one kind of load, in all rounds.

    Attributes:
        found: How many calls came to what.
        seconds: How long they took.
        in_time: Per second, of each round.
    """

    found: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    in_time: list[float] = field(default_factory=list)

    def add(self, found: Counter[str], seconds: float) -> None:
        """Add a round."""
        self.found += found
        self.seconds += seconds
        self.in_time.append(found[IN_TIME] / seconds)

    @property
    def rates(self) -> dict[str, float]:
        """Calls per second by what came of them."""
        return {outcome: self.found[outcome] / self.seconds for outcome in (IN_TIME, REFUSED, TOO_LATE)}


class Overload:
    """A run.

    Args:
        server: The server.
        scale: The size of images.
        load: How much.

    Attributes:
        tallies: For each kind of load; the capacity first.
    """

    def __init__(self, server: ServerProcess, scale: Scale, load: Load) -> None:
        self.tallies = {name: Tally() for name in ("capacity", "crowd", "flood")}
        self._server, self._load = server, load
        self._file = image(0, scale)

    @property
    def rates(self) -> dict[str, dict[str, float]]:
        """Calls per second by what came of them, for each kind of load; the capacity first."""
        return {name: tally.rates for name, tally in self.tallies.items()}

    async def run(self, make_effort: Callable[[], Effort]) -> Outcome:
        """Measure under each kind of load, with an effort each in each round.

        Raises:
            SegmentationError: If a call failed, was no deliberate refusal and had time.
        """
        load = self._load
        capacity, crowd, flood = self.tallies.values()
        async with connected(load.clients, self._server.target) as clients:
            for client in clients:
                await client.segment(self._file, points=[(20, 20)])  # from now on the image travels as its digest
            for _ in range(load.rounds):
                await self._callers(capacity, clients, load.callers, make_effort())
                await self._callers(crowd, clients, load.crowd, make_effort())
                await self._flood(flood, clients, load.factor * capacity.in_time[-1], make_effort())
        await asyncio.to_thread(self._server.wait_for, lambda stats: not stats["engine"]["pending"])
        return self._outcome()

    async def _callers(self, tally: Tally, clients: list[AsyncSegmentationClient], count: int, effort: Effort) -> None:
        """Ask again and again, each caller when the last call was answered."""
        found: Counter[str] = Counter()

        async def caller(client: AsyncSegmentationClient) -> None:
            while effort.more():
                found[await self._outcome_of(client, CALL_SECONDS)] += 1

        async def callers() -> None:
            async with asyncio.TaskGroup() as group:
                for client in itertools.islice(itertools.cycle(clients), count):
                    group.create_task(caller(client))

        tally.add(found, await _seconds(callers()))

    async def _flood(self, tally: Tally, clients: list[AsyncSegmentationClient], rate: float, effort: Effort) -> None:
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

        tally.add(found, await _seconds(calls()))

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
        capacity = self.tallies["capacity"]
        goodput = {name: rates[IN_TIME] / capacity.rates[IN_TIME] for name, rates in self.rates.items()}
        by_round = zip(self.tallies["flood"].in_time, capacity.in_time, strict=True)
        rounded = {
            name: {outcome: round(value, 2) for outcome, value in rates.items()} for name, rates in self.rates.items()
        }
        figures = {
            "calls per second": rounded,
            "goodput of the capacity": {name: round(value, 3) for name, value in goodput.items()},
            "goodput of the flood by round": [round(flood / alone, 3) for flood, alone in by_round],
            "deadline of the flood, seconds": self._load.deadline,
        }
        claims = {
            f"goodput of the {name} is at least {LEAST_GOODPUT:.0%} of the capacity": goodput[name] >= LEAST_GOODPUT
            for name in ("crowd", "flood")
        }
        return Outcome(figures, claims)


async def _seconds(work: Awaitable[None]) -> float:
    """Do a work; return how long it took."""
    start = time.monotonic()
    await work
    return time.monotonic() - start
