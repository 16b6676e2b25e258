"""What a session's name stands for, for whom, and how long."""

from contextlib import suppress

import pytest

from segrpc.service.errors import NoPredictorStateError
from segrpc.service.sessions.current_images import CurrentImages


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def images(clock: Clock) -> CurrentImages:
    return CurrentImages(max_sessions=2, idle_seconds=10, clock=clock)


def test_the_last_image_of_a_session_is_current(images: CurrentImages) -> None:
    images.set("me", "s", "first")
    images.set("me", "s", "second")
    assert images.get("me", "s") == "second"


def test_another_callers_session_of_the_same_name_is_another(images: CurrentImages) -> None:
    images.set("me", "s", "mine")
    with pytest.raises(NoPredictorStateError):
        images.get("you", "s")
    images.set("you", "s", "yours")
    assert (images.get("me", "s"), images.get("you", "s")) == ("mine", "yours")


def test_an_idle_session_is_forgotten_and_a_used_one_is_not(images: CurrentImages, clock: Clock) -> None:
    images.set("me", "idle", "a")
    images.set("me", "used", "b")
    clock.now = 9
    images.get("me", "used")
    clock.now = 18
    assert images.get("me", "used") == "b"
    with pytest.raises(NoPredictorStateError):
        images.get("me", "idle")
    assert len(images) == 1


def test_the_longest_unused_makes_room(images: CurrentImages) -> None:
    images.set("me", "a", "a")
    images.set("me", "b", "b")
    images.get("me", "a")
    images.set("me", "c", "c")
    assert (images.get("me", "a"), images.get("me", "c")) == ("a", "c")
    with pytest.raises(NoPredictorStateError):
        images.get("me", "b")


def known(images: CurrentImages, caller: str, names: str) -> str:
    """The names of a caller's sessions that are remembered; asking counts as use."""
    found = ""
    for name in names:
        with suppress(NoPredictorStateError):
            images.get(caller, name)
            found += name
    return found


def test_who_has_more_than_its_share_forgets_its_own(clock: Clock) -> None:
    images = CurrentImages(max_sessions=6, idle_seconds=10, share=0.5, clock=clock)
    images.set("quiet", "q", "digest")
    for name in "abcdefgh":
        images.set("busy", name, "digest")
    assert len(images) == 6  # while nobody needs it, anybody may use all the room
    assert known(images, "quiet", "q") == "q"
    assert known(images, "busy", "abcdefgh") == "defgh"
    for name in "rst":
        images.set("quiet", name, "digest")
    assert known(images, "quiet", "qrst") == "rst"  # with four it is the one beyond its share
    assert known(images, "busy", "defgh") == "fgh"


def test_idle_sessions_do_not_count_for_the_share(clock: Clock) -> None:
    images = CurrentImages(max_sessions=4, idle_seconds=10, share=0.5, clock=clock)
    for name in "abcd":
        images.set("was busy", name, "digest")
    clock.now = 11
    images.set("was busy", "a", "digest")
    for name in "abcd":
        images.set("busy", name, "digest")
    assert known(images, "was busy", "a") == "a"
    assert known(images, "busy", "abcd") == "bcd"
