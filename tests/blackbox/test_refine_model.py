"""Random sessions against a model of what a session is: history, undo, resuming, duplicates; then everything replayed.

The model knows each object's prompts and the places of its history. Which edits were folded into one round, and what a
round started from, the server says in `MaskResult.rounds`; the replay through `Segment` proves that it said the truth.
"""

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from segrpc.v1 import refine_pb2 as pb
from segrpc.v1.segmentation_service_pb2 import SegmentRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import (
    DATA_TYPE_FLOAT32,
    POINT_LABEL_BACKGROUND,
    POINT_LABEL_FOREGROUND,
    Box,
    Image,
    OutputOptions,
    Point,
    PointLabel,
    Prompt,
    Tensor,
)
from tests.photos import load_image, photo_bytes
from tests.server_process import ServerProcess, connect

PHOTO = "chelsea"
WIDTH, HEIGHT = load_image(PHOTO).size
OBJECTS = ("a", "b")

positions = st.builds(lambda x, y: (x / 4, y / 4), st.integers(0, WIDTH * 4), st.integers(0, HEIGHT * 4))
objects = st.sampled_from(OBJECTS)
labels = st.sampled_from([POINT_LABEL_FOREGROUND, POINT_LABEL_BACKGROUND])


@dataclass
class Place:
    """A place in the history of an object: what was known of it there, and the round that showed it."""

    prompt: Prompt
    names: list[str]
    revision: int = 0
    selected: int | None = 0  # None: the best-scored, of a round that was not the last of a burst
    count: int = 0


@dataclass
class Object:
    """What the model knows of an object."""

    places: list[Place] = field(default_factory=lambda: [Place(Prompt(), [])])
    at: int = 0

    @property
    def here(self) -> Place:
        return self.places[self.at]

    def go_on(self, place: Place) -> None:
        self.places[self.at + 1 :] = [place]
        self.at += 1


