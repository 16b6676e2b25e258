"""The history of one object: its rounds, which of them is shown, undo and redo over them. All values are immutable."""

from dataclasses import dataclass, replace

import numpy as np

from segrpc.service.errors import InvalidFieldError
from segrpc.service.schemas import NDArrayFloat, SegmentationOutput
from segrpc.service.sessions.edits import HistoryAction, Prompts, Redo, Reset, SelectMask, Undo

_NO_PROMPTS = Prompts()
_OVERHEAD = 1024  # bytes of a step besides masks and logits: objects, prompts


@dataclass(frozen=True, slots=True)
class MaskSource:
    """Where the mask input of a round came from: a candidate of an earlier round, or an edit; or from nowhere.

    Attributes:
        revision: The earlier round; 0 if none.
        index: Its candidate.
        seq: The edit that set the logits; 0 if none did.
    """

    revision: int = 0
    index: int = 0
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Round:
    """One computation, and all that went into it.

    Attributes:
        revision: The session's revision that it became.
        prompts: Points and box.
        mask: Where the mask input came from.
        multimask_output: Whether several candidates were asked for.
    """

    revision: int
    prompts: Prompts
    mask: MaskSource
    multimask_output: bool


@dataclass(frozen=True, slots=True)
class Step:
    """A place in the history: a round with its masks, or an object without prompts.

    Attributes:
        prompts: Points and box.
        round: The round; None without prompts.
        output: Its masks, with ``mask_logits`` ``[1, num_masks, mask_size, mask_size]`` if the model has logits.
        selected: The candidate that the next round starts from.
    """

    prompts: Prompts = _NO_PROMPTS
    round: Round | None = None
    output: SegmentationOutput | None = None
    selected: int = 0

    @classmethod
    def of(cls, computed: Round, output: SegmentationOutput) -> "Step":
        """Make the step of a round; the best-scored candidate is selected."""
        scores = output.scores
        return cls(computed.prompts, computed, output, 0 if scores is None else int(np.argmax(scores.to_numpy()[0])))

    @property
    def logits(self) -> NDArrayFloat | None:
        """The selected candidate's logits ``[1, 1, mask_size, mask_size]``, if there are any."""
        if self.output is None or self.output.mask_logits is None:
            return None
        every = self.output.mask_logits
        size = len(every.data) // every.shape[1]
        chosen = every.data[self.selected * size : (self.selected + 1) * size]
        # Not validated again: a part of an array that was.
        return NDArrayFloat.model_construct(data=chosen, shape=(1, 1, *every.shape[2:]), dtype=every.dtype)

    @property
    def nbytes(self) -> int:
        """About how much memory it takes."""
        output = self.output
        if output is None:
            return _OVERHEAD
        logits = 0 if output.mask_logits is None else len(output.mask_logits.data)
        return _OVERHEAD + logits + sum(len(mask.counts) for row in output.masks for mask in row)


_NOTHING = Step()


@dataclass(frozen=True, slots=True)
class History:
    """The steps of an object, the oldest first.

    Attributes:
        steps: The steps; those behind ``position`` were undone.
        position: How many of them count; at 0 the object has no prompts.
    """

    steps: tuple[Step, ...] = ()
    position: int = 0

    @property
    def current(self) -> Step:
        """The step that is shown."""
        return self.steps[self.position - 1] if self.position else _NOTHING

    @property
    def nbytes(self) -> int:
        """About how much memory it takes."""
        return sum(step.nbytes for step in self.steps)

    def pushed(self, step: Step) -> "History":
        """Go on with a step; what was undone is dropped."""
        return History((*self.steps[: self.position], step), self.position + 1)

    def changed(self, action: HistoryAction) -> "History":
        """Return the history after an action that computes nothing.

        Raises:
            InvalidFieldError: If there are not as many steps, or no such candidate.
        """
        match action:
            case Undo(steps):
                _check_steps("undo", steps, self.position)
                return replace(self, position=self.position - steps)
            case Redo(steps):
                _check_steps("redo", steps, len(self.steps) - self.position)
                return replace(self, position=self.position + steps)
            case SelectMask(index):
                return self._selected(index)
            case Reset():
                return self if self.current.prompts.empty and self.current.output is None else self.pushed(_NOTHING)

    def _selected(self, index: int) -> "History":
        output = self.current.output
        count = 0 if output is None else len(output.masks[0])
        if not 0 <= index < count:
            raise InvalidFieldError.of("edit.select_mask.index", f"is {index}; the object has {count} candidates")
        chosen = replace(self.current, selected=index)
        return replace(self, steps=(*self.steps[: self.position - 1], chosen, *self.steps[self.position :]))


def _check_steps(action: str, steps: int, available: int) -> None:
    if not 1 <= steps <= available:
        text = f"is {steps}; there is nothing to {action}" if not available else f"is {steps}; must be 1 to {available}"
        raise InvalidFieldError.of(f"edit.{action}.steps", text)
