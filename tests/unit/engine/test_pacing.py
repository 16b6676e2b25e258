"""What a device takes, and what it refuses before any work is done for it."""

import asyncio
from typing import Any

import pytest

from segrpc.service.engine.base import CancelToken, Engine
from segrpc.service.engine.pacing import MARGIN, RETRY_AFTER, Place, Queue
from segrpc.service.engine.work import DecodeWork
from segrpc.service.errors import OverloadedError
from segrpc.service.schemas import SegmentationInput
from tests.unit.engine.conftest import StartEngine, ask, click, encoding, picture
from tests.unit.engine.gates import Gate, embeds

ALICE, BOB, CAROL, ANYBODY = "key:alice", "key:bob", "key:carol", ""
A, B, C, D = picture(1), picture(2), picture(3), picture(4)


class Clock:
    """A clock that the test turns."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Lane:
    """A queue, and works that take as long as the test says."""

    def __init__(self, most: int = 100, share: float = 0.5) -> None:
        self.clock = Clock()
        self.queue = Queue("max_pending_decodes", most, share, self.clock)

    def enter(self, prompts: int = 1, model: str = "m", owner: str = ANYBODY) -> Place:
        return self.queue.enter(decode(prompts, model, owner))

    def done(self, place: Place, seconds: float, *, of_them: float | None = None) -> None:
        """Let time pass and finish a work that had it; or that had ``of_them``, because it was done with others."""
        self.clock.now += seconds
        self.queue.leave(place, seconds if of_them is None else of_them)

    def learn(self, seconds: float, prompts: int = 1, model: str = "m") -> None:
        """Do a work by itself."""
        self.done(self.enter(prompts, model), seconds)

    def cost(self, prompts: int = 1, model: str = "m") -> float:
        """What a work is thought to take."""
        place = self.enter(prompts, model)
        self.queue.leave(place, 0.0)
        return place.cost

    def refused(
        self, timeout: float | None, prompts: int = 1, model: str = "m", owner: str = ANYBODY
    ) -> OverloadedError | None:
        try:
            self.queue.check(self.cost(prompts, model), owner, CancelToken(timeout), prompts)
        except OverloadedError as error:
            return error
        return None


def decode(prompts: int = 1, model: str = "m", owner: str = ANYBODY) -> DecodeWork:
    given = SegmentationInput(image=A, points=[[[1.0, 1.0]]] * prompts)
    return DecodeWork(model, "digest", given, "float32", owner=owner)


def test_work_that_comes_too_late_is_refused_and_told_when_to_come_again() -> None:
    lane = Lane()
    lane.learn(10.0)
    for _ in range(3):
        lane.enter()
    assert lane.queue.wait(ANYBODY) == pytest.approx(30.0)
    error = lane.refused(timeout=39.0)
    assert error is not None
    assert "the jobs before this one will take 30 s and itself 10 s" in error.message
    assert error.retry_after == pytest.approx(1.0, abs=0.1)
    error = lane.refused(timeout=20.0)
    assert error is not None
    assert error.retry_after == pytest.approx(20.0, abs=0.1)
    assert lane.refused(timeout=40.0 / (1 - MARGIN) + 1.0) is None
    assert lane.refused(timeout=None) is None


def test_who_has_nothing_here_waits_for_one_work_of_each_other() -> None:
    lane = Lane()
    lane.learn(10.0)
    for _ in range(5):
        lane.enter(owner=ALICE)
    assert lane.queue.wait(BOB) == pytest.approx(10.0)
    assert lane.queue.wait(ALICE) == pytest.approx(50.0)
    lane.enter(owner=CAROL)
    assert lane.queue.wait(BOB) == pytest.approx(20.0)
    lane.clock.now += 4.0  # somebody's work has been done for so long
    assert lane.queue.wait(BOB) == pytest.approx(16.0)
    enough = 27.0 / (1 - MARGIN)
    assert lane.refused(timeout=enough, owner=BOB) is None
    error = lane.refused(timeout=enough, owner=ALICE)
    assert error is not None
    assert "the jobs before this one will take 1.1e+02 s" in error.message


def test_each_work_of_ones_own_is_another_round_of_the_others() -> None:
    lane = Lane()
    lane.learn(10.0)
    lane.learn(1.0, model="quick")
    for _ in range(3):
        lane.enter(owner=ALICE)
    for _ in range(2):
        lane.enter(owner=BOB, model="quick")
    assert lane.queue.wait(ALICE) == pytest.approx(3 * 10.0 + 4 * 1.0)  # bob is expected to go on
    assert lane.queue.wait(BOB) == pytest.approx(2 * 1.0 + 3 * 10.0)


def test_each_prompt_is_a_turn() -> None:
    lane = Lane()
    lane.learn(10.0)
    lane.enter(8, owner=ALICE)
    assert lane.queue.wait(BOB) == pytest.approx(10.0)
    assert lane.queue.wait(BOB, turns=3) == pytest.approx(30.0)
    lane.clock.now += 25.0  # of the eight, two and a half have been done
    assert lane.queue.wait(BOB) == 0.0
    place = lane.enter(2, owner=BOB)
    assert place.expected == pytest.approx(2 * 10.0 + 10.0)
    assert lane.queue.wait(ALICE, turns=8) == pytest.approx(8 * 10.0 + 16 * 10.0 - 25.0)
    assert lane.queue.wait(ALICE) == pytest.approx(10.0)  # a click passes by her own eight
    lane.queue.leave(place, 0.0)
    error = lane.refused(timeout=60.0 / (1 - MARGIN), prompts=4, owner=BOB)
    assert error is not None
    assert "the jobs before this one will take 30 s and itself 40 s" in error.message
    assert lane.refused(timeout=71.0 / (1 - MARGIN), prompts=4, owner=BOB) is None


def test_works_that_are_here_longer_than_they_take_teach_caution() -> None:
    lane = Lane()
    lane.learn(1.0)
    for _ in range(100):
        places = [lane.enter(), lane.enter()]
        for place in places:
            lane.clock.now += 0.5  # between works, when nothing is computed
            lane.done(place, 1.0)
    lane.enter()
    assert lane.queue.wait(ANYBODY) == pytest.approx(1.0)
    error = lane.refused(timeout=3.0)  # two works that take 1.5 s each in truth
    assert error is not None
    assert "will take 1.5 s and itself 1.5 s" in error.message
    assert lane.refused(timeout=3.0 / (1 - MARGIN) + 0.1) is None


def test_what_the_first_has_behind_it_counts() -> None:
    lane = Lane()
    lane.learn(10.0)
    lane.enter()
    lane.clock.now += 6.0
    assert lane.queue.wait(ANYBODY) == pytest.approx(4.0)
    lane.enter()
    assert lane.queue.wait(ANYBODY) == pytest.approx(14.0)
    lane.clock.now += 100.0  # late as it is, the second has not begun
    assert lane.queue.wait(ANYBODY) == pytest.approx(10.0)


def test_nothing_is_refused_by_what_is_not_known_or_alone() -> None:
    lane = Lane()
    first = lane.enter()
    assert lane.refused(timeout=0.001) is None  # nobody knows how long it takes
    lane.done(first, 10.0)
    assert lane.refused(timeout=0.001) is None  # if it were, nobody would ever see that it has become quicker


def test_the_estimate_follows_and_one_slow_work_is_forgotten() -> None:
    lane = Lane()
    for _ in range(16):
        lane.learn(1.0)
    lane.learn(17.0)
    assert lane.cost() == pytest.approx(2.0)
    for _ in range(100):
        lane.learn(1.0)
    assert lane.cost() == pytest.approx(1.0, rel=0.01)


def test_prompts_and_models_have_their_own_costs() -> None:
    lane = Lane()
    lane.learn(8.0, prompts=4)
    lane.learn(50.0, model="slow")
    assert [lane.cost(n) for n in (1, 3)] == [pytest.approx(2.0), pytest.approx(6.0)]
    assert lane.cost(1, "slow") == pytest.approx(50.0)
    assert lane.cost(1, "new") == 0
    lane.enter(model="slow")
    assert lane.refused(timeout=51.0) is not None
    assert lane.refused(timeout=52.0 / (1 - MARGIN) + 1.0) is None


def test_works_that_are_done_together_cost_their_part() -> None:
    lane = Lane()
    for _ in range(4):
        places = [lane.enter() for _ in range(16)]
        lane.clock.now += 16.0
        for place in places:
            lane.queue.leave(place, 16.0)
    assert 16 * lane.cost() == pytest.approx(16.0, rel=0.7)


def test_what_was_not_done_teaches_nothing() -> None:
    lane = Lane()
    lane.learn(10.0)
    dropped, kept = lane.enter(), lane.enter()
    lane.queue.leave(dropped, 0.0)
    assert lane.cost() == pytest.approx(10.0)
    assert lane.queue.wait(ANYBODY) == pytest.approx(10.0)
    lane.queue.leave(kept, 0.0)
    assert (len(lane.queue), lane.queue.wait(ANYBODY)) == (0, 0)


def test_one_owner_leaves_room_for_others() -> None:
    lane = Lane(most=4)
    for _ in range(2):
        lane.queue.check(0.0, ALICE, CancelToken())
        lane.enter(owner=ALICE)
    with pytest.raises(OverloadedError, match=r"'key:alice' may have 2 jobs .* \(max_pending_decodes\)") as caught:
        lane.queue.check(0.0, ALICE, CancelToken())
    assert caught.value.retry_after == RETRY_AFTER
    places = []
    for _ in range(2):
        lane.queue.check(0.0, BOB, CancelToken())
        places.append(lane.enter(owner=BOB))
    with pytest.raises(OverloadedError, match="4 jobs are running or waiting"):
        lane.queue.check(0.0, ANYBODY, CancelToken())
    lane.queue.leave(places[0], 0.0)
    lane.queue.check(0.0, BOB, CancelToken())


# In an engine


async def pending(engine: Engine, **counts: int) -> None:
    """Return once so many works run or wait, as ``encodes`` and ``decodes``."""

    def found() -> dict[str, int]:
        stats = engine.stats()
        return {"encodes": stats.encoding, "decodes": stats.decoding}

    while any(found()[name] != count for name, count in counts.items()):  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0)


async def test_images_that_wait_keep_nobody_from_clicking(start_engine: StartEngine, tmp_path: Any) -> None:
    engine = await start_engine("held", max_pending_encodes=2, max_pending_decodes=1)
    await ask(engine, A)
    gate = Gate(tmp_path, "embed")
    first = asyncio.create_task(ask(engine, B))
    await gate.reached()
    second = asyncio.create_task(ask(engine, C))
    await pending(engine, encodes=2, decodes=0)
    with pytest.raises(OverloadedError, match="max_pending_encodes"):
        await ask(engine, D)
    assert (await ask(engine, A)).times.embedding_cached
    joined = asyncio.create_task(ask(engine, C, 90.0))  # needs no encoding of its own
    await pending(engine, decodes=0)
    await gate.step()
    await gate.reached()
    await gate.open()
    assert len(await asyncio.gather(first, second, joined)) == 3
    assert embeds(tmp_path) == 3


async def test_a_deadline_that_cannot_be_met_is_refused_at_once(start_engine: StartEngine, tmp_path: Any) -> None:
    engine = await start_engine("held")
    gate = Gate(tmp_path, "decode")
    slow = asyncio.create_task(ask(engine, A))
    await gate.reached()
    await asyncio.sleep(0.2)  # what decoding takes
    await gate.step()
    await slow
    running = asyncio.create_task(ask(engine, A))
    await gate.reached()
    before = engine.stats()
    with pytest.raises(OverloadedError, match="the deadline is in"):
        engine.check("held", ANYBODY, CancelToken(0.1))
    with pytest.raises(OverloadedError, match="the deadline is in"):
        await engine.segment(click(A), CancelToken(0.1))
    engine.check("held", ANYBODY, CancelToken())
    engine.check("held", ANYBODY, CancelToken(60.0))
    assert engine.stats() == before
    await gate.open()
    await running


async def test_an_image_whose_deadline_cannot_be_met_is_not_encoded(start_engine: StartEngine, tmp_path: Any) -> None:
    engine = await start_engine("held")
    gate = Gate(tmp_path, "embed")
    slow = asyncio.create_task(ask(engine, A))
    await gate.reached()
    await asyncio.sleep(1.0)  # what encoding takes
    await gate.step()
    await slow
    running = asyncio.create_task(ask(engine, B))
    await gate.reached()
    with pytest.raises(OverloadedError, match="the deadline is in"):
        await engine.encode(encoding(C), CancelToken(0.9))
    await ask(engine, A)  # which is known
    await gate.open()
    await running
    assert embeds(tmp_path) == 2


async def test_models_without_an_encoding_wait_with_the_encodings(start_engine: StartEngine, tmp_path: Any) -> None:
    engine = await start_engine("held", "bright", max_pending_encodes=1)
    gate = Gate(tmp_path, "embed")
    running = asyncio.create_task(ask(engine, A))
    await gate.reached()
    with pytest.raises(OverloadedError, match="max_pending_encodes"):
        engine.check("bright", ANYBODY, CancelToken())
    with pytest.raises(OverloadedError, match="max_pending_encodes"):
        await ask(engine, A, model="bright")
    engine.check("held", ANYBODY, CancelToken())
    await gate.open()
    await running
    assert len((await ask(engine, A, model="bright")).output.masks) == 1


async def test_who_leaves_frees_its_place_in_the_queue(start_engine: StartEngine, tmp_path: Any) -> None:
    engine = await start_engine("held", max_pending_encodes=2)
    gate = Gate(tmp_path, "embed")
    running = asyncio.create_task(ask(engine, A))
    await gate.reached()
    waiting = asyncio.create_task(ask(engine, B))
    await pending(engine, encodes=2)
    waiting.cancel()
    await pending(engine, encodes=1)
    other = asyncio.create_task(ask(engine, C))
    await pending(engine, encodes=2)
    await gate.step()
    await gate.reached()
    await gate.open()
    await asyncio.gather(running, other)
    assert embeds(tmp_path) == 2
