"""How many clicks per second do N sessions get, beside one loop that calls the reference?

Sessions click as soon as they are answered: they take the last click back and set another one, in one go, so that each
click is a refinement with one mask. Both sides have blocks of some seconds, in turns.
"""

import asyncio
import time
from contextlib import AsyncExitStack

from segrpc.client import AsyncRefineSession, AsyncSegmentationClient, Undo
from tests.benchmarks.common import SETTLE_SECONDS, Bench
from tests.benchmarks.values import Stats, Throughput
from tests.parity.reference import Prompt

SESSIONS = (1, 4, 16, 64)
POINT = (500.0, 400.0)


def measure(bench: Bench, sessions: int) -> list[Throughput]:
    """Measure with a number of sessions, each of a client of its own, on one image."""
    return [asyncio.run(_measure(bench, sessions))]


async def _measure(bench: Bench, count: int) -> Throughput:
    image = bench.encoded_image()
    reference: list[float] = []
    latencies: list[float] = []
    seconds = 0.0
    async with AsyncExitStack() as stack:
        sessions = [await _open(stack, bench, image) for _ in range(count)]
        for _ in range(bench.effort.blocks):
            reference += _loop(bench)
            await asyncio.sleep(SETTLE_SECONDS)
            start = time.perf_counter()
            end = start + bench.effort.block_seconds
            for found in await asyncio.gather(*(_click_until(session, end) for session in sessions)):
                latencies += found
            seconds += time.perf_counter() - start
    return Throughput(count, len(reference) / sum(reference), len(latencies) / seconds, Stats.of(latencies))


async def _open(stack: AsyncExitStack, bench: Bench, image: bytes) -> AsyncRefineSession:
    """Open a session with an object that has a first click and a refinement."""
    client = await stack.enter_async_context(AsyncSegmentationClient(bench.server.target, timeout=240))
    session = await stack.enter_async_context(client.refine(image))
    await session.click(*POINT)
    await session.click(*POINT)
    return session


async def _click_until(session: AsyncRefineSession, end: float) -> list[float]:
    found: list[float] = []
    while (start := time.perf_counter()) < end:
        session.send(Undo())
        await session.click(300 + len(found) % 400, 500)
        found.append(time.perf_counter() - start)
    return found


def _loop(bench: Bench) -> list[float]:
    """Refine by the reference for the time of a block; returns the seconds of each click."""
    logits = bench.reference.predict(Prompt(points=(POINT,), labels=(1,)), multimask=True).logits[:1]
    found: list[float] = []
    while sum(found) < bench.effort.block_seconds:
        start = time.perf_counter()
        refined = Prompt(points=(POINT, (300.0 + len(found) % 400, 500.0)), labels=(1, 1))
        bench.reference.predict(refined, multimask=False, mask_input=logits)
        found.append(time.perf_counter() - start)
    return found
