import numpy as np
import pytest

from segrpc.service.errors import InvalidFieldError, OutOfMemoryError
from segrpc.service.schemas import ModelMetadata, NDArrayFloat
from segrpc.service.sessions.edits import (
    ClearBox,
    Malformed,
    Redo,
    RemovePoint,
    Reset,
    SelectMask,
    SetBox,
    SetMask,
    Undo,
)
from segrpc.service.sessions.history import MaskSource
from segrpc.service.sessions.session import ObjectResult
from tests.unit.sessions.building import SIZE, click, edit, only, rejection, result, session, step

MASK = NDArrayFloat.from_numpy(np.full((1, SIZE, SIZE), 9.0))


def test_the_first_round_gives_candidates_and_later_ones_refine_the_best() -> None:
    one = session()
    one.receive(click(1, 1, 2))
    plan = one.plan()
    assert plan is not None
    assert plan.input is not None
    assert (plan.input.multimask_output, plan.input.mask_input) == (True, None)
    assert plan.input.points == [[[1.0, 2.0]]]
    first = only(one.commit(plan, result(plan, best=2, value=5)))
    assert (first.revision, first.applied_seq, first.step.selected) == (1, 1, 2)

    one.receive(click(2, 3, 4, label=0))
    plan = one.plan()
    assert plan is not None
    assert plan.input is not None
    assert plan.input.multimask_output is False
    assert plan.input.labels == [[1, 0]]
    assert plan.input.mask_input is not None
    np.testing.assert_array_equal(plan.input.mask_input.to_numpy(), np.full((1, 1, SIZE, SIZE), 7.0))
    (computed,) = only(one.commit(plan, result(plan))).rounds
    assert computed.mask == MaskSource(revision=1, index=2)


def test_without_feedback_later_rounds_see_prompts_only() -> None:
    one = session(feed_back=False)
    step(one, click(1))
    (computed,) = only(step(one, click(2))).rounds
    assert computed.mask == MaskSource()
    assert not computed.multimask_output


def test_a_model_without_logits_gets_none_back() -> None:
    one = session(metadata=ModelMetadata())
    one.receive(click(1))
    plan = one.plan()
    assert plan is not None
    assert plan.input is not None
    assert not plan.input.return_logits


def test_the_selected_candidate_is_the_one_that_is_refined() -> None:
    one = session()
    step(one, click(1), best=2)
    chosen = only(step(one, edit(2, SelectMask(1))))
    assert (chosen.step.selected, chosen.rounds, chosen.times) == (1, (), None)
    (computed,) = only(step(one, click(3))).rounds
    assert computed.mask == MaskSource(revision=1, index=1)


def test_a_given_mask_starts_one_round() -> None:
    one = session(feed_back=False)
    (computed,) = only(step(one, edit(1, SetMask(MASK)), click(2))).rounds  # folded into one
    assert computed.mask == MaskSource(seq=1)
    (computed,) = only(step(one, click(3))).rounds
    assert computed.mask == MaskSource()


def test_a_mask_alone_is_a_prompt() -> None:
    one = session()
    one.receive(edit(1, SetMask(MASK)))
    plan = one.plan()
    assert plan is not None
    assert plan.input is not None
    assert plan.input.num_prompts == 1


def test_undo_and_redo_go_over_rounds_and_compute_nothing() -> None:
    one = session()
    for seq in (1, 2, 3):
        step(one, click(seq, seq, seq))
    back = only(step(one, edit(4, Undo(2))))
    assert back.step.round is not None
    assert (back.step.round.revision, back.revision, back.times) == (1, 4, None)
    assert [p.x for p in back.step.prompts.points] == [1]
    forward = only(step(one, edit(5, Redo())))
    assert forward.step.round is not None
    assert forward.step.round.revision == 2
    # A new round goes on from what is shown, and drops what was undone.
    (computed,) = only(step(one, click(6, 9, 9))).rounds
    assert computed.mask == MaskSource(revision=2, index=0)
    assert [p.x for p in computed.prompts.points] == [1, 2, 9]
    assert rejection(step(one, edit(7, Redo()))).violations[0].field == "edit.redo.steps"


def test_undo_reaches_the_object_without_prompts() -> None:
    one = session()
    step(one, click(1))
    assert only(step(one, edit(2, Undo()))).step.output is None
    assert rejection(step(one, edit(3, Undo()))).violations[0].field == "edit.undo.steps"
    (computed,) = only(step(one, click(4))).rounds
    assert computed.multimask_output  # it is a first round again


def test_reset_and_removing_the_last_prompt_leave_no_masks_and_can_be_undone() -> None:
    one = session()
    step(one, click(1, name="p"), edit(2, SetBox((1, 1, 5, 5))))
    assert only(step(one, edit(3, Reset()))).step.output is None
    assert only(step(one, edit(4, Undo()))).step.prompts.box == (1, 1, 5, 5)
    emptied = [only(step(one, edit(5, ClearBox()))), only(step(one, edit(6, RemovePoint("p"))))]
    assert [event.step.output is None for event in emptied] == [False, True]
    (computed,) = only(step(one, click(7))).rounds
    assert computed.multimask_output
    assert computed.mask == MaskSource()


def test_waiting_edits_of_an_object_are_folded() -> None:
    one = session()
    events = step(one, click(1), click(2), click(3, object_id="b"), click(4), click(5))
    assert [(e.object_id, e.applied_seq) for e in events if isinstance(e, ObjectResult)] == [
        ("a", 2),
        ("b", 3),
        ("a", 5),
    ]


