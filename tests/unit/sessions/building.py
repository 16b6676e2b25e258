"""Sessions and results for tests: real values, made by hand instead of by a model."""

import numpy as np
from pydantic import ByteSize

from segrpc.service.admission.ledger import Ledger
from segrpc.service.admission.limits import Limits
from segrpc.service.engine.base import SegmentResult, StageTimes
from segrpc.service.images.decode import ImageHeader
from segrpc.service.images.known import KnownImage
from segrpc.service.schemas import CompressedRLE, ModelMetadata, NDArrayFloat, SegmentationOutput
from segrpc.service.sessions.edits import AddPoints, Click, Edit, HistoryAction, Malformed, PromptAction, Scene
from segrpc.service.sessions.session import ObjectResult, Plan, RefineOptions, Rejection, Session

WIDTH, HEIGHT, SIZE = 40, 30, 4
METADATA = ModelMetadata(mask_size=SIZE, mask_counts=(1, 3), mask_input=True)
HEADER = ImageHeader(WIDTH, HEIGHT, 1)
SCENE = Scene(WIDTH, HEIGHT, "m", METADATA, max_points=5)
IMAGE = KnownImage("sha256:" + "0" * 64, b"12345", HEADER)


def session(*, metadata: ModelMetadata = METADATA, budget: int = 2**20, **options: bool | int) -> Session:
    """Make a session on an image of 40 x 30 pixels."""
    scene = Scene(WIDTH, HEIGHT, "m", metadata, max_points=5)
    return Session("s", IMAGE, scene, RefineOptions(**options), Ledger(Limits(session_bytes=ByteSize(budget))))  # type: ignore[arg-type]


def click(seq: int, x: float = 1, y: float = 1, *, object_id: str = "a", name: str = "", label: int = 1) -> Edit:
    """Add a point."""
    return Edit(seq, object_id, AddPoints((Click(x, y, 1 if label else 0, name),)))


def edit(seq: int, action: PromptAction | HistoryAction | Malformed, object_id: str = "a") -> Edit:
    """Do anything else."""
    return Edit(seq, object_id, action)


def result(plan: Plan, best: int = 0, value: float = 0.0) -> SegmentResult:
    """Answer a plan's input: as many masks as it asks for, logits of ``value`` + candidate."""
    assert plan.input is not None
    count = plan.input.num_multimask_outputs if plan.input.multimask_output else 1
    logits = np.stack([np.full((SIZE, SIZE), value + i, np.float32) for i in range(count)])[None]
    scores = np.zeros((1, count), np.float32)
    scores[0, min(best, count - 1)] = 1
    mask = CompressedRLE.from_mask(np.zeros((HEIGHT, WIDTH), np.uint8))
    output = SegmentationOutput(
        masks=[[mask] * count], scores=NDArrayFloat.from_numpy(scores), mask_logits=NDArrayFloat.from_numpy(logits)
    )
    return SegmentResult(output, HEADER, StageTimes())


def step(of: Session, *edits: Edit, best: int = 0, value: float = 0.0) -> list[Rejection | ObjectResult]:
    """Take edits, and compute until none is pending; return all events."""
    events: list[Rejection | ObjectResult] = []
    for one in edits:
        rejection = of.receive(one)
        if rejection is not None:
            events.append(rejection)
    while (plan := of.plan()) is not None:
        events += of.commit(plan, None if plan.input is None else result(plan, best, value))
    return events


def only(events: list[Rejection | ObjectResult]) -> ObjectResult:
    """Return the one event, a result."""
    (event,) = events
    assert isinstance(event, ObjectResult)
    return event


def rejection(events: list[Rejection | ObjectResult]) -> Rejection:
    """Return the one event, a rejection."""
    (event,) = events
    assert isinstance(event, Rejection)
    return event
