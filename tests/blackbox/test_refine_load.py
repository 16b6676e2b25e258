"""Many streams at once, workers that are killed under them, and clients that do not read."""

import io
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image as PILImage

from segrpc.v1.refine_pb2 import (
    EDIT_POLICY_EVERY_EDIT,
    EDIT_POLICY_LATEST_WINS,
    Edit,
    MovePoint,
    RefineConfig,
    RefineRequest,
    RefineResponse,
    Round,
    SelectMask,
    Undo,
)
from segrpc.v1.segmentation_service_pb2 import SegmentRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import DATA_TYPE_FLOAT32, Image, OutputOptions, Prompt, Tensor
from tests.blackbox.gate import Gate
from tests.blackbox.refine_stream import RefineStream, points, replay, results
from tests.photos import NAMES, load_image
from tests.server_process import NARROW, ServerProcess, connect
from tests.tcp_proxy import TcpProxy

MiB = 2**20
WIDTH, HEIGHT = 150, 100
SIDE = 128  # of the logits of the model `gated`

CONFIG = """
embedding_cache_bytes = CACHE

[[models]]
name = "gated"
model_params = { gates = "GATES" }

[[models]]
name = "noisy"
model = "gated"
model_params = { gates = "GATES", noisy = true }
"""
EMBEDDING_BYTES = SIDE * SIDE * 8  # of the model `gated`