def test_what_precedes_an_undo_is_computed_first() -> None:
    one = session()
    first, undone = step(one, click(1), click(2), edit(3, Undo()))
    assert isinstance(first, ObjectResult)
    assert isinstance(undone, ObjectResult)
    assert len(first.rounds) == 1
    assert undone.step.output is None


def test_each_edit_has_its_own_round_under_every_edit() -> None:
    one = session(every_edit=True)
    events = step(one, click(1), click(2, -1, 0), click(3))
    assert [(type(event).__name__, event.applied_seq) for event in events] == [
        ("ObjectResult", 1),
        ("Rejection", 2),
        ("ObjectResult", 3),
    ]


def test_a_wrong_edit_changes_nothing() -> None:
    one = session()
    step(one, click(1))
    wrong = edit(2, Malformed(InvalidFieldError.of("edit", "no action")))
    assert rejection(step(one, wrong)).violations[0].field == "edit"
    assert rejection(step(one, click(3, 999, 1))).applied_seq == 3
    assert one.revision == 1
    (computed,) = only(step(one, click(4, 2, 2))).rounds
    assert [p.x for p in computed.prompts.points] == [1, 2]


def test_a_wrong_edit_among_folded_ones_is_left_out() -> None:
    one = session()
    refused, applied = step(one, click(1), click(2, 999, 1), click(3, 3, 3))
    assert (refused.applied_seq, applied.applied_seq) == (3, 3)
    assert isinstance(applied, ObjectResult)
    assert [p.x for p in applied.step.prompts.points] == [1, 3]


def test_an_edit_that_arrives_twice_is_applied_once() -> None:
    one = session()
    step(one, click(1), click(5))
    assert step(one, click(1), click(5)) == []
    assert rejection(step(one, click(3))).violations[0].field == "seq"
    assert only(step(one, click(6))).revision == 2


def test_numbers_may_have_many_gaps() -> None:
    one = session()
    step(one, *[click(seq, object_id=str(seq)) for seq in range(2, 3000, 2)])
    assert step(one, click(2), click(2998)) == []
    assert rejection(step(one, click(2997))).reason == "INVALID_FIELD"


def test_edits_stay_pending_until_they_are_committed() -> None:
    one = session()
    one.receive(click(1))
    assert one.plan() is not None  # and its computation is lost
    assert (one.pending, one.applied_seq) == (1, 0)
    assert only(step(one)).applied_seq == 1


def test_edits_whose_round_fails_are_rejected() -> None:
    one = session()
    step(one, click(1))
    one.receive(click(2, 2, 2))
    one.receive(click(3, 999, 3))
    plan = one.plan()
    assert plan is not None
    reasons = [
        event.reason for event in one.reject(plan, OutOfMemoryError("full")) if not isinstance(event, ObjectResult)
    ]
    assert reasons == ["OUT_OF_MEMORY", "INVALID_FIELD"]
    (computed,) = only(step(one, click(4, 4, 4))).rounds
    assert [p.x for p in computed.prompts.points] == [1, 4]


def test_cancelling_drops_what_was_not_computed() -> None:
    one = session()
    step(one, click(1))
    for seq in (2, 3, 4):
        one.receive(click(seq, seq, seq))
    plan = one.plan()
    assert plan is not None
    cancelled = one.cancel_through(3)
    assert plan.cancelled
    assert [(c.seq, c.reason) for c in cancelled] == [(2, "CANCELLED"), (3, "CANCELLED")]
    assert one.applied_seq == 3
    (computed,) = only(step(one)).rounds
    assert [p.x for p in computed.prompts.points] == [1, 4]
    assert one.cancel_through(99) == []
    assert step(one, click(2)) == []  # seen


def test_resuming_tells_what_changed() -> None:
    one = session()
    step(one, click(1), click(2, object_id="b"), click(3, object_id="c"))
    step(one, click(4), click(5, 999, 1))
    assert [e.object_id for e in one.resume(0) if isinstance(e, ObjectResult)] == ["b", "c", "a"]
    refused, changed = one.resume(3)
    assert refused.applied_seq == 5
    assert isinstance(changed, ObjectResult)
    assert [r.revision for r in changed.rounds] == [4]
    assert one.resume(4) == []  # who has seen revision 4 was told of the rejection before
    with pytest.raises(InvalidFieldError, match="newest revision is 4"):
        one.resume(5)


def test_resuming_tells_all_rounds_that_are_still_there() -> None:
    one = session()
    step(one, click(1))
    step(one, click(2))
    step(one, edit(3, Undo()))
    (event,) = one.resume(0)
    assert isinstance(event, ObjectResult)
    assert [r.revision for r in event.rounds] == [1, 2]
    assert event.step.round is not None
    assert event.step.round.revision == 1


def test_memory_is_accounted_and_given_back() -> None:
    one = session(budget=2000)
    before = one.nbytes
    step(one, click(1))
    assert one.nbytes > before + 3 * SIZE * SIZE * 4
    step(one, click(2))
    assert rejection(step(one, click(3))).reason == "OVERLOADED"
    only(step(one, edit(4, Undo(2))))
    held = one.nbytes
    one.close()
    assert one.nbytes == 0
    assert held > 2000


def test_a_new_round_after_undo_gives_memory_back() -> None:
    one = session()
    for seq in range(1, 6):
        step(one, click(seq))
    high = one.nbytes
    step(one, edit(6, Undo(4)))
    assert one.nbytes == high
    step(one, edit(7, SetBox((1, 1, 5, 5))))
    assert one.nbytes < high
