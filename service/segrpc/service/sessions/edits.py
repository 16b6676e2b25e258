"""What a person does to an object in a session, and what is then known of the object."""

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from segrpc.service.errors import CapabilityMissingError, InvalidFieldError, SegrpcError, Violation
from segrpc.service.schemas import ModelMetadata, NDArrayFloat

BoxXYXY: TypeAlias = tuple[float, float, float, float]

CORNERS = ("x_min", "y_min", "x_max", "y_max")


@dataclass(frozen=True, slots=True)
class Click:
    """A point.

    Attributes:
        x: Pixels from the left edge, 0 to the image's width.
        y: Pixels from the top edge, 0 to the image's height.
        label: 1 for object, 0 for background.
        id: The client's name for it, unique in the object; empty if it has none.
    """

    x: float
    y: float
    label: Literal[0, 1] = 1
    id: str = ""


@dataclass(frozen=True, slots=True)
class AddPoints:
    """Add clicks, at least one."""

    points: tuple[Click, ...]


@dataclass(frozen=True, slots=True)
class MovePoint:
    """Move the click of a name."""

    id: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class RemovePoint:
    """Remove the click of a name."""

    id: str


@dataclass(frozen=True, slots=True)
class SetBox:
    """Set or replace the box."""

    box: BoxXYXY


@dataclass(frozen=True, slots=True)
class ClearBox:
    """Remove the box."""


@dataclass(frozen=True, slots=True)
class SetMask:
    """Set the logits ``[1, mask_size, mask_size]`` that the next round starts from."""

    logits: NDArrayFloat


@dataclass(frozen=True, slots=True)
class SelectMask:
    """Choose the candidate that the next round starts from."""

    index: int


@dataclass(frozen=True, slots=True)
class Undo:
    """Go back over rounds."""

    steps: int = 1


@dataclass(frozen=True, slots=True)
class Redo:
    """Go forward over rounds that were undone."""

    steps: int = 1


@dataclass(frozen=True, slots=True)
class Reset:
    """Forget all prompts."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands in for an action that cannot be read: it is rejected when its turn comes, in order."""

    error: SegrpcError

    def __post_init__(self) -> None:
        """Let go of the frames where the error came up: they hold what was sent, which may be large."""
        forget_origin(self.error)


def forget_origin(error: SegrpcError) -> None:
    """Let go of the frames, and of all that is in them, where an error that is kept came up."""
    error.__traceback__ = error.__context__ = error.__cause__ = None


PromptAction: TypeAlias = AddPoints | MovePoint | RemovePoint | SetBox | ClearBox | SetMask
HistoryAction: TypeAlias = SelectMask | Undo | Redo | Reset


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit of one object.

    Attributes:
        seq: The client's number for it, at least 1.
        object_id: The client's name for the object.
        action: What is done.
    """

    seq: int
    object_id: str
    action: PromptAction | HistoryAction | Malformed


@dataclass(frozen=True, slots=True)
class Scene:
    """What edits are checked against.

    Attributes:
        width: The image's width in pixels.
        height: The image's height in pixels.
        model: The model's name.
        metadata: What the model can do.
        max_points: The most clicks of an object.
    """

    width: int
    height: int
    model: str
    metadata: ModelMetadata
    max_points: int


@dataclass(frozen=True, slots=True)
class Prompts:
    """What is known of an object: its clicks in the order in which they came, and its box."""

    points: tuple[Click, ...] = ()
    box: BoxXYXY | None = None

    @property
    def empty(self) -> bool:
        """Whether there is neither a click nor a box."""
        return not self.points and self.box is None

    def edited(self, action: PromptAction, scene: Scene) -> "Prompts":
        """Return what is known after an action.

        Raises:
            InvalidFieldError: If a value is out of range, or a click's name is unknown or taken.
            CapabilityMissingError: If the model takes no such prompts.
        """
        match action:
            case AddPoints(points):
                return self._with_points(points, scene)
            case MovePoint(name, x, y):
                at = self._index(name, "edit.move_point.point_id")
                _check_position("edit.move_point", x, y, scene)
                moved = replace(self.points[at], x=x, y=y)
                return replace(self, points=(*self.points[:at], moved, *self.points[at + 1 :]))
            case RemovePoint(name):
                at = self._index(name, "edit.remove_point.point_id")
                return replace(self, points=self.points[:at] + self.points[at + 1 :])
            case SetBox(box):
                _check_box(box, scene)
                return replace(self, box=box)
            case ClearBox():
                return replace(self, box=None)
            case SetMask(logits):
                check_mask(logits, scene)
                return self

    def _with_points(self, points: tuple[Click, ...], scene: Scene) -> "Prompts":
        if not scene.metadata.points:
            raise CapabilityMissingError(f"model {scene.model!r} takes no points")
        if not points:
            raise InvalidFieldError.of("edit.add_points.points", "is empty; give at least one point")
        if len(self.points) + len(points) > scene.max_points:
            text = f"would make {len(self.points) + len(points)} points; an object has at most {scene.max_points}"
            raise InvalidFieldError.of("edit.add_points.points", text)
        taken = {point.id for point in self.points if point.id}
        for i, point in enumerate(points):
            _check_position(f"edit.add_points.points[{i}]", point.x, point.y, scene)
            if point.id in taken:
                raise InvalidFieldError.of(
                    f"edit.add_points.point_ids[{i}]", f"{point.id!r} names another point of the object already"
                )
            if point.id:
                taken.add(point.id)
        return replace(self, points=self.points + points)

    def _index(self, name: str, field: str) -> int:
        for i, point in enumerate(self.points):
            if name and point.id == name:
                return i
        raise InvalidFieldError.of(field, f"{name!r} names no point of the object")


def _check_position(field: str, x: float, y: float, scene: Scene) -> None:
    wrong = [
        Violation(f"{field}.{axis}", f"{value:g} lies outside the image of {scene.width} x {scene.height} pixels")
        for axis, value, size in (("x", x, scene.width), ("y", y, scene.height))
        if not (math.isfinite(value) and 0 <= value <= size)
    ]
    if wrong:
        raise InvalidFieldError.of_all(wrong)


def _check_box(box: BoxXYXY, scene: Scene) -> None:
    if not scene.metadata.boxes:
        raise CapabilityMissingError(f"model {scene.model!r} takes no boxes")
    size = f"the image of {scene.width} x {scene.height} pixels"
    wrong = [
        Violation(f"edit.set_box.{corner}", f"{value:g} lies outside {size}")
        for corner, value, limit in zip(CORNERS, box, (scene.width, scene.height) * 2, strict=True)
        if not (math.isfinite(value) and 0 <= value <= limit)
    ]
    x_min, y_min, x_max, y_max = box
    if not wrong and (x_max <= x_min or y_max <= y_min):
        wrong.append(Violation("edit.set_box", f"must have x_min < x_max and y_min < y_max, got {list(box)}"))
    if wrong:
        raise InvalidFieldError.of_all(wrong)


def check_mask(logits: NDArrayFloat, scene: Scene) -> None:
    """Check the logits of a `SetMask`.

    Raises:
        InvalidFieldError: If they have another shape than the model's.
        CapabilityMissingError: If the model takes none.
    """
    size = scene.metadata.mask_size
    if not scene.metadata.mask_input:
        raise CapabilityMissingError(f"model {scene.model!r} takes no mask input")
    if logits.shape != (1, size, size):
        text = f"has shape {list(logits.shape)}; model {scene.model!r} takes [1, {size}, {size}]"
        raise InvalidFieldError.of("edit.set_mask", text)
