"""What a person can do to an object in an interactive session."""

from dataclasses import dataclass
from typing import Any

DEFAULT_OBJECT = "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """A change of one object.

    Attributes:
        object_id: Your name for the object, 1 to 128 characters. An unknown name starts a new object.
    """

    object_id: str = DEFAULT_OBJECT


@dataclass(frozen=True, slots=True, eq=False)
class AddPoints(Edit):
    """Add clicks.

    Attributes:
        points: ``[num_points, 2]``, ``x, y`` in pixels.
        labels: ``[num_points]``: 1 (on the object) or 0 (off it). Default: all 1.
        point_ids: Your names for them, for `MovePoint` and `RemovePoint`: none, or one for each.
    """

    points: Any
    labels: Any = None
    point_ids: Any = ()


@dataclass(frozen=True, slots=True)
class MovePoint(Edit):
    """Move a click that has a name.

    Attributes:
        point_id: Its name.
        x: The new position in pixels from the left edge.
        y: The new position in pixels from the top edge.
    """

    point_id: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class RemovePoint(Edit):
    """Remove a click that has a name.

    Attributes:
        point_id: Its name.
    """

    point_id: str


@dataclass(frozen=True, slots=True)
class SetBox(Edit):
    """Set or replace the box around the object; edges in pixels, maxima outside."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float


@dataclass(frozen=True, slots=True)
class ClearBox(Edit):
    """Remove the box."""


@dataclass(frozen=True, slots=True, eq=False)
class SetMask(Edit):
    """Set the mask that the next round starts from.

    Attributes:
        logits: Logits of one candidate, ``[256, 256]`` or ``[1, 256, 256]`` (the model's `mask_size`).
    """

    logits: Any


@dataclass(frozen=True, slots=True)
class SelectMask(Edit):
    """Choose the candidate that the next round starts from.

    Attributes:
        index: Its position in the result's masks.
    """

    index: int


@dataclass(frozen=True, slots=True)
class Undo(Edit):
    """Go back in the object's history; nothing is computed.

    Attributes:
        steps: How many rounds.
    """

    steps: int = 1


@dataclass(frozen=True, slots=True)
class Redo(Edit):
    """Take back what was undone; nothing is computed.

    Attributes:
        steps: How many rounds.
    """

    steps: int = 1


@dataclass(frozen=True, slots=True)
class Reset(Edit):
    """Forget all prompts of the object; can be undone."""
