"""Telling a worker that is stuck from one that is slow, idle, or not looked at."""

from segrpc.service.engine.watchdog import LOOKS, Watchdog
from segrpc.service.engine.work import LaneName


def looks(watchdog: Watchdog, times: int) -> LaneName | None:
    """Look several times; return what the last look said."""
    return [watchdog.look() for _ in range(times)][-1]


def test_who_owes_nothing_is_not_stuck() -> None:
    watchdog = Watchdog()
    assert looks(watchdog, 3 * LOOKS) is None
    watchdog.asked("decode")
    watchdog.answered("decode")
    assert looks(watchdog, 3 * LOOKS) is None


def test_the_lane_that_is_stuck_is_named() -> None:
    lanes: tuple[LaneName, ...] = ("decode", "encode")
    for lane in lanes:
        watchdog = Watchdog()
        watchdog.asked(lane)
        assert looks(watchdog, LOOKS) is None  # it was asked in the middle of an interval, which does not count
        assert watchdog.look() == lane


def test_an_answer_begins_the_time_anew() -> None:
    watchdog = Watchdog()
    watchdog.asked("encode")
    for _ in range(3 * LOOKS):
        watchdog.asked("encode")
        assert looks(watchdog, LOOKS) is None
        watchdog.answered("encode")
    assert looks(watchdog, LOOKS + 1) == "encode"


def test_what_is_asked_meanwhile_does_not() -> None:
    watchdog = Watchdog()
    watchdog.asked("decode")
    for _ in range(LOOKS):
        watchdog.look()
        watchdog.asked("decode")
    assert watchdog.look() == "decode"


def test_answers_of_one_lane_do_not_excuse_the_other() -> None:
    watchdog = Watchdog()
    watchdog.asked("encode")
    for _ in range(LOOKS):
        watchdog.asked("decode")
        watchdog.answered("decode")
        assert watchdog.look() is None
    assert watchdog.look() == "encode"
