"""What a session's name stands for, for whom, and how long."""

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
