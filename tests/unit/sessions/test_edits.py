import math

import numpy as np
import pytest

from segrpc.service.errors import CapabilityMissingError, InvalidFieldError
from segrpc.service.schemas import ModelMetadata, NDArrayFloat
from segrpc.service.sessions.edits import (
    AddPoints,
    ClearBox,
    Click,
    MovePoint,
    PromptAction,
    Prompts,
    RemovePoint,
    Scene,
    SetBox,
    SetMask,
)
from tests.unit.sessions.building import HEIGHT, SCENE, SIZE, WIDTH

A, B = Click(1, 2, 1, "a"), Click(3, 4, 0, "b")
KNOWN = Prompts((A, B, Click(5, 6)), (0, 0, 10, 10))


def test_points_are_added_at_the_end() -> None:
    assert KNOWN.edited(AddPoints((Click(7, 8),)), SCENE).points == (*KNOWN.points, Click(7, 8))


def test_a_point_is_moved_in_place_and_keeps_its_label() -> None:
    moved = KNOWN.edited(MovePoint("b", WIDTH, HEIGHT), SCENE)
    assert moved.points[1] == Click(WIDTH, HEIGHT, 0, "b")
    assert moved.points[::2] == KNOWN.points[::2]


def test_a_point_is_removed_and_its_name_is_free_again() -> None:
    removed = KNOWN.edited(RemovePoint("a"), SCENE)
    assert removed.points == KNOWN.points[1:]
    assert removed.edited(AddPoints((A,)), SCENE).points[-1] == A


def test_the_box_is_replaced_and_removed() -> None:
    assert KNOWN.edited(SetBox((1, 1, 2, 2)), SCENE).box == (1, 1, 2, 2)
    assert KNOWN.edited(ClearBox(), SCENE).box is None
    assert Prompts().edited(ClearBox(), SCENE) == Prompts()
    assert Prompts().empty
    assert not Prompts(box=(1, 1, 2, 2)).empty


def mask(*shape: int) -> SetMask:
    return SetMask(NDArrayFloat.from_numpy(np.zeros(shape)))


WRONG: dict[str, tuple[PromptAction, str]] = {
    "no points": (AddPoints(()), "edit.add_points.points"),
    "too many points": (AddPoints((Click(1, 1),) * 3), "edit.add_points.points"),
    "x outside": (AddPoints((Click(1, 1), Click(WIDTH + 0.5, 1))), "edit.add_points.points[1].x"),
    "y negative": (AddPoints((Click(1, -1),)), "edit.add_points.points[0].y"),
    "x is NaN": (AddPoints((Click(math.nan, 1),)), "edit.add_points.points[0].x"),
    "a name that is taken": (AddPoints((Click(1, 1, 1, "b"),)), "edit.add_points.point_ids[0]"),
    "a name given twice": (AddPoints((Click(1, 1, 1, "c"), Click(2, 2, 1, "c"))), "edit.add_points.point_ids[1]"),
    "move an unknown point": (MovePoint("z", 1, 1), "edit.move_point.point_id"),
    "move a point without a name": (MovePoint("", 1, 1), "edit.move_point.point_id"),
    "move out of the image": (MovePoint("a", 1, HEIGHT + 1), "edit.move_point.y"),
    "remove an unknown point": (RemovePoint("z"), "edit.remove_point.point_id"),
    "box outside": (SetBox((1, 1, WIDTH + 1, 2)), "edit.set_box.x_max"),
    "box with infinity": (SetBox((1, -math.inf, 3, 3)), "edit.set_box.y_min"),
    "inverted box": (SetBox((5, 1, 3, 3)), "edit.set_box"),
    "empty box": (SetBox((5, 1, 5, 3)), "edit.set_box"),
    "three candidates as mask": (mask(3, SIZE, SIZE), "edit.set_mask"),
    "mask of another size": (mask(1, SIZE, SIZE + 1), "edit.set_mask"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_action_names_its_field(case: str) -> None:
    action, field = WRONG[case]
    with pytest.raises(InvalidFieldError) as caught:
        KNOWN.edited(action, SCENE)
    assert [violation.field for violation in caught.value.violations] == [field]


@pytest.mark.parametrize(
    ("action", "lacking"),
    [(AddPoints((A,)), {"points": False}), (SetBox((1, 1, 2, 2)), {"boxes": False}), (mask(1, SIZE, SIZE), {})],
    ids=["points", "boxes", "mask"],
)
def test_what_the_model_cannot_take(action: PromptAction, lacking: dict[str, bool]) -> None:
    metadata = ModelMetadata(mask_size=SIZE).model_copy(update=lacking)
    scene = Scene(WIDTH, HEIGHT, "m", metadata, max_points=5)
    with pytest.raises(CapabilityMissingError, match="'m'"):
        Prompts().edited(action, scene)