def as_png(image: PILImage.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


PHOTOS = [as_png(load_image(name).resize((WIDTH, HEIGHT))) for name in NAMES[:4]]


@dataclass(frozen=True)
class Models:
    """A server with the models of the third party, whose cache holds the embedding of one image."""

    server: ServerProcess
    gate: Gate


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, third_party: dict[str, str]) -> Iterator[Models]:
    folder = tmp_path_factory.mktemp("load")
    gates, config = folder / "gates", folder / "config.toml"
    config.write_text(CONFIG.replace("GATES", str(gates)).replace("CACHE", str(EMBEDDING_BYTES * 3 // 2)))
    gate = Gate(gates)  # the models pass there when the server starts already
    with ServerProcess("--config", str(config), log=folder / "log", environment=third_party) as process:
        yield Models(process, gate)


# A worker that is killed

STREAMS, EDITS = 32, 6


class Progress:
    """How many edits are answered, over all threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._answered = 0

    def count(self, number: int) -> None:
        with self._changed:
            self._answered += number
            self._changed.notify_all()

    def wait_for(self, number: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._answered >= number, 120), self._answered


def clicks_of(number: int) -> list[tuple[float, float]]:
    random = np.random.default_rng(number)
    return [(float(x), float(y)) for x, y in random.integers([10, 10], [WIDTH - 10, HEIGHT - 10], (EDITS, 2))]


def refine(channel: grpc.Channel, number: int, progress: Progress) -> list[RefineResponse]:
    """Live one session: one edit after the other, or two at a time, which may be folded. Returns all results."""
    image, every = PHOTOS[number % len(PHOTOS)], number % 2 == 0
    policy = EDIT_POLICY_EVERY_EDIT if every else EDIT_POLICY_LATEST_WINS
    config = RefineConfig(image=Image(data=image), model="gated", edit_policy=policy)
    with RefineStream(channel, config, timeout=200) as stream:
        stream.opened()
        pending: list[int] = []
        answered = 0
        for i, click in enumerate(clicks_of(number)):
            pending.append(stream.edit(add_points=points(click, label=i % 3 != 2)))
            if not every and i % 2 == 0 and i + 1 < EDITS:
                continue
            while answered < pending[-1]:
                answered = stream.next().applied_seq
            progress.count(len(pending))
            pending.clear()
        stream.finish()
        assert stream.rest() == []
        return results(stream.seen)


def test_no_stream_notices_that_the_worker_is_killed(models: Models) -> None:
    server, progress = models.server, Progress()
    with connect(server) as first, connect(server) as second, ThreadPoolExecutor(STREAMS) as threads:
        # Once without streams, so that what is made only once is there.
        assert len(refine(first, 0, Progress())) == EDITS
        server.settle({**server.stats(), "calls": 0, "sessions": 0, "attached_sessions": 0, "session_bytes": 0})
        before, resident = server.stats(), server.resident_bytes()
        live = [threads.submit(refine, (first, second)[i % 2], i, progress) for i in range(STREAMS)]
        for third in (1, 2, 3):
            progress.wait_for(STREAMS * EDITS * third // 4)
            (pid,) = server.wait_for(lambda stats: len(stats["engine"]["worker_pids"]) == 1)["engine"]["worker_pids"]
            os.kill(pid, signal.SIGKILL)
            server.wait_for(lambda stats, pid=pid: pid not in stats["engine"]["worker_pids"])  # type: ignore[misc]
        outcomes = [one.result() for one in live]
        assert server.stats()["engine"]["worker_restarts"] == before["engine"]["worker_restarts"] + 3
        server.settle(before)
        assert server.resident_bytes() < resident + 256 * MiB
        checks = [threads.submit(check, (first, second)[i % 2], i, outcomes[i]) for i in range(STREAMS)]
        assert sum(one.result() for one in checks) >= STREAMS * EDITS * 3 // 4
    server.settle(before)


def check(channel: grpc.Channel, number: int, answers: list[RefineResponse]) -> int:
    """Compare all results with what Segment says to the same rounds; return how many rounds there were."""
    rounds = [one for answer in answers for one in answer.result.rounds]
    repeated = replay(channel, PHOTOS[number % len(PHOTOS)], rounds, "gated")
    masks = {one.revision: again.predictions[0] for one, again in zip(rounds, repeated, strict=True)}
    for answer in answers:
        assert as_bytes(answer.result.prediction) == as_bytes(masks[answer.result.shown_revision])
    # Every edit that was answered is in the last masks.
    assert answers[-1].result.shown_revision == rounds[-1].revision == answers[-1].revision
    assert [(point.x, point.y) for point in rounds[-1].prompt.points] == clicks_of(number)
    assert answers[-1].applied_seq == 2 * EDITS
    return len(rounds)


def as_bytes(message: Any) -> bytes:
    data: bytes = message.SerializeToString(deterministic=True)
    return data


# Two images at the same time


def many_rounds(channel: grpc.Channel, image: bytes, count: int) -> list[RefineResponse]:
    config = RefineConfig(image=Image(data=image), model="gated", edit_policy=EDIT_POLICY_EVERY_EDIT)
    with RefineStream(channel, config) as stream:
        stream.opened()
        for i in range(count):
            stream.edit(add_points=points((i % WIDTH, i * 7 % HEIGHT), label=i % 2))
            stream.next()
            if i % 5 == 4:
                stream.edit(undo=Undo(steps=2))
                stream.next()
                stream.edit(select_mask=SelectMask())
                stream.next()
        stream.finish()
        assert stream.rest() == []
        return results(stream.seen)


def test_two_sessions_never_see_each_others_image(models: Models) -> None:
    count, before = 60, models.server.stats()
    with connect(models.server) as first, connect(models.server) as second, ThreadPoolExecutor() as threads:
        alone = [many_rounds(first, image, count) for image in PHOTOS[:2]]
        encodes = models.server.stats()["engine"]["encodes"]
        together = list(threads.map(many_rounds, (first, second), PHOTOS[:2], (count, count)))
        # They had to make room for each other all the time.
        assert models.server.stats()["engine"]["encodes"] > encodes + 2
    for one, other in zip(alone, together, strict=True):
        assert len(one) == len(other)
        for expected, answer in zip(one, other, strict=True):
            assert (answer.revision, answer.applied_seq) == (expected.revision, expected.applied_seq)
            assert as_bytes(answer.result.prediction) == as_bytes(expected.result.prediction)
            assert answer.result.rounds == expected.result.rounds
    assert as_bytes(alone[0][-1].result.prediction) != as_bytes(alone[1][-1].result.prediction)
    models.server.settle(before)


# Clients that do not read


def call_others(channel: grpc.Channel, times: int) -> None:
    """Make calls of somebody else's, on the same model."""
    stub = SegmentationServiceStub(channel)
    prompt = Prompt(points=points((10, 10)).points)
    for _ in range(times):
        stub.Segment(SegmentRequest(image=Image(data=PHOTOS[0]), model="gated", prompts=[prompt]), timeout=30)


def test_a_client_that_does_not_read_is_waited_for(models: Models) -> None:
    count, others, before = 600, 200, models.server.stats()
    config = RefineConfig(
        image=Image(data=PHOTOS[0]),
        model="gated",
        edit_policy=EDIT_POLICY_EVERY_EDIT,
        output=OutputOptions(return_logits=True),  # 64 KiB each
    )
    with connect(models.server, *NARROW) as channel, connect(models.server) as other:
        call_others(other, 2)
        decodes, peak = models.gate.decodes, models.server.peak_bytes()
        with RefineStream(channel, config) as stream:
            stream.opened()
            for i in range(count):
                x, y = i % WIDTH, i * 7 % HEIGHT
                if i == 0:
                    stream.edit(add_points=points((x, y), ids=("a",)))
                else:
                    stream.edit(move_point=MovePoint(point_id="a", x=x, y=y))
            # Each of these calls waits for the model behind an edit, as long as edits are computed.
            call_others(other, others)
            ahead = models.gate.decodes - decodes - others
            assert 0 < ahead < 100
            assert models.server.peak_bytes() < peak + 64 * MiB
            answers = [stream.next() for _ in range(count)]
            assert [answer.applied_seq for answer in answers] == [2 * i + 2 for i in range(count)]
            assert [answer.result.shown_revision for answer in answers] == list(range(1, count + 1))
            rounds = [one for answer in answers for one in answer.result.rounds]
            clicks = [(one.prompt.points[0].x, one.prompt.points[0].y) for one in rounds]
            assert clicks == [(i % WIDTH, i * 7 % HEIGHT) for i in range(count)]
            stream.finish()
            assert stream.rest() == []
        assert models.gate.decodes == decodes + others + count
    models.server.settle(before)


def test_stale_results_are_not_sent_to_a_client_that_does_not_read(models: Models) -> None:
    count, before = 20, models.server.stats()
    y, x = np.mgrid[:900, :1200]
    image = as_png(PILImage.fromarray(((x + y) % 256).astype(np.uint8)))
    config = RefineConfig(image=Image(data=image), model="noisy")
    with connect(models.server, *NARROW) as channel, RefineStream(channel, config) as stream:
        stream.opened()
        for i in range(count):
            decodes = models.gate.decodes
            stream.edit(add_points=points((10 * i, 12)))
            stream.edit("other", add_points=points((12, 10 * i)))
            models.server.wait_for(
                lambda stats, decodes=decodes: (  # type: ignore[misc]
                    models.gate.decodes == decodes + 2 and stats["engine"]["pending"] == 0
                )
            )
        stream.finish()
        answers = results(stream.rest())
    # One or two of each object were on their way; all others were overtaken.
    assert len(answers) <= 6
    revisions = [answer.revision for answer in answers]
    assert revisions == sorted(revisions)
    assert answers[-1].revision == 2 * count
    for name, last in (("1", 2 * count - 1), ("other", 2 * count)):
        told = [answer.result for answer in answers if answer.result.object_id == name]
        assert told[-1].shown_revision == last
        rounds: list[Round] = [one for result in told for one in result.rounds]
        assert [len(one.prompt.points) for one in rounds] == list(range(1, count + 1))
    models.server.settle(before)


def test_rejections_wait_for_the_reader(models: Models) -> None:
    count, before = 3000, models.server.stats()
    mask = Tensor(dtype=DATA_TYPE_FLOAT32, shape=[1, SIDE, SIDE], data=bytes(4 * SIDE * SIDE))
    wrong = RefineRequest(seq=1, edit=Edit(object_id="1", set_mask=mask)).SerializeToString()
    config = RefineConfig(image=Image(data=PHOTOS[0]), model="gated")
    with (
        TcpProxy(models.server.target) as proxy,
        connect(models.server) as other,
        connect(proxy, *NARROW) as channel,
        RefineStream(channel, config) as stream,
    ):
        stream.opened()
        stream.edit(seq=2, add_points=points((10, 10)))
        stream.result()
        for _ in range(count):
            stream.send(wrong)  # under a number that was not seen and is too low
        call_others(other, 200)
        assert proxy.bytes_to_server < count * len(wrong) / 2
        assert [stream.rejected().seq for _ in range(count)] == [1] * count
        stream.edit(undo=Undo())
        assert stream.result().shown_revision == 0
        stream.finish()
        assert stream.rest() == []
    models.server.settle(before)


def test_masks_that_do_not_fit_are_let_go_at_once(models: Models) -> None:
    count, before = 200, models.server.stats()
    mask = Tensor(dtype=DATA_TYPE_FLOAT32, shape=[1, 1024, 1024], data=bytes(4 * MiB))
    wrong = [mask, Tensor(dtype=mask.dtype, shape=[2, 1024, 1024], data=mask.data)]
    config = RefineConfig(image=Image(data=PHOTOS[0]), model="gated", edit_policy=EDIT_POLICY_EVERY_EDIT)
    with connect(models.server) as channel, RefineStream(channel, config) as stream:
        stream.opened()
        models.gate.hold("decode")
        stream.edit(add_points=points((10, 10)))
        models.gate.wait_until_held("decode")
        peak = models.server.peak_bytes()
        for i in range(count):
            stream.edit(set_mask=wrong[i % 2])
        stream.barrier()  # all of them wait in the server
        models.gate.release("decode")
        assert stream.result().shown_revision == 1
        for i in range(count):
            (violation,) = stream.rejected().violations
            assert violation.field == ("edit.set_mask", "edit.set_mask.data")[i % 2]
        # A third of what came. How much gRPC takes ahead grows with the delay of a machine that has much to do.
        assert models.server.peak_bytes() < peak + 256 * MiB
        stream.finish()
        assert stream.rest() == []
    models.server.settle(before)
