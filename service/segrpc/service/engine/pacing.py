"""Admission to a device: what runs or waits in each of its lanes, how long that takes, and whether more makes sense.

Each lane has a queue of its own, so that a heap of images to encode keeps nobody from clicking. Work is refused when it
comes rather than dropped when it is late: when its lane has as many works as may wait, or when those before it leave it
no time until its deadline. What a work takes is learned from those that were done.

In a lane parties take turns (`segrpc.service.engine.turns`), and each prompt takes one. So before a work come those of
its own party, and for each turn of these and of its own one of every other.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from segrpc.service.admission.limits import share_of
from segrpc.service.engine.backend import Backend
from segrpc.service.engine.base import CancelToken, EngineOptions, StageTimes
from segrpc.service.engine.work import Party, Work, lane_of, party_of, prompts_of, turns_of
from segrpc.service.errors import OverloadedError, Quota

RETRY_AFTER = 1.0  # seconds, at least: about as long as an image takes to encode on a CPU
MARGIN = 0.2  # of the time that is left: the answer must still be put together and travel
MOST_SLIP = 4.0  # a worker that had to be started again says nothing about the others
WINDOW = 16  # works over which the time of one is averaged: as many as a model that batches may get together

Kind: TypeAlias = tuple[type[Work], str]  # the kind of work, and the model


class Costs:
    """What one unit of each kind of work takes, on average, in seconds; 0 as long as none was done."""

    def __init__(self) -> None:
        self._means: dict[Kind, tuple[float, int]] = {}

    def of(self, kind: Kind) -> float:
        """Return what a unit takes."""
        return self._means.get(kind, (0.0, 0))[0]

    def learn(self, kind: Kind, seconds: float) -> None:
        """Take note of what a unit took."""
        mean, count = self._means.get(kind, (0.0, 0))
        count = min(count + 1, WINDOW)
        self._means[kind] = mean + (seconds - mean) / count, count


@dataclass(eq=False, slots=True)
class Place:
    """A work's place in a queue.

    Attributes:
        work: The work.
        party: Among whom it takes turns.
        units: How many times it does what is alike.
        turns: How many turns it takes.
        cost: What it was expected to take when it came, in seconds.
        entered: When that was.
        expected: How long it was expected to be here, in seconds.
    """

    work: Work
    party: Party
    units: int
    turns: int
    cost: float
    entered: float
    expected: float


@dataclass(slots=True)
class Share:
    """What one party has in a queue.

    Attributes:
        count: How many works.
        turns: How many turns they take together.
        cost: How long they were expected to take together, in seconds.
    """

    count: int = 0
    turns: int = 0
    cost: float = 0.0


class Queue:
    """What runs or waits in one lane of a device. Lives on the event loop.

    Args:
        setting: The setting that limits it, for messages.
        most: How many works there may be.
        share: The part of them that one owner may have. Callers who are not identified are one owner, without a name,
            that may have all of them.
        clock: Gives the time in seconds, for tests.

    Attributes:
        costs: What was learned of works.
    """

    def __init__(
        self, setting: str, most: int, share: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._setting = setting
        self._most, self._most_of_one = most, share_of(most, share)
        self._clock = clock
        self.costs = Costs()
        self._places: dict[Place, None] = {}  # in the order of coming
        self._shares: dict[Party, Share] = {}
        self._slip = 1.0  # how much longer than expected works have been here, on average
        self._left = -float("inf")  # when the last work was done

    def __len__(self) -> int:
        return len(self._places)

    def wait(self, owner: str, turns: int = 1) -> float:
        """Tell how long another work of an owner will probably wait until its last turn, in seconds.

        There are as many rounds as its party's works here and it itself need turns. Who is here now is expected to be
        there in each round: who clicks has one work at a time, and the next when that is answered.
        """
        oldest = next(iter(self._places), None)
        if oldest is None:
            return 0.0
        party = owner, turns > 1
        own = self._shares.get(party, Share())
        round_ = sum(one.cost / one.turns for other, one in self._shares.items() if other != party)
        # What runs is somebody's turn. Whose it is only the lane knows; they are alike.
        begun = oldest.cost if oldest.party == party else oldest.cost / oldest.turns
        done = min(begun, self._clock() - max(self._left, oldest.entered))
        return max(0.0, own.cost + (own.turns + turns) * round_ - done)

    def check(self, cost: float, owner: str, token: CancelToken, turns: int = 1) -> None:
        """Look whether a work makes sense now.

        Args:
            cost: What it will take, in seconds.
            owner: Whose it is.
            token: Says when it must be done.
            turns: How many turns it takes.

        Raises:
            OverloadedError: If there are too many works, altogether or of this owner, or no time is left.
        """
        count = len(self._places)
        own = sum(one.count for (name, _), one in self._shares.items() if name == owner)
        if owner and own >= self._most_of_one:
            text = f"{owner!r} may have {self._most_of_one} jobs that run or wait ({self._setting}), and has {own}"
            raise OverloadedError(f"{text}; try again", self._until_one_is_done(), Quota(owner, text))
        if count >= self._most:
            text = f"{count} jobs are running or waiting already, as many as may ({self._setting})"
            raise OverloadedError(f"{text}; try again", self._until_one_is_done())
        remaining = token.remaining()
        # Nothing is refused for its own cost alone: what is never done again could never turn out to be quicker.
        if remaining is None or not count:
            return
        wait, cost = self.wait(owner, turns) * self._slip, cost * self._slip
        if wait + cost > remaining * (1 - MARGIN):
            raise OverloadedError(
                f"the deadline is in {remaining:.2g} s, but the jobs before this one will take {wait:.2g} s and itself "
                f"{cost:.2g} s; try again with more time, or later",
                max(RETRY_AFTER, wait + cost - remaining),
            )

    def enter(self, work: Work, token: CancelToken | None = None) -> Place:
        """Give a work a place.

        Args:
            work: The work.
            token: Says when it must be done. Without one it is put there whatever the limits.

        Raises:
            OverloadedError: As `check`.
        """
        units, turns, party = prompts_of(work), turns_of(work), party_of(work)
        cost = units * self.costs.of(_kind(work))
        if token is not None:
            self.check(cost, work.owner, token, turns)
        place = Place(work, party, units, turns, cost, self._clock(), self.wait(work.owner, turns) + cost)
        self._places[place] = None
        own = self._shares.setdefault(party, Share())
        own.count += 1
        own.turns += turns
        own.cost += cost
        return place

    def leave(self, place: Place, seconds: float) -> None:
        """Take a work out.

        Args:
            place: What `enter` returned.
            seconds: How long it was worked on, if it was done; 0 if not.
        """
        del self._places[place]
        own = self._shares[place.party]
        own.count -= 1
        own.turns -= place.turns
        own.cost -= place.cost
        if not own.count:
            del self._shares[place.party]  # and no error of rounding adds up
        if seconds > 0:
            now = self._clock()
            # Works that were done together each took all the time, but delayed others by only their part of it.
            delay = min(seconds, now - max(self._left, place.entered))
            self.costs.learn(_kind(place.work), delay / place.units)
            self._left = now
            if place.expected > 0:
                slip = min((now - place.entered) / place.expected, MOST_SLIP)
                self._slip = max(1.0, self._slip + (slip - self._slip) / WINDOW)

    def _until_one_is_done(self) -> float:
        return max(RETRY_AFTER, sum(one.cost for one in self._shares.values()) / max(1, len(self._places)))


class Device:
    """A backend, and the queues of its lanes. Used on the event loop.

    Args:
        backend: Does the work.
        options: How many works may run or wait.
    """

    def __init__(self, backend: Backend, options: EngineOptions) -> None:
        self.backend = backend
        self.decodes = Queue("max_pending_decodes", options.max_pending_decodes, options.principal_share)
        self.encodes = Queue("max_pending_encodes", options.max_pending_encodes, options.principal_share)

    def check(self, kind: Kind, owner: str, token: CancelToken) -> None:
        """Look whether a work makes sense, before anything is done for it.

        Raises:
            OverloadedError: If not.
        """
        queue = self._queue(kind[0])
        queue.check(queue.costs.of(kind), owner, token)

    def admit(self, work: Work, token: CancelToken) -> Place:
        """Give a work its place, to be used by `run` without a step in between that may fail.

        Raises:
            OverloadedError: If it makes no sense now.
        """
        return self._queue(type(work)).enter(work, token)

    def enter(self, work: Work) -> Place:
        """Give a work its place whatever the limits: it follows another that was admitted, or takes no time."""
        return self._queue(type(work)).enter(work)

    async def run(self, place: Place, token: CancelToken) -> Any:
        """Do a work; see `Backend.run`. Its place is free when the work has ended, also when nobody waits any more."""
        seconds = 0.0
        try:
            result = await self.backend.run(place.work, token)
            seconds = _seconds(result.times)
            return result
        finally:
            self._queue(type(place.work)).leave(place, seconds)

    def _queue(self, kind: type[Work]) -> Queue:
        return self.encodes if lane_of(kind) == "encode" else self.decodes


def _kind(work: Work) -> Kind:
    return type(work), work.model


def _seconds(times: StageTimes) -> float:
    return times.decode_image + times.encode_image + times.decode_mask + times.postprocess
