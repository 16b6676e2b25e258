from dataclasses import replace

import pytest
from pydantic import ByteSize

from segrpc.service.admission.ledger import Ledger
from segrpc.service.admission.limits import Limits
from segrpc.service.errors import OverloadedError, SegrpcError, SessionNotFoundError, SessionTakenError
from segrpc.service.sessions.session import RefineOptions
from segrpc.service.sessions.store import Attachment, Lifetimes, SessionStore
from tests.unit.sessions.building import IMAGE, SCENE, click, step


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Stream:
    """Remembers why its session was taken away."""

    def __init__(self) -> None:
        self.ends: list[type[SegrpcError]] = []

    def end(self, reason: SegrpcError) -> None:
        self.ends.append(type(reason))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> SessionStore:
    limits = Limits(max_open_sessions=2, session_bytes=ByteSize(5000))
    return SessionStore(Ledger(limits), Lifetimes(idle_seconds=60, detached_seconds=10), clock)


def opened(store: SessionStore, stream: Stream | None = None) -> Attachment:
    return store.open(IMAGE, SCENE, RefineOptions(), (stream or Stream()).end)


def test_a_detached_session_is_resumed_as_it_was(store: SessionStore, clock: Clock) -> None:
    first = opened(store)
    step(first.session, click(1))
    store.detach(first)
    assert (len(store), store.attached) == (1, 0)
    clock.now = 9
    second = store.resume("", first.session.id, first.token, Stream().end)
    assert second.session is first.session
    assert (second.resumed, second.session.revision, store.attached) == (True, 1, 1)


def test_resuming_takes_the_session_away_from_its_stream(store: SessionStore) -> None:
    stream = Stream()
    first = opened(store, stream)
    second = store.resume("", first.session.id, first.token, Stream().end)
    assert stream.ends == [SessionTakenError]
    store.detach(first)  # the first stream's end has no say any more
    store.close(first)
    assert (len(store), store.attached) == (1, 1)
    store.close(second)
    assert len(store) == 0


@pytest.mark.parametrize("wrong", ["session", "token"])
def test_only_the_token_opens_a_session(store: SessionStore, wrong: str) -> None:
    first = opened(store)
    session_id = "other" if wrong == "session" else first.session.id
    token = "öther" if wrong == "token" else first.token
    with pytest.raises(SessionNotFoundError):
        store.resume("", session_id, token, Stream().end)


def test_the_token_of_another_owner_opens_nothing(store: SessionStore) -> None:
    stream = Stream()
    first = store.open(replace(IMAGE, owner="me"), SCENE, RefineOptions(), stream.end)
    for owner in ("you", ""):
        with pytest.raises(SessionNotFoundError):
            store.find(owner, first.session.id, first.token)
        with pytest.raises(SessionNotFoundError):
            store.resume(owner, first.session.id, first.token, Stream().end)
    assert stream.ends == []
    assert store.find("me", first.session.id, first.token) is first.session


def test_detached_sessions_expire(store: SessionStore, clock: Clock) -> None:
    first = opened(store)
    store.detach(first)
    clock.now = 10
    with pytest.raises(SessionNotFoundError):
        store.resume("", first.session.id, first.token, Stream().end)
    assert (len(store), store.nbytes) == (0, 0)


def test_idle_sessions_expire_and_their_streams_are_told(store: SessionStore, clock: Clock) -> None:
    idle, busy = Stream(), Stream()
    opened(store, idle)
    used = opened(store, busy)
    clock.now = 59
    store.touch(used)
    clock.now = 60
    store.expire()
    assert (idle.ends, busy.ends, len(store)) == ([SessionNotFoundError], [], 1)


def test_there_is_room_for_so_many(store: SessionStore) -> None:
    first = opened(store)
    opened(store)
    with pytest.raises(OverloadedError) as caught:
        opened(store)
    assert caught.value.retry_after
    store.close(first)
    opened(store)


def test_there_is_so_much_memory(store: SessionStore) -> None:
    first = opened(store)
    for seq in range(1, 6):
        step(first.session, click(seq))
    with pytest.raises(OverloadedError, match="session_bytes") as caught:
        opened(store)
    assert caught.value.retry_after
    store.close(first)
    assert store.nbytes == 0
    opened(store)
