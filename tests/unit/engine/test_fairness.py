"""Owners take turns on a device, in every engine: who has much to do keeps nobody from a click."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from segrpc.service.engine.base import CancelToken, Engine
from segrpc.service.errors import DeadlineError
from tests.unit.engine.conftest import StartEngine, ask, click, encoding, many_clicks, picture
from tests.unit.engine.gates import Gate, log_of
from tests.unit.engine.test_pacing import ALICE, ANYBODY, BOB, pending

Task = asyncio.Task[Any]

A, B, *MORE = (picture(seed) for seed in range(1, 9))


async def decodes_arrived(engine: Engine, count: int, model: str = "held") -> None:
    """Return once so many decodes run or wait in the lane: what was sent after them was dropped from there."""
    token = CancelToken()
    marker = asyncio.create_task(engine.segment(click(A, model=model), token))
    await pending(engine, decodes=count + 1)
    token.cancel()
    with pytest.raises(DeadlineError):
        await marker
    await pending(engine, decodes=count)


async def encodes_arrived(engine: Engine, count: int) -> None:
    """The same, of encodes."""
    token = CancelToken()
    marker = asyncio.create_task(engine.encode(encoding(MORE[-1]), token))
    await pending(engine, encodes=count + 1)
    token.cancel()
    with pytest.raises(DeadlineError):
        await marker
    await pending(engine, encodes=count)


def clicks(engine: Engine, owner: str, count: int, model: str = "held") -> list[Task]:
    return [asyncio.create_task(ask(engine, A, 100.0 + i, owner=owner, model=model)) for i in range(count)]


def done(tasks: Sequence[Task]) -> int:
    return sum(task.done() for task in tasks)


async def test_a_click_waits_for_one_of_anothers(start_engine: StartEngine, tmp_path: Path) -> None:
    engine = await start_engine("held")
    await ask(engine, A)
    gate = Gate(tmp_path, "decode")
    alices = clicks(engine, ALICE, 20)
    await gate.reached()
    bobs = clicks(engine, BOB, 2)
    await decodes_arrived(engine, 22)
    for finished in (1, 2):
        await gate.step()  # one of alice's
        await gate.reached()
        await gate.step()
        await bobs[finished - 1]
        assert done(alices) == finished
        await gate.reached()
    await gate.open()
    await asyncio.gather(*alices)


@pytest.mark.parametrize("owner", [ALICE, BOB, ANYBODY])
async def test_a_click_waits_for_one_of_many_prompts(start_engine: StartEngine, tmp_path: Path, owner: str) -> None:
    engine = await start_engine("held")
    alone = [(await ask(engine, A, 100.0 + i)).output.masks[0] for i in range(4)]
    gate = Gate(tmp_path, "decode")
    alices = asyncio.create_task(engine.segment(many_clicks(A, 4, owner=ALICE), CancelToken()))
    await gate.reached()
    others = clicks(engine, owner, 1)
    await decodes_arrived(engine, 2)
    await gate.step()
    await gate.reached()
    await gate.step()
    await asyncio.gather(*others)
    assert not alices.done()
    await gate.reached()
    await gate.open()
    assert (await alices).output.masks == alone


async def test_prompts_of_who_left_are_not_decoded(start_engine: StartEngine, tmp_path: Path) -> None:
    engine = await start_engine("held")
    await ask(engine, A)
    before = len(log_of(tmp_path))
    gate, token = Gate(tmp_path, "decode"), CancelToken()
    leaving = asyncio.create_task(engine.segment(many_clicks(A, 8, owner=ALICE), token))
    await gate.reached()
    token.cancel()
    with pytest.raises(DeadlineError):
        await leaving
    await decodes_arrived(engine, 1)  # and so has what was told before
    await gate.open()
    await ask(engine, A)
    assert log_of(tmp_path)[before:] == ["decode 1"] * 2


async def test_those_who_are_not_identified_are_one(start_engine: StartEngine, tmp_path: Path) -> None:
    engine = await start_engine("held")
    await ask(engine, A)
    gate = Gate(tmp_path, "decode")
    strangers = clicks(engine, ANYBODY, 4)
    await gate.reached()
    alices = clicks(engine, ALICE, 1)
    await decodes_arrived(engine, 5)
    order = [strangers[0], alices[0], *strangers[1:]]
    for number, task in enumerate(order, 1):
        await (gate.step() if number < len(order) else gate.open())
        await task
        assert done(order) == number
        if number < len(order):
            await gate.reached()


async def test_an_image_waits_for_one_of_anothers(start_engine: StartEngine, tmp_path: Path) -> None:
    engine = await start_engine("held")
    gate = Gate(tmp_path, "embed")
    alices = [
        asyncio.create_task(engine.encode(encoding(image, owner=ALICE), CancelToken())) for image in (A, *MORE[:-1])
    ]
    await gate.reached()
    await pending(engine, encodes=len(alices))
    bobs = asyncio.create_task(engine.encode(encoding(B, owner=BOB), CancelToken()))
    await encodes_arrived(engine, len(alices) + 1)
    await gate.step()
    await gate.reached()
    await gate.step()
    await bobs
    assert done(alices) == 1
    await gate.reached()
    await gate.open()
    await asyncio.gather(*alices)


async def test_clicks_that_are_decoded_together_are_taken_by_turns(start_engine: StartEngine, tmp_path: Path) -> None:
    engine = await start_engine("together")
    await ask(engine, A, model="together")
    before = len(log_of(tmp_path))
    gate = Gate(tmp_path, "decode")
    alices = clicks(engine, ALICE, 1, "together")
    await gate.reached()
    alices += clicks(engine, ALICE, 20, "together")
    await pending(engine, decodes=21)
    bobs = clicks(engine, BOB, 2, "together")
    await decodes_arrived(engine, 23, "together")
    await gate.step()
    await gate.reached()
    await gate.step()
    await asyncio.gather(*bobs)
    await gate.reached()
    await gate.open()
    await asyncio.gather(*alices)
    assert log_of(tmp_path)[before:] == ["decode 1", "decode 16", "decode 6"]
