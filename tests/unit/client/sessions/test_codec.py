"""Edits and results, and their messages."""

from typing import Any

import numpy as np
import pytest

from segrpc.client import (
    AddPoints,
    ClearBox,
    Edit,
    MovePoint,
    Redo,
    RemovePoint,
    Reset,
    SelectMask,
    SetBox,
    SetMask,
    Undo,
)
from segrpc.client.codec import tensor_array, tensor_message
from segrpc.client.sessions import codec
from segrpc.v1 import refine_pb2, types_pb2
from tests.unit.client.sessions.responses import result, round_of

FG, BG = types_pb2.POINT_LABEL_FOREGROUND, types_pb2.POINT_LABEL_BACKGROUND


@pytest.mark.parametrize(
    ("edit", "action"),
    [
        (MovePoint("p", 1, 2), {"move_point": refine_pb2.MovePoint(point_id="p", x=1, y=2)}),
        (RemovePoint("p"), {"remove_point": refine_pb2.RemovePoint(point_id="p")}),
        (SetBox(1, 2, 3, 4), {"set_box": types_pb2.Box(x_min=1, y_min=2, x_max=3, y_max=4)}),
        (ClearBox(), {"clear_box": refine_pb2.ClearBox()}),
        (SelectMask(2), {"select_mask": refine_pb2.SelectMask(index=2)}),
        (SelectMask(0), {"select_mask": refine_pb2.SelectMask()}),
        (Undo(), {"undo": refine_pb2.Undo(steps=1)}),
        (Redo(3), {"redo": refine_pb2.Redo(steps=3)}),
        (Reset(), {"reset": refine_pb2.Reset()}),
    ],
)
def test_edits(edit: Edit, action: dict[str, Any]) -> None:
    assert codec.edit_message(edit) == refine_pb2.Edit(object_id="1", **action)


@pytest.mark.parametrize("points", [[(1, 2), (3, 4)], np.array([[1, 2], [3, 4]])])
def test_points(points: Any) -> None:
    message = codec.edit_message(AddPoints(points, [1, 0], ["p", "q"], object_id="cup"))
    assert message.object_id == "cup"
    assert [(p.x, p.y, p.label) for p in message.add_points.points] == [(1, 2, FG), (3, 4, BG)]
    assert message.add_points.point_ids == ["p", "q"]
    assert [p.label for p in codec.edit_message(AddPoints(points)).add_points.points] == [FG, FG]


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4)])
def test_logits(shape: tuple[int, ...]) -> None:
    logits = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    sent = codec.edit_message(SetMask(logits)).set_mask
    assert list(sent.shape) == [1, 4, 4]
    assert tensor_array(sent).tobytes() == logits.tobytes()


@pytest.mark.parametrize("edit", [Undo(0), Redo(-1), AddPoints([[(1, 2)], [(3, 4)]]), SetMask(np.zeros((2, 4, 4)))])
def test_what_does_not_fit_is_refused(edit: Edit) -> None:
    with pytest.raises(ValueError, match=r"steps|points|logits"):
        codec.edit_message(edit)


def test_what_is_no_edit_is_refused() -> None:
    for wrong in (Edit(), refine_pb2.Undo(), None):
        with pytest.raises(TypeError, match="is no edit"):
            codec.edit_message(wrong)  # type: ignore[arg-type]


def test_a_result() -> None:
    one = round_of(7, (1, 2), mask_revision=3, mask_index=1)
    one.prompt.box.CopyFrom(types_pb2.Box(x_max=4, y_max=2))
    one.point_ids.append("p")
    response = result(9, 7, rounds=[one], scores=(0.25, 0.75))
    response.result.selected_mask = 1
    logits = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    response.result.mask_logits.CopyFrom(tensor_message(logits.astype(np.float16)))
    found = codec.refine_result(response)
    assert (found.object_id, found.revision, found.applied_seq, found.shown_revision) == ("1", 7, 9, 7)
    assert found.mask is found.prediction.masks[1]
    assert found.timing is None
    assert found.logits is not None
    assert found.logits.dtype == np.float32
    np.testing.assert_array_equal(found.logits, logits)
    (computed,) = found.rounds
    assert (computed.points, computed.labels, computed.point_ids) == (((1.0, 2.0),), (0,), ("p",))
    assert computed.box == (0, 0, 4, 2)
    assert (computed.mask_revision, computed.mask_index, computed.mask_seq) == (3, 1, 0)


def test_a_result_without_masks() -> None:
    found = codec.refine_result(result(1, 2, shown=0, scores=()))
    assert found.mask is None
    assert found.shown_revision == 0
