"""Hours of ordinary work: sessions that come and go, and callers beside them, on a server whose caches are too small.

What must hold: every failure is a deliberate refusal, every acknowledged edit is there, the final masks are those of
a replay, nothing stays when everybody has left, and memory does not grow.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from segrpc.client import AsyncSegmentationClient
from segrpc.service.images.decode import digest_of
from tests.reliability.life import Life
from tests.reliability.memory import Memory
from tests.reliability.record import Effort, Outcome, Record
from tests.reliability.serving import Scale, connected, image
from tests.server_process import ServerProcess

# IMAGE_NOT_FOUND: callers that name an image by its digest alone, after the server has let it go.
REFUSALS = ("OVERLOADED", "OUT_OF_MEMORY", "IMAGE_NOT_FOUND")
SETTLE_SECONDS = 120.0
MOST_GROWTH = 6.0  # MiB per minute in the second half


@dataclass(frozen=True)
class Load:
    """How much is done.

    Attributes:
        sessions: How many are open at a time.
        edits: Of each session.
        per_image: How many sessions work on an image before the next one comes.
        callers: Who make single calls beside them.
        repeat_every: One of so many sessions is computed again at its end.
        clients: How many connections they share.
    """

    sessions: int = 64
    edits: int = 20
    per_image: int = 32
    callers: int = 4
    repeat_every: int = 8
    clients: int = 8


class Soak:
    """A run.

    Args:
        server: The server.
        scale: The size of images.
        load: How much.
        record: What callers saw.

    Attributes:
        memory: What the server held over time.
    """

    def __init__(self, server: ServerProcess, scale: Scale, load: Load, record: Record) -> None:
        self._server, self._scale, self._load, self._record = server, scale, load, record
        self.memory = Memory(server, record)
        self._numbers = itertools.count()
        self._newest = 0  # image
        self._ended = self._repeated = self._rounds = 0

    async def run(self, sessions: Effort, calls: Effort) -> Outcome:
        """Work until enough sessions were begun and enough calls made.

        Raises:
            SegmentationError: If a call failed and was no deliberate refusal.
            AssertionError: If an acknowledged edit is missing, or masks differ from those of the replay.
        """
        before = await asyncio.to_thread(self._server.stats)
        async with connected(self._load.clients, self._server.target) as clients:
            watching = asyncio.create_task(self.memory.watch(1.0))
            try:
                async with asyncio.TaskGroup() as group:
                    for client in itertools.islice(itertools.cycle(clients), self._load.sessions):
                        group.create_task(self._sessions(client, sessions))
                    for client in itertools.islice(itertools.cycle(clients), self._load.callers):
                        group.create_task(self._calls(client, calls))
            finally:
                watching.cancel()
        self.memory.sample()
        after = await asyncio.to_thread(self._server.stats)
        await asyncio.to_thread(self._server.settle, before, SETTLE_SECONDS)
        return self._outcome(after)

    async def _sessions(self, client: AsyncSegmentationClient, effort: Effort) -> None:
        while effort.more():
            number = next(self._numbers)
            self._newest = number // self._load.per_image
            life = await Life.begin(client, number, self._newest, self._scale, self._record)
            if life is None:
                continue
            try:
                await life.go_on(self._load.edits, effort, self._record)
                if number % self._load.repeat_every == 0:
                    rounds = await life.repeat(self._record)
                    self._rounds += rounds
                    self._repeated += 1
                await self._record.ask("finish", life.session.finish)
            except BaseException:
                await life.session.detach()
                raise
            self._ended += 1

    async def _calls(self, client: AsyncSegmentationClient, effort: Effort) -> None:
        """Make single calls of all kinds, in turn."""
        own = itertools.count(10**6)  # images that nobody else has
        kinds: dict[str, Callable[[], Awaitable[Any]]] = {
            "Segment by digest": lambda: client.segment(digest_of(self._shared()), points=[(20, 20)]),
            "Segment": lambda: client.segment(self._shared(), points=[(30, 20)], boxes=[(2, 2, 90, 90)]),
            "ListModels": client.models,
            "UploadImage": lambda: client.upload(image(next(own), self._scale)),
            "Segment by digest, again": lambda: client.segment(digest_of(self._shared()), points=[(40, 20)]),
            "GetModel": client.model,
            "Check": client.health,
        }
        if (await client.model()).embeddings:
            kinds["EncodeImage"] = lambda: client.encode(self._shared())
        for kind in itertools.cycle(kinds):
            if not effort.more():
                return
            await self._record.ask(kind.partition(",")[0], kinds[kind])

    def _shared(self) -> bytes:
        return image(self._newest, self._scale)

    def _outcome(self, stats: dict[str, Any]) -> Outcome:
        slope = self.memory.slope()
        figures = {
            "sessions": self._ended,
            "sessions repeated": self._repeated,
            "rounds repeated": self._rounds,
            "images": self._newest + 1,
            "encodes": stats["engine"]["encodes"],
            "latencies": self._record.latencies(),
            "refusals": dict(self._record.refusals),
            "memory": self.memory.figures(),
            "memory over time": [
                [round(s.at, 1), round(s.server, 1), round(s.workers, 1)] for s in self.memory.samples
            ],
        }
        claims = {
            "failures other than deliberate refusals: none": True,  # one would have ended the run
            "final masks equal those of the replay": self._repeated > 0,
            "images were encoded again after eviction, or let go": stats["engine"]["encodes"] > self._scale.embeddings,
        }
        if slope is not None:
            claims[f"memory grows by less than {MOST_GROWTH:g} MiB per minute"] = slope < MOST_GROWTH
        return Outcome(figures, claims)
