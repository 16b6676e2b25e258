"""Lanes and tokens: order, dropping, and the thread's priority."""

import os
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

import pytest

from segrpc.service.engine.base import CancelToken, StageTimes
from segrpc.service.engine.lanes import Lane
from segrpc.service.engine.work import EncodedImage, Ticket, TouchWork, Work
from segrpc.service.errors import DeadlineError
from segrpc.service.images.decode import ImageHeader


def work(name: str, owner: str = "") -> Work:
    return TouchWork("model", name, owner)


class Recorder:
    """Notes what a lane hands over; the first time it waits until it is let go.

    Args:
        turns: How many turns works need that need more than one, by name.
    """

    def __init__(self, **turns: int) -> None:
        self.seen: list[list[str]] = []
        self.turns = turns
        self.nice: int | None = None
        self.busy, self.go = threading.Event(), threading.Event()

    def __call__(self, tickets: Sequence[Ticket]) -> Sequence[Ticket]:
        names = [str(getattr(ticket.work, "digest", "")) for ticket in tickets]
        self.seen.append(names)
        self.nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        self.busy.set()
        assert self.go.wait(30)
        unfinished = []
        for name, ticket in zip(names, tickets, strict=True):
            self.turns[name] = self.turns.get(name, 1) - 1
            if self.turns[name]:
                unfinished.append(ticket)
            else:
                ticket.settle(EncodedImage(ImageHeader(1, 1, 1), StageTimes()))
        return unfinished


@pytest.mark.parametrize(("most", "seen"), [(1, [["a"], ["b"], ["c"], ["d"]]), (2, [["a"], ["b", "c"], ["d"]])])
def test_works_are_done_in_order_and_those_that_wait_together(most: int, seen: list[list[str]]) -> None:
    recorder = Recorder()
    lane = Lane("test", recorder, most=most)
    futures = [lane.submit(work("a"), CancelToken())]
    assert recorder.busy.wait(30)
    futures += [lane.submit(work(name), CancelToken()) for name in "bcd"]
    recorder.go.set()
    lane.close()
    assert recorder.seen == seen
    waited = [future.result(0).times.queue for future in futures]
    assert min(waited) > 0
    with pytest.raises(RuntimeError, match="closed"):
        lane.submit(work("e"), CancelToken())


@pytest.mark.parametrize(("most", "seen"), [(1, ["a1", "b1", "c1", "a3"]), (3, ["a1", "b1 c1 a3"])])
def test_owners_take_turns(most: int, seen: list[str]) -> None:
    recorder, token = Recorder(), CancelToken()
    lane = Lane("test", recorder, most=most)
    lane.submit(work("a1", "a"), CancelToken())
    assert recorder.busy.wait(30)
    lane.submit(work("a2", "a"), token)
    for name in ("a3", "b1", "c1"):
        lane.submit(work(name, name[0]), CancelToken())
    token.cancel()
    recorder.go.set()
    lane.close()
    assert recorder.seen == [one.split() for one in seen]


@pytest.mark.parametrize(
    ("most", "seen"), [(1, ["a1", "b1", "a1", "b2", "a1", "a2"]), (2, ["a1", "b1 a1", "b2 a1", "a2"])]
)
def test_a_work_of_many_turns_is_done_between_those_of_others(most: int, seen: list[str]) -> None:
    recorder = Recorder(a1=3)
    lane = Lane("test", recorder, most=most)
    futures = [lane.submit(work("a1", "a"), CancelToken())]
    assert recorder.busy.wait(30)
    futures += [lane.submit(work(name, name[0]), CancelToken()) for name in ("a2", "b1", "b2")]
    recorder.go.set()
    lane.close()
    assert recorder.seen == [one.split() for one in seen]
    assert all(future.done() for future in futures)


def test_a_cancelled_work_leaves_the_queue_at_once() -> None:
    recorder = Recorder()
    lane = Lane("test", recorder)
    running, token = CancelToken(), CancelToken()
    first = lane.submit(work("a"), running)
    assert recorder.busy.wait(30)
    dropped = lane.submit(work("b"), token)
    token.cancel()
    running.cancel()
    with pytest.raises(DeadlineError):
        dropped.result(0)
    with pytest.raises(DeadlineError):
        lane.submit(work("c"), token).result(0)
    assert not first.done()  # what runs looks at its token by itself
    recorder.go.set()
    lane.close()
    assert recorder.seen == [["a"]]


def test_an_exception_is_for_whoever_waits() -> None:
    def fail(tickets: Sequence[Ticket]) -> NoReturn:
        raise KeyError("words")

    lane = Lane("test", fail)
    for _ in range(2):
        with pytest.raises(KeyError, match="words"):
            lane.submit(work("a"), CancelToken()).result(30)
    lane.close()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_a_lane_can_have_a_lower_priority() -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    recorder = Recorder()
    recorder.go.set()
    lane = Lane("test", recorder, nice=10)
    lane.submit(work("a"), CancelToken()).result(30)
    lane.close()
    assert recorder.nice == 10
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_a_token_tells_once_and_can_be_told_to_forget() -> None:
    token, told = CancelToken(), []
    token.on_cancel(lambda: told.append("a"))
    forget = token.on_cancel(lambda: told.append("b"))
    forget()
    forget()
    token.check()
    token.cancel()
    token.cancel()
    token.on_cancel(lambda: told.append("c"))
    assert told == ["a", "c"]
    with pytest.raises(DeadlineError, match="caller left"):
        token.check()
    assert (CancelToken().remaining(), CancelToken(-1.0).remaining()) == (None, 0.0)
