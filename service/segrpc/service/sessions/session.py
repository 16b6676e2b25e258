"""An interactive session on one image: edits come in, rounds are planned, what was computed is kept.

No sockets, no threads, no clock: the stream's handler receives, plans, computes and commits, in this order, again and
again. An edit stays pending until the round that it belongs to is committed, so that nothing is lost when a
computation or a connection fails in between.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from segrpc.service.admission.ledger import Ledger
from segrpc.service.admission.limits import Resource
from segrpc.service.engine.base import SegmentResult, StageTimes
from segrpc.service.errors import InvalidFieldError, OverloadedError, SegrpcError, Violation
from segrpc.service.images.known import KnownImage
from segrpc.service.schemas import NDArrayFloat, SegmentationInput
from segrpc.service.sessions.edits import (
    Edit,
    HistoryAction,
    Malformed,
    Prompts,
    Scene,
    SetMask,
    check_mask,
    forget_origin,
)
from segrpc.service.sessions.history import History, MaskSource, Round, Step

KEPT_REJECTIONS = 64  # that are sent again after resuming
MAX_PENDING, MAX_PENDING_BYTES = 256, 16 * 2**20  # edits that wait to be computed
OBJECT_BYTES = 256  # about what an object takes without any round
CANCELLED = "CANCELLED"

_MAX_RANGES = 1024


@dataclass(frozen=True, slots=True)
class RefineOptions:
    """What a session was opened with.

    Attributes:
        multimask_output: Whether an object's first round gives several candidates.
        num_multimask_outputs: How many.
        feed_back: Whether the selected candidate's logits are the next round's mask input.
        every_edit: Whether each edit has a round of its own; otherwise edits that wait are folded into one.
    """

    multimask_output: bool = True
    num_multimask_outputs: int = 3
    feed_back: bool = True
    every_edit: bool = False


@dataclass(frozen=True, slots=True)
class Rejection:
    """An edit that was not applied.

    Attributes:
        seq: The edit's number.
        reason: Why, for programs.
        message: Why, for people.
        violations: Which fields were wrong.
        revision: The session's revision at that time.
        applied_seq: Up to which edit all were applied, rejected or cancelled.
    """

    seq: int
    reason: str
    message: str
    violations: tuple[Violation, ...]
    revision: int
    applied_seq: int


@dataclass(frozen=True, slots=True)
class ObjectResult:
    """What an object looks like now.

    Attributes:
        object_id: The object.
        step: What is shown.
        rounds: What was computed since the last result of the object, the oldest first.
        times: Where the time went; None if nothing was computed.
        seconds: How long it took from planning to committing.
        revision: The session's revision.
        applied_seq: Up to which edit all were applied, rejected or cancelled.
    """

    object_id: str
    step: Step
    rounds: tuple[Round, ...]
    times: StageTimes | None
    seconds: float
    revision: int
    applied_seq: int


Event: TypeAlias = Rejection | ObjectResult


@dataclass(slots=True)
class Plan:
    """The next pending edits of one object, and the round that they need.

    Attributes:
        object_id: The object.
        edits: Those that are answered when it is committed.
        history: The object's history after the edits that compute nothing.
        prompts: Points and box after the edits.
        rejected: The edits that were wrong, and why.
        accepted: Whether any edit was not wrong.
        edited: Whether prompts or mask were edited.
        input: What is to be computed; None if nothing.
        mask: Where the mask input comes from.
        cancelled: Whether its edits were cancelled, so that it must not be committed.
    """

    object_id: str
    edits: list[Edit]
    history: History
    prompts: Prompts
    rejected: list[tuple[Edit, SegrpcError]]
    accepted: bool = False
    edited: bool = False
    input: SegmentationInput | None = None
    mask: MaskSource = field(default_factory=MaskSource)
    cancelled: bool = False


@dataclass(slots=True)
class _Object:
    history: History = field(default_factory=History)
    changed_at: int = 0  # the session's revision


class Session:
    """The state of a session; all methods belong to the event loop.

    Args:
        id: The server's name for it.
        image: The image; kept, so that embeddings can be made again at any time.
        scene: What edits are checked against.
        options: What it was opened with.
        ledger: Counts the memory of all sessions. Asked before a round; the last one may exceed what is allowed.
    """

    def __init__(self, id: str, image: KnownImage, scene: Scene, options: RefineOptions, ledger: Ledger) -> None:  # noqa: A002
        self.id = id
        self.image = image
        self.scene = scene
        self.options = options
        self.revision = 0
        self.applied_seq = 0
        self._ledger = ledger
        self._objects: dict[str, _Object] = {}
        self._pending: deque[Edit] = deque()
        self._seen = _Numbers()
        self._plan: Plan | None = None
        self._rejections: deque[Rejection] = deque(maxlen=KEPT_REJECTIONS)
        self._nbytes = 0
        self._account(len(image.data))

    @property
    def nbytes(self) -> int:
        """About how much memory it takes: image, logits and masks."""
        return self._nbytes

    @property
    def last_seq(self) -> int:
        """The highest number of an edit that has arrived; 0 if none has."""
        return self._seen.highest

    @property
    def pending(self) -> int:
        """How many edits wait for being committed."""
        return len(self._pending)

    @property
    def full(self) -> bool:
        """Whether no more edits should be taken for now."""
        masks = sum(len(edit.action.logits.data) for edit in self._pending if isinstance(edit.action, SetMask))
        return len(self._pending) >= MAX_PENDING or masks >= MAX_PENDING_BYTES

    def close(self) -> None:
        """Give its memory back; it is not used afterwards."""
        self._account(-self._nbytes)
        self._objects.clear()
        self._pending.clear()

    def _account(self, nbytes: int) -> None:
        self._nbytes += nbytes
        self._ledger.add(Resource.SESSION_BYTES, self.image.owner, nbytes)

    def receive(self, edit: Edit) -> Rejection | None:
        """Take an edit; one that was taken before is ignored.

        Returns:
            A rejection if its number is out of order.
        """
        if edit.seq in self._seen:
            return None
        if edit.seq < self._seen.highest:
            text = f"is {edit.seq}, after {self._seen.highest}: numbers must rise from edit to edit"
            return self._rejection(edit.seq, InvalidFieldError.of("seq", text))
        self._seen.add(edit.seq)
        self._pending.append(self._without_useless_mask(edit))
        return None

    def _without_useless_mask(self, edit: Edit) -> Edit:
        """Let go of logits that do not fit, which may be large, before the edit waits for its turn."""
        if isinstance(edit.action, SetMask):
            try:
                check_mask(edit.action.logits, self.scene)
            except SegrpcError as error:
                return replace(edit, action=Malformed(error))
        return edit

    def cancel_through(self, seq: int) -> list[Rejection]:
        """Drop pending edits up to a number."""
        dropped = []
        while self._pending and self._pending[0].seq <= seq:
            dropped.append(self._pending.popleft())
        if dropped and self._plan is not None:
            self._plan.cancelled, self._plan = True, None
        rejections = []
        for edit in dropped:
            self.applied_seq = edit.seq
            text = f"the edit was cancelled by the client through {seq}"
            rejections.append(Rejection(edit.seq, CANCELLED, text, (), self.revision, self.applied_seq))
        self._rejections.extend(rejections)
        return rejections

    def plan(self) -> Plan | None:
        """Choose what to do next; None if no edit is pending.

        Edits of one object that follow each other are taken together, up to one that looks at what was computed before
        it; with ``every_edit`` a single one.
        """
        if not self._pending:
            return None
        first = self._pending[0]
        history = self._history(first.object_id)
        plan = Plan(first.object_id, [], history, history.current.prompts, [])
        for edit in self._pending:
            looks_back = isinstance(edit.action, HistoryAction)
            if edit.object_id != plan.object_id or (looks_back and plan.edited):
                break
            try:
                self._apply(edit, plan)
                plan.accepted = True
            except SegrpcError as error:
                forget_origin(error)
                plan.rejected.append((edit, error))
            plan.edits.append(edit)
            if self.options.every_edit:
                break
        self._plan = plan
        return plan

    def _check_memory(self) -> None:
        refusal = self._ledger.refusal(Resource.SESSION_BYTES, self.image.owner)
        if refusal is not None:
            raise OverloadedError(f"{refusal}: finish sessions, or undo and go on from there")

    def _history(self, object_id: str) -> History:
        known = self._objects.get(object_id)
        return known.history if known is not None else History()

    def _apply(self, edit: Edit, plan: Plan) -> None:
        action = edit.action
        if isinstance(action, Malformed):
            raise action.error
        if not (isinstance(action, HistoryAction) and plan.object_id in self._objects):
            self._check_memory()
        if isinstance(action, HistoryAction):
            plan.history = plan.history.changed(action)
            plan.prompts = plan.history.current.prompts
            return
        prompts = plan.prompts.edited(action, self.scene)
        given = action.logits if isinstance(action, SetMask) else None
        if given is None and plan.mask.seq and plan.input is not None:
            given = plan.input.mask_input  # of an earlier SetMask in the same plan
        elif given is not None:
            plan.mask = MaskSource(seq=edit.seq)
        plan.prompts, plan.edited = prompts, True
        plan.input = self._input(plan, given)

    def _input(self, plan: Plan, given: NDArrayFloat | None) -> SegmentationInput | None:
        """Make the input of a plan's round; None if the object has no prompts left."""
        current, metadata = plan.history.current, self.scene.metadata
        mask = None
        if given is not None:
            mask = NDArrayFloat.model_construct(data=given.data, shape=(1, *given.shape[-3:]), dtype=given.dtype)
        elif plan.prompts.empty:
            return None
        elif self.options.feed_back and metadata.mask_input and current.round is not None:
            mask = current.logits
            plan.mask = MaskSource(revision=current.round.revision, index=current.selected)
        single = not metadata.mask_counts or 1 in metadata.mask_counts
        points = plan.prompts.points
        # Not validated again: each edit was checked when it was applied.
        return SegmentationInput.model_construct(
            image=self.image.data,
            points=[[[p.x, p.y] for p in points]],
            labels=[[p.label for p in points]],
            boxes=[None if plan.prompts.box is None else list(plan.prompts.box)],
            mask_input=mask,
            multimask_output=self.options.multimask_output and (current.output is None or not single),
            num_multimask_outputs=self.options.num_multimask_outputs,
            return_logits=metadata.mask_size > 0,
        )

    def commit(self, plan: Plan, result: SegmentResult | None, seconds: float = 0.0) -> list[Event]:
        """Make a plan's outcome the object's state.

        Args:
            plan: The last plan, not cancelled.
            result: What its input gave; None if it had none.
            seconds: How long that took.

        Returns:
            What the client is to be told, in order.
        """
        self._answered(plan)
        events: list[Event] = [self._rejection(edit.seq, error) for edit, error in plan.rejected]
        if not plan.accepted:
            return events
        self.revision += 1
        history = plan.history
        rounds: tuple[Round, ...] = ()
        if plan.input is not None and result is not None:
            computed = Round(self.revision, plan.prompts, plan.mask, plan.input.multimask_output)
            history, rounds = history.pushed(Step.of(computed, result.output)), (computed,)
        elif plan.edited:
            history = history.pushed(Step())
        if plan.object_id not in self._objects:
            self._objects[plan.object_id] = _Object()
            self._account(OBJECT_BYTES)
        known = self._objects[plan.object_id]
        self._account(history.nbytes - known.history.nbytes)
        known.history, known.changed_at = history, self.revision
        times = None if result is None else result.times
        events.append(self._result(plan.object_id, history.current, rounds, times, seconds))
        return events

    def reject(self, plan: Plan, error: SegrpcError) -> list[Event]:
        """Reject all edits of a plan, whose round could not be computed."""
        self._answered(plan)
        wrong = {edit.seq: reason for edit, reason in plan.rejected}
        return [self._rejection(edit.seq, wrong.get(edit.seq, error)) for edit in plan.edits]

    def _answered(self, plan: Plan) -> None:
        for _ in plan.edits:
            self._pending.popleft()
        self.applied_seq, self._plan = plan.edits[-1].seq, None

    def check_revision(self, last_revision: int) -> None:
        """Check what a client says that it saw.

        Raises:
            InvalidFieldError: If there is no such revision yet.
        """
        if last_revision > self.revision:
            text = f"is {last_revision}; the session's newest revision is {self.revision}"
            raise InvalidFieldError.of("config.resume.last_revision", text)

    def resume(self, last_revision: int) -> list[Event]:
        """Return what a client has missed that saw the session at a revision.

        Raises:
            InvalidFieldError: If there is no such revision yet.
        """
        self.check_revision(last_revision)
        missed: list[Event] = [rejection for rejection in self._rejections if rejection.revision >= last_revision]
        changed = sorted((o.changed_at, name) for name, o in self._objects.items() if o.changed_at > last_revision)
        for _, name in changed:
            history = self._objects[name].history
            rounds = tuple(r for r in _rounds(history.steps) if r.revision > last_revision)
            missed.append(self._result(name, history.current, rounds))
        return missed

    def _result(
        self,
        object_id: str,
        step: Step,
        rounds: tuple[Round, ...],
        times: StageTimes | None = None,
        seconds: float = 0.0,
    ) -> ObjectResult:
        return ObjectResult(object_id, step, rounds, times, seconds, self.revision, self.applied_seq)

    def _rejection(self, seq: int, error: SegrpcError) -> Rejection:
        rejection = Rejection(seq, error.reason, error.message, error.violations, self.revision, self.applied_seq)
        self._rejections.append(rejection)
        return rejection


def _rounds(steps: Iterable[Step]) -> Iterator[Round]:
    return (step.round for step in steps if step.round is not None)


class _Numbers:
    """A set of whole numbers that mostly follow each other."""

    def __init__(self) -> None:
        self._ranges: list[list[int]] = []  # [first, last], rising

    @property
    def highest(self) -> int:
        return self._ranges[-1][1] if self._ranges else 0

    def __contains__(self, number: int) -> bool:
        return number <= self.highest and any(first <= number <= last for first, last in reversed(self._ranges))

    def add(self, number: int) -> None:
        """Add a number above all others."""
        if self._ranges and number == self._ranges[-1][1] + 1:
            self._ranges[-1][1] = number
            return
        self._ranges.append([number, number])
        if len(self._ranges) > _MAX_RANGES:  # what lies between the two oldest counts as seen from now on
            self._ranges[:2] = [[self._ranges[0][0], self._ranges[1][1]]]