class Session(RuleBasedStateMachine):
    """A client that does anything, in any order."""

    stub: ClassVar[SegmentationServiceStub]
    model: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.objects = {name: Object() for name in OBJECTS}
        self.sent: list[pb.RefineRequest] = []
        self.skipped: list[int] = []
        self.seq = 0
        self.revision = 0
        self.rounds: dict[int, pb.Round] = {}
        self.shown: dict[int, list[bytes]] = {}
        self.set_masks: dict[int, Tensor] = {}

    # The stream

    @initialize(policy=st.sampled_from([pb.EDIT_POLICY_LATEST_WINS, pb.EDIT_POLICY_EVERY_EDIT]), feedback=st.booleans())
    def begin(self, policy: pb.EditPolicy.ValueType, feedback: bool) -> None:
        self.policy = policy
        config = pb.RefineConfig(
            image=Image(data=photo_bytes(PHOTO)),
            model=self.model,
            edit_policy=policy,
            mask_feedback=pb.MASK_FEEDBACK_LOGITS if feedback else pb.MASK_FEEDBACK_NONE,
        )
        self.opened = self.connect(config).opened
        assert not self.opened.resumed

    def connect(self, config: pb.RefineConfig) -> pb.RefineResponse:
        self.requests: queue.SimpleQueue[pb.RefineRequest | None] = queue.SimpleQueue()
        self.requests.put(pb.RefineRequest(config=config))
        self.stream: Any = self.stub.Refine(iter(self.requests.get, None), timeout=120)
        return self.receive()

    def receive(self) -> pb.RefineResponse:
        response: pb.RefineResponse = next(self.stream)
        return response

    def send(self, object_id: str, **action: Any) -> int:
        self.seq += 1
        request = pb.RefineRequest(seq=self.seq, edit=pb.Edit(object_id=object_id, **action))
        self.sent.append(request)
        self.requests.put(request)
        return self.seq

    def result(self, seq: int) -> pb.MaskResult:
        """Read up to the result that reflects an edit."""
        while True:
            response = self.receive()
            assert response.WhichOneof("payload") == "result", response
            self.note(response)
            if response.applied_seq >= seq:
                return response.result

    def note(self, response: pb.RefineResponse) -> None:
        """Keep what a result says, and check that equal revisions show equal masks."""
        assert response.revision > self.revision
        self.revision = response.revision
        result = response.result
        self.rounds.update({one.revision: one for one in result.rounds})
        masks = [mask.coco_rle for mask in result.prediction.masks]
        assert bool(masks) == bool(result.shown_revision)
        if masks:
            assert self.shown.setdefault(result.shown_revision, masks) == masks

    def rejected(self, seq: int, field_path: str) -> None:
        response = self.receive()
        assert response.rejected.seq == seq, response
        assert response.rejected.violations[0].field == field_path
        assert response.revision == self.revision

    # Prompts

    def edit(self, name: str, prompt: Prompt, names: list[str], **action: Any) -> None:
        """Make an edit of the prompts, wait for its result, and check it."""
        self.check_round(name, prompt, names, self.result(self.send(name, **action)))

    def check_round(self, name: str, prompt: Prompt, names: list[str], result: pb.MaskResult) -> None:
        known = self.objects[name]
        assert result.object_id == name
        if not result.shown_revision:
            assert not result.rounds
            known.go_on(Place(prompt, names))
            return
        for computed in result.rounds:
            source = known.here
            assert computed.multimask_output == (not source.count)
            if computed.mask_revision:
                assert computed.mask_revision == source.revision
                assert source.selected in (None, computed.mask_index)
            # What is not the last was folded; its prompts are checked by the replay.
            known.go_on(
                Place(computed.prompt, list(computed.point_ids), computed.revision, None, 3 - 2 * bool(source.count))
            )
        last = result.rounds[-1]
        assert last.revision == result.shown_revision
        assert last.prompt == prompt
        assert list(last.point_ids) == (names if any(names) else [])
        known.here.names = names
        known.here.selected, known.here.count = result.selected_mask, len(result.prediction.masks)

    @rule(name=objects, at=positions, label=labels, named=st.booleans())
    def click(self, name: str, at: tuple[float, float], label: PointLabel.ValueType, named: bool) -> None:
        here = self.objects[name].here
        point_id = f"p{self.seq}" if named else ""
        point = Point(x=at[0], y=at[1], label=label)
        prompt = Prompt(
            points=[*here.prompt.points, point], box=here.prompt.box if here.prompt.HasField("box") else None
        )
        add = pb.AddPoints(points=[point], point_ids=[point_id] if named else [])
        self.edit(name, prompt, [*here.names, point_id], add_points=add)

    @rule(name=objects, at=st.lists(positions, min_size=2, max_size=5))
    def burst(self, name: str, at: list[tuple[float, float]]) -> None:
        """Click without waiting: edits may be folded, but the last result shows all of them."""
        here = self.objects[name].here
        points, names = list(here.prompt.points), list(here.names)
        for x, y in at:
            point = Point(x=x, y=y, label=POINT_LABEL_FOREGROUND)
            points, names = [*points, point], [*names, ""]
            last = self.send(name, add_points=pb.AddPoints(points=[point]))
        rounds: list[pb.Round] = []
        while True:
            response = self.receive()
            self.note(response)
            rounds += response.result.rounds
            if response.applied_seq == last:
                break
        if self.policy == pb.EDIT_POLICY_EVERY_EDIT:
            assert len(rounds) == len(at)
        box = here.prompt.box if here.prompt.HasField("box") else None
        whole = pb.MaskResult()
        whole.CopyFrom(response.result)
        del whole.rounds[:]
        whole.rounds.extend(rounds)
        self.check_round(name, Prompt(points=points, box=box), names, whole)

    @rule(name=objects, corners=st.tuples(positions, positions))
    def box(self, name: str, corners: tuple[tuple[float, float], tuple[float, float]]) -> None:
        (x0, y0), (x1, y1) = corners
        hypothesis.assume(x0 != x1 and y0 != y1)
        here = self.objects[name].here
        box = Box(x_min=min(x0, x1), y_min=min(y0, y1), x_max=max(x0, x1), y_max=max(y0, y1))
        self.edit(name, Prompt(points=here.prompt.points, box=box), here.names, set_box=box)

    @rule(name=objects)
    def clear_box(self, name: str) -> None:
        here = self.objects[name].here
        self.edit(name, Prompt(points=here.prompt.points), here.names, clear_box=pb.ClearBox())

    @rule(name=objects, choose=st.randoms(use_true_random=False), at=st.none() | positions)
    def change_point(self, name: str, choose: Any, at: tuple[float, float] | None) -> None:
        """Move or remove a point that has a name."""
        here = self.objects[name].here
        named = [i for i, point_id in enumerate(here.names) if point_id]
        hypothesis.assume(named)
        i = choose.choice(named)
        points, names = list(here.prompt.points), list(here.names)
        if at is None:
            action: dict[str, Any] = {"remove_point": pb.RemovePoint(point_id=names[i])}
            del points[i], names[i]
        else:
            action = {"move_point": pb.MovePoint(point_id=names[i], x=at[0], y=at[1])}
            points[i] = Point(x=at[0], y=at[1], label=points[i].label)
        box = here.prompt.box if here.prompt.HasField("box") else None
        self.edit(name, Prompt(points=points, box=box), names, **action)

    @rule(name=objects, value=st.floats(-8, 8, width=16))
    def set_mask(self, name: str, value: float) -> None:
        here = self.objects[name].here
        y, x = np.mgrid[:256, :256]
        plane = (value + (x - y) / 32).astype("<f4")
        tensor = Tensor(dtype=DATA_TYPE_FLOAT32, shape=[1, 256, 256], data=plane.tobytes())
        self.set_masks[self.seq + 1] = tensor
        self.edit(name, here.prompt, here.names, set_mask=tensor)
        assert self.rounds[self.objects[name].here.revision].mask_seq == self.seq

    # History

    @rule(name=objects, steps=st.integers(0, 4), forward=st.booleans())
    def travel(self, name: str, steps: int, forward: bool) -> None:
        known = self.objects[name]
        room = len(known.places) - 1 - known.at if forward else known.at
        action = {"redo": pb.Redo(steps=steps)} if forward else {"undo": pb.Undo(steps=steps)}
        seq = self.send(name, **action)
        if max(1, steps) > room:
            self.rejected(seq, f"edit.{'redo' if forward else 'undo'}.steps")
            return
        result = self.result(seq)
        known.at += max(1, steps) * (1 if forward else -1)
        self.check_shown(name, result)

    @rule(name=objects)
    def reset(self, name: str) -> None:
        known = self.objects[name]
        result = self.result(self.send(name, reset=pb.Reset()))
        if known.here.count or known.here.prompt.ByteSize():
            known.go_on(Place(Prompt(), []))
        self.check_shown(name, result)

    @rule(name=objects, index=st.integers(0, 3))
    def select(self, name: str, index: int) -> None:
        known = self.objects[name]
        seq = self.send(name, select_mask=pb.SelectMask(index=index))
        if index >= known.here.count:
            self.rejected(seq, "edit.select_mask.index")
            return
        result = self.result(seq)
        known.here.selected = index
        self.check_shown(name, result)

    def check_shown(self, name: str, result: pb.MaskResult) -> None:
        """Check a result for which nothing was computed."""
        here = self.objects[name].here
        assert not result.rounds
        assert not result.HasField("timing")
        shown = (result.object_id, result.shown_revision, result.selected_mask, len(result.prediction.masks))
        assert shown == (name, here.revision, here.selected, here.count)

    # What connections do

    @precondition(lambda self: self.sent)
    @rule(choose=st.randoms(use_true_random=False))
    def send_again(self, choose: Any) -> None:
        """An edit that arrives twice is applied once: the next answer is that of the next edit."""
        self.requests.put(choose.choice(self.sent))
        self.rejected(self.send("a", undo=pb.Undo(steps=999)), "edit.undo.steps")

    @rule()
    def skip_a_number(self) -> None:
        self.seq += 1
        self.skipped.append(self.seq)

    @precondition(lambda self: self.skipped and self.sent and self.sent[-1].seq > self.skipped[-1])
    @rule()
    def send_out_of_order(self) -> None:
        late = self.skipped.pop()
        self.requests.put(pb.RefineRequest(seq=late, edit=pb.Edit(object_id="a", reset=pb.Reset())))
        self.rejected(late, "seq")

    @rule(again=st.integers(0, 5), cut=st.booleans())
    def resume(self, again: int, cut: bool) -> None:
        """Lose the connection, or leave it behind; come back and send the last edits again."""
        left = self.stream
        if cut:
            left.cancel()
        resume = pb.Resume(
            session_id=self.opened.session_id, resume_token=self.opened.resume_token, last_revision=self.revision
        )
        old_requests = self.requests
        response = self.connect(pb.RefineConfig(resume=resume))
        assert response.opened.resumed
        assert response.revision == self.revision
        assert response.applied_seq == (self.sent[-1].seq if self.sent else 0)
        old_requests.put(None)
        for request in self.sent[len(self.sent) - min(again, len(self.sent)) :]:
            self.requests.put(request)
        seq = self.send("a", undo=pb.Undo(steps=999))
        while True:  # rejections that may not have arrived come first
            response = self.receive()
            assert response.WhichOneof("payload") == "rejected"
            if response.rejected.seq == seq:
                break

    # The proof

    def teardown(self) -> None:
        if not hasattr(self, "opened"):
            return
        self.requests.put(pb.RefineRequest(finish=pb.Finish()))
        assert list(self.stream) == []
        logits: dict[int, Tensor] = {}
        for revision, computed in sorted(self.rounds.items()):
            prompt = Prompt()
            prompt.CopyFrom(computed.prompt)
            if computed.mask_seq:
                prompt.mask_input.CopyFrom(self.set_masks[computed.mask_seq])
            elif computed.mask_revision:
                prompt.mask_input.CopyFrom(candidate(logits[computed.mask_revision], computed.mask_index))
            output = OutputOptions(multimask_output=computed.multimask_output, return_logits=True)
            image = Image(digest=self.opened.image.digest)
            answer = self.stub.Segment(SegmentRequest(model=self.model, image=image, prompts=[prompt], output=output))
            logits[revision] = answer.mask_logits
            masks = [mask.coco_rle for mask in answer.predictions[0].masks]
            assert self.shown.get(revision, masks) == masks


