"""What a session sends, when, and what its waiters are told: without a network."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import grpc
import numpy as np
import pytest

from segrpc.client import (
    AddPoints,
    EditRejectedError,
    InvalidRequestError,
    MovePoint,
    NotFoundError,
    OverloadedError,
    SegmentationError,
    ServerError,
    SessionClosedError,
    SessionTakenError,
    SetMask,
    UnauthenticatedError,
    UnavailableError,
)
from segrpc.client.codec import load_image
from segrpc.client.errors import _Details
from segrpc.client.flow import CHUNK_BYTES, INLINE_BYTES, SentImages
from segrpc.client.sessions.source import ExistingSession, NewSession
from segrpc.client.sessions.state import SessionState
from segrpc.client.sessions.types import RefineOptions
from segrpc.v1 import refine_pb2
from segrpc.v1.refine_pb2 import RefineRequest, RefineResponse
from tests.unit.client.sessions.responses import IMAGE, opened, rejected, result, round_of

SMALL = b"small image"
LARGE = bytes(INLINE_BYTES + 1)
CLICK = AddPoints([(1, 1)])


def failure(kind: type[SegmentationError], code: grpc.StatusCode, reason: str = "", **more: Any) -> SegmentationError:
    return kind("failed", code, _Details(reason=reason, **more))


BROKEN = failure(UnavailableError, grpc.StatusCode.UNAVAILABLE)
UNKNOWN_SESSION = failure(NotFoundError, grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")


def make(image: bytes = SMALL, sent: SentImages | None = None, reconnect: float = 60.0, **options: Any) -> SessionState:
    chosen: RefineOptions = options  # type: ignore[assignment]
    return SessionState(NewSession(load_image(image), sent or SentImages()), chosen, reconnect)


def connect(state: SessionState, response: RefineResponse | None = None) -> list[RefineRequest]:
    """Open a stream; return what was sent, but for the config."""
    list(state.opening(0.0))
    state.received(response or opened())
    return state.take_messages()


def ready(**options: Any) -> SessionState:
    state = make(**options)
    connect(state)
    return state


def kinds(requests: Iterable[RefineRequest]) -> list[str]:
    """Describe requests: ``edit 3``, ``cancel 2``, ``finish``."""
    words = []
    for request in requests:
        kind = request.WhichOneof("payload") or ""
        words.append(f"{kind} {request.cancel.seq if kind == 'cancel' else request.seq or ''}".strip())
    return words


# Opening


def test_the_image_goes_with_the_config_and_the_next_time_by_its_digest() -> None:
    sent = SentImages()
    state = make(sent=sent, model="sam", edit_policy="every_edit", mask_feedback="none", multimask_output=False)
    (first,) = state.opening(0.0)
    assert first.config.image.data == SMALL
    assert first.config.model == "sam"
    assert first.config.edit_policy == refine_pb2.EDIT_POLICY_EVERY_EDIT
    assert first.config.mask_feedback == refine_pb2.MASK_FEEDBACK_NONE
    assert not first.config.output.multimask_output
    assert first.config.output.HasField("multimask_output")
    state.received(opened())
    (second,) = make(sent=sent).opening(0.0)
    assert second.config.image.digest == load_image(SMALL).digest


def test_a_large_image_follows_in_chunks() -> None:
    config, *chunks = make(LARGE).opening(0.0)
    assert config.config.upload.size == len(LARGE)
    assert config.config.upload.digest == load_image(LARGE).digest
    assert [(chunk.image.offset, len(chunk.image.data)) for chunk in chunks] == [(0, CHUNK_BYTES), (CHUNK_BYTES, 1)]


@pytest.mark.parametrize(("image", "source"), [(SMALL, "image"), (LARGE, "upload")])
def test_an_image_that_the_server_forgot_is_sent_again(image: bytes, source: str) -> None:
    sent = SentImages()
    sent.add(load_image(image).digest)
    state = make(image, sent)
    (first,) = state.opening(0.0)
    assert first.config.image.digest
    assert state.lost(failure(NotFoundError, grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND"), 0.0) == 0.0
    assert load_image(image).digest not in sent
    again = next(iter(state.opening(0.0)))
    assert again.config.WhichOneof("source") == source


def test_a_digest_that_the_server_does_not_know_is_an_error() -> None:
    state = SessionState(NewSession(load_image(IMAGE.digest), SentImages()), {}, 60.0)
    list(state.opening(0.0))
    assert state.lost(failure(NotFoundError, grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND"), 0.0) is None
    with pytest.raises(NotFoundError):
        state.opened()


@pytest.mark.parametrize(
    "error",
    [
        failure(OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", retry_after=5.0),
        BROKEN,
        failure(InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
    ],
)
def test_a_session_that_cannot_be_opened_is_the_callers_business(error: SegmentationError) -> None:
    state = make()
    list(state.opening(0.0))
    assert state.opened() is None
    assert state.lost(error, 0.0) is None
    with pytest.raises(type(error)) as caught:
        state.opened()
    assert caught.value is error


def test_what_the_server_says_on_opening() -> None:
    state = ready()
    image = state.opened()
    assert image is not None
    assert (image.digest, image.width, image.height) == (IMAGE.digest, 4, 2)
    assert (state.session_id, state.resume_token) == ("the-session", "secret")
    assert state.expire_time == datetime(2027, 1, 15, 8, tzinfo=UTC)
    assert state.draining is None
    response = RefineResponse(draining=refine_pb2.Draining())
    response.draining.close_time.FromSeconds(1_800_000_000)
    state.received(response)
    assert state.draining == datetime(2027, 1, 15, 8, tzinfo=UTC)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"edit_policy": "some"}, "latest_wins"), ({"mask_feedback": "some"}, "logits"), ({"tensor_dtype": "f8"}, "f8")],
)
def test_unknown_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(**options)
    with pytest.raises(TypeError, match="labels"):
        make(labels=[1])


def test_nothing_can_be_edited_before_the_session_is_open() -> None:
    with pytest.raises(SessionClosedError, match="with statement"):
        make().submit(CLICK)


# Edits and answers


def test_edits_are_numbered_and_sent_at_once() -> None:
    state = ready()
    assert [state.submit(CLICK), state.submit(CLICK)] == [1, 2]
    assert kinds(state.take_messages()) == ["edit 1", "edit 2"]
    assert state.take_messages() == []


def test_a_malformed_edit_takes_no_number() -> None:
    state = ready()
    for wrong in (AddPoints([(1, 2, 3)]), AddPoints([(1, 2)], [1, 0]), SetMask(np.zeros((3, 4, 4)))):
        with pytest.raises(ValueError, match=r"points|labels|logits"):
            state.submit(wrong)
    assert state.submit(CLICK) == 1


def test_a_waiter_gets_the_result_that_reflects_its_edit() -> None:
    state = ready()
    first, other, second = state.submit(CLICK), state.submit(AddPoints([(1, 1)], object_id="b")), state.submit(CLICK)
    state.received(result(first, 1))
    assert state.outcome(first) is state.ledger.latest["1"]
    state.received(result(other, 2, object_id="b"))
    assert state.outcome(second) is None, "a result of another object is none"
    state.received(result(second, 3))
    answer = state.outcome(second)
    assert answer is not None
    assert (answer.object_id, answer.revision, answer.applied_seq) == ("1", 3, 3)
    assert state.outcome(first) is answer, "the newest of the object"


def test_a_result_of_another_object_is_no_answer() -> None:
    state = ready()
    first, other = state.submit(CLICK), state.submit(AddPoints([(1, 1)], object_id="b"))
    state.received(result(2, 2, object_id="b"))
    assert state.outcome(first) is None
    assert state.outcome(other) is not None
    state.received(result(2, 2))
    assert state.outcome(first) is state.ledger.latest["1"]


def test_a_folded_result_answers_all_its_edits() -> None:
    state = ready()
    seqs = [state.submit(CLICK) for _ in range(3)]
    state.received(result(3, 1))
    assert {id(state.outcome(seq)) for seq in seqs} == {id(state.ledger.latest["1"])}


def test_a_rejection_reaches_its_waiter_alone() -> None:
    state = ready()
    wrong, right = state.submit(CLICK), state.submit(CLICK)
    state.received(rejected(wrong, 1))
    state.received(result(right, 1))
    with pytest.raises(EditRejectedError) as caught:
        state.outcome(wrong)
    assert (caught.value.seq, caught.value.reason) == (1, "INVALID_FIELD")
    assert caught.value.violations[0].field == "edit.add_points.points[0].x"
    assert state.outcome(right) is not None
    assert state.ledger.rejections == {1: caught.value}


def test_waiting_for_an_edit_that_was_never_sent() -> None:
    with pytest.raises(ValueError, match="number 7"):
        ready().outcome(7)


def test_cancelling() -> None:
    state = ready()
    for _ in range(3):
        state.submit(CLICK)
    state.cancel(2)
    state.cancel(None)
    state.cancel(99)
    assert kinds(state.take_messages())[3:] == ["cancel 2", "cancel 3", "cancel 3"]
    state.received(rejected(1, 1, "CANCELLED"))
    with pytest.raises(EditRejectedError) as caught:
        state.outcome(1)
    assert caught.value.code is grpc.StatusCode.CANCELLED


# Resuming


def test_edits_that_were_not_applied_are_sent_again() -> None:
    state = ready()
    logits = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    for edit in (CLICK, CLICK, SetMask(logits), MovePoint("p", 1, 1)):
        state.submit(edit)
    sent = state.take_messages()
    state.received(result(1, 1))
    assert state.lost(BROKEN, 0.0) is not None
    (again,) = state.opening(1.0)
    assert again.config.resume == refine_pb2.Resume(session_id="the-session", resume_token="secret", last_revision=0)
    state.received(opened(2, revision=2, resumed=True))
    assert state.take_messages() == sent[2:]
    assert state.outcome(2) is None
    state.received(result(2, 2))
    assert state.outcome(2) is not None


def test_what_is_done_while_the_connection_is_broken_is_sent_afterwards() -> None:
    state = ready()
    state.submit(CLICK)
    state.lost(BROKEN, 0.0)
    state.submit(CLICK)
    state.cancel(1)
    state.submit(CLICK)
    state.finish()
    assert state.take_messages() == []
    assert kinds(connect(state, opened(0, resumed=True))) == ["edit 1", "edit 2", "edit 3", "cancel 1", "finish"]


def test_edits_are_not_sent_before_the_server_has_said_what_it_knows() -> None:
    state = ready()
    state.lost(BROKEN, 0.0)
    list(state.opening(0.0))
    state.submit(CLICK)
    assert state.take_messages() == []


def test_a_result_that_arrives_twice_counts_once() -> None:
    state = ready(edit_policy="every_edit")
    state.submit(CLICK)
    state.received(result(1, 1, rounds=[round_of(1, (1, 1))]))
    first = state.outcome(1)
    state.lost(BROKEN, 0.0)
    connect(state, opened(1, revision=1, resumed=True))
    state.received(result(1, 1, rounds=[round_of(1, (1, 1))]))
    assert state.outcome(1) is first
    assert state.unread_result() == (first,)
    assert state.unread_result() is None
    assert list(state.ledger.history.rounds) == [1]


def resumed_from(state: SessionState) -> int:
    state.lost(BROKEN, 0.0)
    (request,) = state.opening(0.0)
    return request.config.resume.last_revision


def test_resuming_starts_where_nothing_is_missing() -> None:
    state = ready()
    state.submit(CLICK)
    state.received(result(1, 1))
    state.submit(CLICK)
    state.submit(AddPoints([(1, 1)], object_id="b"))
    state.submit(CLICK)
    # Revision 2, of the first object, was overtaken by 4 before it was sent; the connection breaks in between.
    state.received(result(3, 3, object_id="b"))
    assert resumed_from(state) == 1
    connect(state, opened(4, revision=4, resumed=True))
    state.received(result(4, 4, rounds=[round_of(2), round_of(4)]))
    state.received(result(4, 4, object_id="b", rounds=[round_of(3)]))
    assert sorted(state.ledger.history.rounds) == [2, 3, 4]
    state.submit(CLICK)
    state.received(result(5, 5))
    assert resumed_from(state) == 5


def test_results_that_are_being_sent_again_are_not_taken_for_seen() -> None:
    state = ready()
    for object_id in "ab":
        state.submit(AddPoints([(1, 1)], object_id=object_id))
    state.lost(BROKEN, 0.0)
    connect(state, opened(2, revision=2, resumed=True))
    state.received(result(2, 2, object_id="a"))
    assert resumed_from(state) == 0
    connect(state, opened(2, revision=2, resumed=True))
    state.received(result(2, 2, object_id="b"))
    assert state.outcome(2) is not None
    assert resumed_from(state) == 0


@pytest.mark.parametrize(
    "error",
    [
        None,
        BROKEN,
        failure(UnavailableError, grpc.StatusCode.UNAVAILABLE, "DRAINING"),
        failure(ServerError, grpc.StatusCode.UNKNOWN),
        failure(OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
        failure(UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"),
    ],
)
def test_what_breaks_the_connection_only(error: SegmentationError | None) -> None:
    state = ready()
    state.submit(CLICK)
    assert state.lost(error, 0.0) == 0.05
    assert state.outcome(1) is None


@pytest.mark.parametrize(
    "error",
    [
        failure(SessionTakenError, grpc.StatusCode.ABORTED, "SESSION_TAKEN"),
        UNKNOWN_SESSION,
        failure(InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        failure(ServerError, grpc.StatusCode.INTERNAL, "INTERNAL"),
        failure(OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),  # a message above the limit
        SessionClosedError(),
    ],
)
def test_what_ends_the_session(error: SegmentationError) -> None:
    state = ready()
    state.submit(CLICK)
    state.received(result(1, 1))
    state.submit(CLICK)
    assert state.lost(error, 0.0) is None
    assert state.outcome(1) is not None, "what was answered stays answered"
    with pytest.raises(type(error)):
        state.outcome(2)
    with pytest.raises(type(error)):
        state.submit(CLICK)
    assert state.unread_result() == (state.ledger.latest["1"],)
    for look in (state.unread_result, state.finished):
        with pytest.raises(type(error)):
            look()


def test_a_credential_that_is_refused_at_the_door_ends_the_session() -> None:
    refused = failure(UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID")
    state = ready()
    assert state.lost(refused, 0.0) is not None, "another token may be had"
    list(state.opening(0.0))
    assert state.lost(refused, 0.0) is None
    with pytest.raises(UnauthenticatedError):
        state.submit(CLICK)


def test_the_delay_doubles_until_the_time_is_over() -> None:
    state = ready(reconnect=10.0)
    state.submit(CLICK)
    now, delays = 100.0, []
    while (delay := state.lost(BROKEN, now)) is not None:
        delays.append(delay)
        now += delay
        list(state.opening(now))
    assert delays == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0])
    with pytest.raises(UnavailableError):
        state.outcome(1)


def test_the_server_may_ask_for_a_longer_delay() -> None:
    state = ready()
    assert state.lost(failure(UnavailableError, grpc.StatusCode.UNAVAILABLE, "DRAINING", retry_after=3.0), 0.0) == 3.0


def test_progress_resets_the_delay() -> None:
    state = ready(reconnect=1.0)
    for i in range(100):
        state.submit(CLICK)
        assert state.lost(BROKEN, float(i)) == 0.05
        connect(state, opened(i, resumed=True))
        state.received(result(i + 1, i + 1))


def test_a_stream_that_breaks_at_once_without_progress_does_not_reset_the_delay() -> None:
    state = ready(reconnect=1.0)
    state.submit(CLICK)
    now, attempts = 0.0, 0
    while (delay := state.lost(BROKEN, now)) is not None:
        now, attempts = now + delay, attempts + 1
        list(state.opening(now))
        state.received(opened(0, resumed=True))
    assert attempts == 4


def test_taking_over_starts_above_the_numbers_that_may_be_under_way() -> None:
    state = SessionState(ExistingSession("the-session", "secret"), {}, 60.0)
    (request,) = state.opening(0.0)
    assert request.config.resume == refine_pb2.Resume(session_id="the-session", resume_token="secret")
    under_way = opened(5, revision=3, resumed=True)
    under_way.opened.last_seq = 9
    state.received(under_way)
    for object_id in "ab":
        state.received(result(5, 3, object_id=object_id))
    assert set(state.ledger.latest) == {"a", "b"}
    assert state.submit(CLICK) == 10


# The end


def test_finishing() -> None:
    state = ready()
    state.submit(CLICK)
    state.finish()
    state.finish()
    assert kinds(state.take_messages()) == ["edit 1", "finish"]
    assert state.finished() is None
    with pytest.raises(SessionClosedError):
        state.submit(CLICK)
    state.received(result(1, 1))
    assert state.lost(None, 0.0) is None
    assert state.finished()
    assert state.unread_result() == (state.ledger.latest["1"],)
    assert state.unread_result() == ()


def test_finishing_over_a_broken_connection() -> None:
    state = ready()
    state.finish()
    assert state.lost(BROKEN, 0.0) is not None
    list(state.opening(0.0))
    assert state.lost(UNKNOWN_SESSION, 0.0) is None
    assert state.finished()


def test_a_session_that_is_gone_before_everything_was_answered_is_an_error() -> None:
    state = ready()
    state.submit(CLICK)
    state.finish()
    state.lost(BROKEN, 0.0)
    list(state.opening(0.0))
    assert state.lost(UNKNOWN_SESSION, 0.0) is None
    with pytest.raises(NotFoundError):
        state.finished()


def test_detaching() -> None:
    state = ready()
    state.submit(CLICK)
    state.detach()
    assert state.finished() is None, "answers may still come"
    state.received(result(1, 1))
    assert state.lost(None, 0.0) is None
    assert state.finished()
    assert state.outcome(1) is not None
    broken = ready()
    broken.lost(BROKEN, 0.0)
    broken.detach()
    assert broken.finished()


# Iterating


def test_the_newest_result_of_each_object_is_unread() -> None:
    state = ready()
    for revision, object_id in ((1, "a"), (2, "b"), (3, "a")):
        state.submit(AddPoints([(1, 1)], object_id=object_id))
        state.received(result(revision, revision, object_id=object_id))
    taken = [state.unread_result() for _ in range(3)]
    assert [one and one[0].revision for one in taken] == [2, 3, None]


def test_each_result_is_unread_if_each_edit_is_answered() -> None:
    state = ready(edit_policy="every_edit")
    for revision in (1, 2, 3):
        state.submit(CLICK)
        state.received(result(revision, revision))
    taken = [state.unread_result() for _ in range(4)]
    assert [one and one[0].revision for one in taken] == [1, 2, 3, None]
