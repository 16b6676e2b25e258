"""Workers that are killed and connections that are cut, while sessions edit.

What must hold: no acknowledged edit is lost or counts twice, whatever happens meanwhile. Each session is taken up at
its end by another client, which knows nothing of it: it must find what the acknowledged edits come to, and
computing that again must give the masks that were shown.
"""

import asyncio
import itertools
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

from segrpc.client import AsyncRefineSession, AsyncSegmentationClient
from tests.reliability.life import Life, repeat
from tests.reliability.record import Effort, Outcome, Record
from tests.reliability.serving import CALL_SECONDS, Scale, connected
from tests.server_process import ServerProcess
from tests.tcp_proxy import TcpProxy

# UNAVAILABLE: of a call whose connection was cut, which has no details.
REFUSALS = ("OVERLOADED", "OUT_OF_MEMORY", "WORKER_UNAVAILABLE", "UNAVAILABLE")
DETACHED_SECONDS = 60.0  # option of the server: sessions whose first answer was lost end soon
SETTLE_SECONDS = 2 * DETACHED_SECONDS
KILL_CHANCE = 0.7  # of a strike; the others cut connections
SEED = 7


@dataclass(frozen=True)
class Load:
    """How much is done.

    Attributes:
        sessions: How many are open at a time.
        edits: Of each session.
        per_image: How many sessions work on an image before the next one comes.
        clients: How many connections they share; every other one goes through a proxy, which is cut.
    """

    sessions: int = 32
    edits: int = 20
    per_image: int = 16
    clients: int = 8


async def from_time_to_time(seconds: float) -> AsyncIterator[None]:
    """Yield after random times, on average that long."""
    chance = random.Random(SEED)
    while True:
        await asyncio.sleep(chance.expovariate(1 / seconds))
        yield


async def after_each(answers: int, record: Record, times: int) -> AsyncIterator[None]:
    """Yield whenever so many answers have come, a number of times."""
    for i in range(1, times + 1):
        await record.wait_for(i * answers)
        yield


class Chaos:
    """A run.

    Args:
        server: The server.
        proxy: A way to it that may be cut.
        scale: The size of images.
        load: How much.
        record: What callers saw.

    Attributes:
        kills: When workers were killed, in seconds since the beginning.
        cuts: When connections were cut.
    """

    def __init__(self, server: ServerProcess, proxy: TcpProxy, scale: Scale, load: Load, record: Record) -> None:
        self.kills: list[float] = []
        self.cuts: list[float] = []
        self._server, self._proxy = server, proxy
        self._scale, self._load, self._record = scale, load, record
        self._numbers = itertools.count()
        self._compared = self._rounds = 0

    async def run(self, sessions: Effort, strikes: AsyncIterator[None]) -> Outcome:
        """Edit until enough sessions were begun.

        Raises:
            SegmentationError: If a call failed and was no deliberate refusal.
            AssertionError: If an acknowledged edit was lost, or masks differ from those of the replay.
        """
        before = await asyncio.to_thread(self._server.stats)
        async with (
            connected(self._load.clients, self._server.target, self._proxy.target) as clients,
            AsyncSegmentationClient(self._server.target, timeout=CALL_SECONDS) as direct,
        ):
            striking = asyncio.create_task(self._strike(strikes, sessions))
            try:
                async with asyncio.TaskGroup() as group:
                    for client in itertools.islice(itertools.cycle(clients), self._load.sessions):
                        group.create_task(self._sessions(client, direct, sessions))
            finally:
                striking.cancel()
                with suppress(asyncio.CancelledError):
                    await striking
        await asyncio.to_thread(self._server.settle, before, SETTLE_SECONDS)
        return self._outcome(self._server.stats()["engine"]["worker_restarts"])

    async def _strike(self, strikes: AsyncIterator[None], effort: Effort) -> None:
        chance = random.Random(SEED)
        async for _ in strikes:
            if effort.over:
                return  # the sessions that are left are compared in peace
            workers = self._server.worker_pids()
            if workers and chance.random() < KILL_CHANCE:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(chance.choice(workers), signal.SIGKILL)
                self.kills.append(self._record.now)
            else:
                await asyncio.to_thread(self._proxy.cut)
                self.cuts.append(self._record.now)

    async def _sessions(self, client: AsyncSegmentationClient, direct: AsyncSegmentationClient, effort: Effort) -> None:
        while effort.more():
            number = next(self._numbers)
            life = await Life.begin(client, number, number // self._load.per_image, self._scale, self._record)
            if life is None:
                continue
            try:
                await life.go_on(self._load.edits, effort, self._record)
            finally:
                await life.session.detach()
            await self._compare(life, direct)

    async def _compare(self, life: Life, direct: AsyncSegmentationClient) -> None:
        """Take a session up elsewhere, and compare it with what was acknowledged; ends it."""
        mine = life.session
        async with direct.resume(mine.session_id, mine.resume_token) as other:
            await _all_arrived(other, set(mine.results))
            for name, hand in life.hands.items():
                result = other.result(name)
                if result is not None:
                    hand.check(result, other.shown_round(name))
            export = other.export()
            # The other client was shown the newest masks only; those of earlier rounds are in what was acknowledged.
            known = {one["revision"]: one["masks"] for one in mine.export()["rounds"] if "masks" in one}
            for one in export["rounds"]:
                if one["revision"] in known:
                    assert one.setdefault("masks", known[one["revision"]]) == known[one["revision"]]
            await repeat(direct, export, life.file, other.results, self._record)
        self._compared += 1
        self._rounds += len(export["rounds"])

    def _outcome(self, restarts: int) -> Outcome:
        figures = {
            "sessions compared": self._compared,
            "rounds repeated": self._rounds,
            "edits acknowledged": self._record.count("edit") + self._record.count("drag"),
            "workers killed": len(self.kills),
            "workers started again": restarts,
            "connections cut": len(self.cuts),
            "latencies": self._record.latencies(),
            "refusals": dict(self._record.refusals),
        }
        # Any of it would have ended the run.
        claims = {"no acknowledged edit was lost": self._compared > 0, "workers were killed": bool(self.kills)}
        return Outcome(figures, claims)


async def _all_arrived(session: AsyncRefineSession, objects: set[str]) -> None:
    """Wait for the results of all objects of a session that was resumed; each is a message of its own."""
    if objects <= set(session.results):
        return
    async with asyncio.timeout(CALL_SECONDS):
        async for _ in session:
            if objects <= set(session.results):
                return
