"""A person at an object: makes edits at random that are right, and knows what those that were acknowledged come to."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from segrpc.client import (
    AddPoints,
    ClearBox,
    Edit,
    MovePoint,
    Redo,
    RefineResult,
    RemovePoint,
    Reset,
    Round,
    SelectMask,
    SetBox,
    Undo,
)


@dataclass(frozen=True)
class Click:
    """A click with its name."""

    name: str
    x: float
    y: float
    label: int


@dataclass(frozen=True)
class State:
    """What an object is at one place of its history.

    Attributes:
        clicks: Its clicks, in order.
        box: Its box.
        candidates: How many masks it has.
        selected: Which of them the next round starts from.
    """

    clicks: tuple[Click, ...] = ()
    box: tuple[float, float, float, float] | None = None
    candidates: int = 0
    selected: int = 0

    def shows(self, one: Round | None) -> bool:
        """Tell whether a round was computed from these prompts."""
        if one is None:
            return not self.clicks and self.box is None
        clicks = tuple(
            Click(name, x, y, label)
            for name, (x, y), label in zip(
                one.point_ids or ("",) * len(one.points), one.points, one.labels, strict=True
            )
        )
        return (clicks, one.box) == (self.clicks, self.box)


class Hand:
    """Chooses edits of an object, and keeps a history of its own.

    Args:
        object_id: The object.
        chance: Where choices come from.
        width: The image's width in pixels.
        height: The image's height in pixels.
    """

    def __init__(self, object_id: str, chance: random.Random, width: int, height: int) -> None:
        self.object_id = object_id
        self._chance = chance
        self._width, self._height = width, height
        self._states = [State()]
        self._position = 0
        self._clicks = 0

    @property
    def state(self) -> State:
        """What the object must be now."""
        return self._states[self._position]

    def next(self) -> Edit:
        """Choose an edit that is possible now."""
        likely: list[tuple[int, Callable[[], Edit], bool]] = [
            (8, self._click, True),
            (2, self._box, True),
            (1, lambda: ClearBox(object_id=self.object_id), self.state.box is not None),
            (3, self._move, bool(self.state.clicks)),
            (1, self._remove, bool(self.state.clicks)),
            (1, self._select, self.state.candidates > 0),
            (3, self._undo, self._position > 0),
            (2, self._redo, self._position < len(self._states) - 1),
            (1, lambda: Reset(object_id=self.object_id), self.state != State()),
        ]
        possible = [(weight, make) for weight, make, now in likely if now]
        (make,) = self._chance.choices([make for _, make in possible], [weight for weight, _ in possible])
        return make()

    def drag(self, times: int) -> list[Edit]:
        """Move a click again and again, as a mouse does; there must be one."""
        name = self._chance.choice(self.state.clicks).name
        return [MovePoint(name, *self._place(), object_id=self.object_id) for _ in range(times)]

    def acknowledged(self, edit: Edit, result: RefineResult) -> None:
        """Note that the server has applied an edit."""
        match edit:
            case Undo(steps):
                self._position -= steps
            case Redo(steps):
                self._position += steps
            case SelectMask(index):
                self._states[self._position] = replace(self.state, selected=index)
            case _:
                self._push(self._edited(self.state, edit), result)

    def acknowledged_together(self, edits: list[Edit], result: RefineResult) -> None:
        """Note that edits were applied that may have shared rounds: how many, and so how to undo them, is unknown."""
        state = self.state
        for edit in edits:
            state = self._edited(state, edit)
        self._push(state, result)
        self._states, self._position = [self.state], 0

    def check(self, result: RefineResult, shown: Round | None) -> None:
        """Compare with what the server says that the object is.

        Raises:
            AssertionError: If an acknowledged edit is missing, or counts twice.
        """
        assert self.state.shows(shown), f"object {self.object_id}: {self.state} was acknowledged, {shown} is there"
        assert (len(result.prediction.masks), result.selected) == (self.state.candidates, self.state.selected), result

    def _push(self, state: State, result: RefineResult) -> None:
        state = replace(state, candidates=len(result.prediction.masks), selected=result.selected)
        self._states[self._position + 1 :] = [state]
        self._position += 1

    def _edited(self, state: State, edit: Edit) -> State:
        match edit:
            case AddPoints(points, labels, names):
                added = (Click(name, x, y, label) for name, (x, y), label in zip(names, points, labels, strict=True))
                return replace(state, clicks=(*state.clicks, *added))
            case MovePoint(name, x, y):
                return replace(
                    state, clicks=tuple(replace(one, x=x, y=y) if one.name == name else one for one in state.clicks)
                )
            case RemovePoint(name):
                return replace(state, clicks=tuple(one for one in state.clicks if one.name != name))
            case SetBox(x_min, y_min, x_max, y_max):
                return replace(state, box=(x_min, y_min, x_max, y_max))
            case ClearBox():
                return replace(state, box=None)
            case Reset():
                return State()
        raise TypeError(f"{edit} is no edit of prompts")

    def _place(self) -> tuple[float, float]:
        # Whole numbers: they stay what they are when they travel as float32.
        return float(self._chance.randrange(self._width)), float(self._chance.randrange(self._height))

    def _click(self) -> Edit:
        self._clicks += 1
        label = int(self._chance.random() < 0.7 or not self.state.clicks)
        return AddPoints([self._place()], [label], (f"c{self._clicks}",), object_id=self.object_id)

    def _box(self) -> Edit:
        (x, y), width, height = self._place(), self._width, self._height
        x_min, y_min = min(x, width - 8.0), min(y, height - 8.0)
        x_max, y_max = self._chance.randrange(int(x_min) + 4, width), self._chance.randrange(int(y_min) + 4, height)
        return SetBox(x_min, y_min, float(x_max), float(y_max), object_id=self.object_id)

    def _move(self) -> Edit:
        return self.drag(1)[0]

    def _remove(self) -> Edit:
        return RemovePoint(self._chance.choice(self.state.clicks).name, object_id=self.object_id)

    def _select(self) -> Edit:
        return SelectMask(self._chance.randrange(self.state.candidates), object_id=self.object_id)

    def _undo(self) -> Edit:
        return Undo(self._chance.randint(1, min(3, self._position)), object_id=self.object_id)

    def _redo(self) -> Edit:
        return Redo(self._chance.randint(1, min(3, len(self._states) - 1 - self._position)), object_id=self.object_id)