def candidate(logits: Tensor, index: int) -> Tensor:
    """Cut one candidate ``[1, 256, 256]`` out of ``[1, C, 256, 256]``."""
    size = len(logits.data) // logits.shape[1]
    return Tensor(dtype=logits.dtype, shape=[1, *logits.shape[2:]], data=logits.data[index * size : (index + 1) * size])


@pytest.fixture
def machine() -> Iterator[Callable[[ServerProcess, str], type[Session]]]:
    """Make the machine for a server and a model."""
    channels = []

    def make(server: ServerProcess, model: str) -> type[Session]:
        channels.append(connect(server))
        stub = SegmentationServiceStub(channels[-1])
        return type("SessionOn", (Session,), {"stub": stub, "model": model})

    yield make
    for channel in channels:
        channel.close()


def examples(count: int, steps: int) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=count,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],  # shrinking would run the server for minutes
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def test_any_session_with_grabcut(server: ServerProcess, machine: Callable[..., type[Session]]) -> None:
    run_state_machine_as_test(machine(server, "grabcut"), settings=examples(12, 15))
    server.wait_for(lambda stats: stats["sessions"] == 0 and stats["calls"] == 0)


def test_any_session_with_sam2(sam2_server: ServerProcess, machine: Callable[..., type[Session]]) -> None:
    run_state_machine_as_test(machine(sam2_server, "sam2.1-hiera-tiny"), settings=examples(6, 15))
    sam2_server.wait_for(lambda stats: stats["sessions"] == 0 and stats["calls"] == 0)
