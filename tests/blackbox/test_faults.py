"""Faults at each stage of a stream: what was held is given back, and a resumed session has lost nothing.

The model ``gated`` is held at the stage in question with named pipes, so that nothing depends on time.
"""

import io
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo

from segrpc.v1.refine_pb2 import (
    EDIT_POLICY_EVERY_EDIT,
    Finish,
    ImageChunk,
    RefineConfig,
    RefineRequest,
    RefineResponse,
    Reset,
    SelectMask,
    Undo,
    UploadHeader,
)
from segrpc.v1.types_pb2 import Box, Image
from tests.blackbox.gate import Gate
from tests.blackbox.refine_stream import RefineStream, points, results
from tests.server_process import NARROW, ServerProcess, connect
from tests.tcp_proxy import TcpProxy

Code = grpc.StatusCode

CONFIG = """
[[models]]
name = "gated"
model_params = { gates = "GATES" }

[[models]]
name = "noisy"
model = "gated"
model_params = { gates = "GATES", noisy = true }

[[models]]
name = "deadly"
model = "gated"
model_params = { gates = "GATES", deadly = true }
"""

# Any edit that is lost or applied twice changes the outcome.
EDITS: list[tuple[str, dict[str, Any]]] = [
    ("a", {"add_points": points((20, 12))}),
    ("b", {"set_box": Box(x_min=5, y_min=5, x_max=60, y_max=40)}),
    ("a", {"select_mask": SelectMask(index=0)}),
    ("a", {"add_points": points((40, 30), label=0)}),
    ("b", {"add_points": points((8, 8))}),
    ("a", {"add_points": points((50, 20))}),
    ("a", {"undo": Undo()}),
    ("b", {"add_points": points((70, 50), label=0)}),
    ("a", {"add_points": points((10, 40))}),
]
DECODES = 7  # of these edits

# The masks of the model `noisy` on the large image take so many bytes that they do not fit into what lies between a
# server and a client that does not read.
SMALL, LARGE = (96, 64), (1200, 900)
LARGE_BYTES = 4_000_000  # of all results for the edits, at least

_numbers = itertools.count()


def fresh_image(size: tuple[int, int]) -> bytes:
    """An image that no server has seen before: always the same pixels, and another file."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    info, file = PngInfo(), io.BytesIO()
    info.add_text("number", f"{os.getpid()}-{next(_numbers)}")
    pixels = (x * 255 // width + y * 255 // height) // 2
    PILImage.fromarray(pixels.astype(np.uint8)).save(file, "PNG", pnginfo=info, compress_level=1)
    return file.getvalue()


@dataclass
class Site:
    """A server with the model that can be held, and what it held before the test.

    Attributes:
        server: The server.
        gate: The hand on the model.
        before: The statistics before the test.
        logged: How much was in the log before the test.
    """

    server: ServerProcess
    gate: Gate
    before: dict[str, Any] = field(default_factory=dict)
    logged: int = 0

    def note(self) -> None:
        """Note what the server holds now."""
        self.before, self.logged = self.server.stats(), len(self.server.log_text())

    def settle(self, *, sessions: int) -> None:
        """Wait until all is as it was, but for some more sessions that wait for being resumed."""
        before = self.before

        def settled(stats: dict[str, Any]) -> bool:
            same = all(stats[key] == before[key] for key in ("calls", "attached_sessions"))
            gone = stats["engine"]["pending"] == 0 and bool(stats["tasks"] <= before["tasks"])
            return same and gone and bool(stats["sessions"] == before["sessions"] + sessions)

        self.server.wait_for(settled)

    def wait_for_calls(self, number: int) -> None:
        """Return once the server has that many calls more than before."""
        self.server.wait_for(lambda stats: stats["calls"] == self.before["calls"] + number)

    def check_log(self) -> None:
        """No fault is a bug of the server's."""
        new = self.server.log_text()[self.logged :]
        assert "Traceback" not in new, new
        assert "bug in" not in new, new

    def worker(self) -> int:
        """The worker process, once there is one."""
        stats = self.server.wait_for(lambda stats: len(stats["engine"]["worker_pids"]) == 1)
        pid: int = stats["engine"]["worker_pids"][0]
        return pid

    def kill_worker(self) -> None:
        """Kill the worker process, and wait until it is gone."""
        pid = self.worker()
        os.kill(pid, signal.SIGKILL)
        self.server.wait_for(lambda stats: pid not in stats["engine"]["worker_pids"])


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, third_party: dict[str, str]) -> Iterator[Callable[..., Site]]:
    """Starts servers with the model that can be held."""
    with ExitStack() as started:

        def run(*arguments: str) -> Site:
            folder = tmp_path_factory.mktemp("faults")
            gate, config = Gate(folder / "gates"), folder / "config.toml"
            config.write_text(CONFIG.replace("GATES", str(folder / "gates")))
            server = ServerProcess("--config", str(config), *arguments, log=folder / "log", environment=third_party)
            return Site(started.enter_context(server), gate)

        yield run


@pytest.fixture(scope="module")
def shared(start: Callable[..., Site]) -> Site:
    """A server for all tests that leave it alive."""
    return start()


@pytest.fixture
def site(shared: Site) -> Iterator[Site]:
    """The shared server, which must be as before afterwards."""
    shared.note()
    yield shared
    shared.gate.open()
    shared.settle(sessions=0)
    shared.check_log()


def config(image: bytes, model: str) -> RefineConfig:
    return RefineConfig(image=Image(data=image), model=model, edit_policy=EDIT_POLICY_EVERY_EDIT)


def upload_config(size: int) -> RefineConfig:
    return RefineConfig(upload=UploadHeader(size=size), edit_policy=EDIT_POLICY_EVERY_EDIT)


def send_edits(stream: RefineStream) -> None:
    """Send all edits, each always under the same number."""
    for i, (name, action) in enumerate(EDITS):
        stream.edit(name, seq=2 * i + 2, **action)


@dataclass(frozen=True)
class Outcome:
    """What a session came to.

    Attributes:
        revision: The newest revision: there is one for each edit.
        objects: For each object the shown revision, the selected candidate and the masks, byte for byte.
        rounds: The rounds that were told, by their revisions.
    """

    revision: int
    objects: dict[str, tuple[int, int, bytes]]
    rounds: dict[int, bytes]

    @classmethod
    def of(cls, responses: list[RefineResponse]) -> "Outcome":
        objects, rounds = {}, {}
        for response in results(responses):
            result = response.result
            masks = result.prediction.SerializeToString(deterministic=True)
            objects[result.object_id] = (result.shown_revision, result.selected_mask, masks)
            rounds.update({one.revision: one.SerializeToString(deterministic=True) for one in result.rounds})
        return cls(responses[-1].revision, objects, rounds)


@pytest.fixture(scope="module")
def undisturbed(shared: Site) -> dict[str, Outcome]:
    """What the edits come to without any fault, by the model's name."""
    outcomes = {}
    for model, size in (("gated", SMALL), ("noisy", LARGE)):
        with connect(shared.server) as channel, RefineStream(channel, config(fresh_image(size), model)) as stream:
            stream.opened()
            decodes = shared.gate.decodes
            send_edits(stream)
            stream.finish()
            answers = stream.rest()
            assert [answer.applied_seq for answer in answers] == [2 * i + 2 for i in range(len(EDITS))]
            assert shared.gate.decodes == decodes + DECODES
            outcomes[model] = Outcome.of(answers)
            assert model == "gated" or sum(answer.ByteSize() for answer in answers) > LARGE_BYTES
    shared.server.wait_for(lambda stats: stats["calls"] == 0 and stats["sessions"] == 0)
    return outcomes


# Stages


@dataclass
class Stage:
    """A stream that was brought to a stage.

    Attributes:
        stream: The stream.
        model: The model's name.
        held: The stage of the model that is held, or empty.
        answered: Whether there is a session that the client knows.
        image: The encoded image.
    """

    stream: RefineStream
    model: str = "gated"
    held: str = ""
    answered: bool = True
    image: bytes = b""


def before_config(site: Site, channel: grpc.Channel, timeout: float) -> Stage:
    stream = RefineStream(channel, timeout=timeout)
    site.wait_for_calls(1)
    return Stage(stream, answered=False)


def uploading(site: Site, channel: grpc.Channel, timeout: float) -> Stage:
    image = fresh_image(SMALL)
    half = len(image) // 2
    stream = RefineStream(channel, upload_config(len(image)), timeout=timeout)
    stream.send(RefineRequest(image=ImageChunk(data=image[:half])))
    assert stream.next().upload.received_size == half
    return Stage(stream, answered=False, image=image)


def encoding(site: Site, channel: grpc.Channel, timeout: float) -> Stage:
    site.gate.hold("embed")
    stream = RefineStream(channel, config(fresh_image(SMALL), "gated"), timeout=timeout)
    stream.opened()
    send_edits(stream)
    site.gate.wait_until_held("embed")
    stream.barrier()
    return Stage(stream, held="embed")


def decoding(site: Site, channel: grpc.Channel, timeout: float) -> Stage:
    stream = RefineStream(channel, config(fresh_image(SMALL), "gated"), timeout=timeout)
    stream.opened()
    name, action = EDITS[0]
    stream.edit(name, **action)
    stream.result()
    site.gate.hold("decode")
    send_edits(stream)
    site.gate.wait_until_held("decode")
    stream.barrier()
    return Stage(stream, held="decode")


def writing(site: Site, channel: grpc.Channel, timeout: float) -> Stage:
    stream = RefineStream(channel, config(fresh_image(LARGE), "noisy"), timeout=timeout)
    stream.opened()
    decodes = site.gate.decodes
    send_edits(stream)
    # All is computed, and nothing is read.
    site.server.wait_for(lambda stats: site.gate.decodes == decodes + DECODES and stats["engine"]["pending"] == 0)
    return Stage(stream, model="noisy")


Reach = Callable[[Site, grpc.Channel, float], Stage]
STAGES: dict[str, Reach] = {
    reach.__name__.replace("_", " "): reach for reach in (before_config, uploading, encoding, decoding, writing)
}

# Seconds: enough to get there.
DEADLINES = {"before config": 2.0, "uploading": 2.0, "encoding": 3.0, "decoding": 3.0, "writing": 4.0}

# Faults of the client or the network: what the client sees of it.


def cancel(stage: Stage, channel: grpc.Channel, proxy: TcpProxy) -> Code:
    stage.stream.call.cancel()
    return Code.CANCELLED


def deadline(stage: Stage, channel: grpc.Channel, proxy: TcpProxy) -> Code:
    return Code.DEADLINE_EXCEEDED  # it comes by itself


def close_channel(stage: Stage, channel: grpc.Channel, proxy: TcpProxy) -> Code:
    channel.close()
    return Code.CANCELLED


def connection_end(stage: Stage, channel: grpc.Channel, proxy: TcpProxy) -> Code:
    proxy.cut()
    return Code.UNAVAILABLE


def connection_reset(stage: Stage, channel: grpc.Channel, proxy: TcpProxy) -> Code:
    proxy.reset()
    return Code.UNAVAILABLE


Fault = Callable[[Stage, grpc.Channel, TcpProxy], Code]
FAULTS: dict[str, Fault] = {
    fault.__name__.replace("_", " "): fault
    for fault in (cancel, deadline, close_channel, connection_end, connection_reset)
}


def check_resumed(site: Site, stage: Stage, undisturbed: dict[str, Outcome]) -> None:
    """Resume the session, send everything again, and compare with a session without any fault."""
    expected = undisturbed[stage.model]
    with connect(site.server) as channel, RefineStream(channel, stage.stream.resuming()) as stream:
        opened = stream.opened()
        assert opened.opened.resumed
        assert opened.applied_seq >= max(response.applied_seq for response in stage.stream.seen)
        send_edits(stream)
        stream.finish()
        stream.rest()
        found = Outcome.of(stream.seen)
    assert (found.revision, found.objects) == (expected.revision, expected.objects)
    assert found.rounds.items() <= expected.rounds.items()


@pytest.fixture
def proxy(site: Site) -> Iterator[TcpProxy]:
    """The network between a client and the shared server."""
    with TcpProxy(site.server.target) as opened:
        yield opened


@pytest.fixture
def through_proxy(proxy: TcpProxy) -> Iterator[grpc.Channel]:
    """A connection that takes little ahead of its reader."""
    with connect(proxy, *NARROW) as channel:
        yield channel


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_lost_stream(
    site: Site,
    undisturbed: dict[str, Outcome],
    proxy: TcpProxy,
    through_proxy: grpc.Channel,
    stage: str,
    fault: str,
) -> None:
    reached = STAGES[stage](site, through_proxy, DEADLINES[stage] if fault == "deadline" else 60.0)
    assert proxy.bytes_to_client < LARGE_BYTES / 2
    expected = FAULTS[fault](reached, through_proxy, proxy)
    assert reached.stream.call.code() is expected  # comes when the call has ended for the client
    site.wait_for_calls(0)  # although the model may be held still
    if reached.held:
        site.gate.release(reached.held)
    site.settle(sessions=int(reached.answered))
    if reached.answered:
        check_resumed(site, reached, undisturbed)


@pytest.mark.parametrize("stage", STAGES)
def test_a_half_closed_stream(
    site: Site, undisturbed: dict[str, Outcome], through_proxy: grpc.Channel, stage: str
) -> None:
    reached = STAGES[stage](site, through_proxy, 60.0)
    stream = reached.stream
    stream.half_close()
    if reached.held:
        site.gate.release(reached.held)
    if not reached.answered:
        failure = stream.failure()
        expected = "CONFIG_NOT_FIRST" if stage == "before config" else "CHUNK_OFFSET"
        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, expected)
    else:
        stream.rest()
        assert [one.applied_seq for one in results(stream.seen)] == [2 * i + 2 for i in range(len(EDITS))]
        assert Outcome.of(stream.seen) == undisturbed[reached.model]
    site.settle(sessions=int(reached.answered))
    if reached.answered:
        check_resumed(site, reached, undisturbed)


def test_a_session_is_resumed_while_the_model_works_for_the_lost_stream(
    site: Site, undisturbed: dict[str, Outcome], proxy: TcpProxy, through_proxy: grpc.Channel
) -> None:
    reached = decoding(site, through_proxy, 60.0)
    proxy.reset()
    with connect(site.server) as channel, RefineStream(channel, reached.stream.resuming()) as stream:
        stream.opened()
        send_edits(stream)
        stream.finish()
        # The edit that the lost stream waited for is on its way again; one of the two is answered.
        site.gate.release("decode")
        stream.rest()
        assert Outcome.of(stream.seen) == undisturbed["gated"]


def test_a_session_that_is_taken_while_the_model_works(
    site: Site, undisturbed: dict[str, Outcome], through_proxy: grpc.Channel
) -> None:
    reached = decoding(site, through_proxy, 60.0)
    with connect(site.server) as channel, RefineStream(channel, reached.stream.resuming()) as stream:
        stream.opened()
        failure = reached.stream.failure()
        assert (failure.code, failure.reason) == (Code.ABORTED, "SESSION_TAKEN")
        site.gate.release("decode")
        # Nothing is sent again: what had arrived is enough.
        while stream.next().applied_seq < 2 * len(EDITS):
            pass
        assert Outcome.of(stream.seen) == undisturbed["gated"]
        stream.finish()
        assert stream.rest() == []


def test_a_session_that_is_taken_again_and_again(site: Site) -> None:
    takeovers, each = 60, 4
    edits: list[dict[str, Any]] = [
        {"undo": Undo()} if i % 3 == 2 else {"add_points": points((i % 96, i % 64), label=i % 2)}
        for i in range(takeovers * each)
    ]
    with ExitStack() as streams:
        channels = [streams.enter_context(connect(site.server)) for _ in range(3)]
        calm = streams.enter_context(RefineStream(channels[0], config(fresh_image(SMALL), "gated")))
        stream = streams.enter_context(RefineStream(channels[1], config(fresh_image(SMALL), "gated")))
        for one in (calm, stream):
            one.opened()
        for edit in edits:
            calm.edit(**edit)
        calm.finish()
        expected = Outcome.of(calm.rest())
        applied = 0
        for i in range(1, takeovers + 1):
            for number in range(applied + 1, i * each + 1):
                stream.edit(seq=number, **edits[number - 1])
            if i % 4 == 0:
                stream.next()
            # The next stream comes while this one computes, writes, or has ended its work.
            taken, stream = stream, streams.enter_context(RefineStream(channels[1 + i % 2], stream.resuming()))
            applied = stream.opened().applied_seq
            assert (failure := taken.failure()).reason == "SESSION_TAKEN", failure
        for number in range(applied + 1, len(edits) + 1):
            stream.edit(seq=number, **edits[number - 1])
        stream.finish()
        stream.rest()
        found = Outcome.of(stream.seen)
        assert (found.revision, found.objects) == (len(edits), expected.objects)


def test_a_stream_that_is_lost_before_its_finish_is_answered(
    site: Site, undisturbed: dict[str, Outcome], proxy: TcpProxy, through_proxy: grpc.Channel
) -> None:
    reached = decoding(site, through_proxy, 60.0)
    # With an unknown field, which servers ignore, so that it can be seen on its way.
    unknown = bytes([0xFA, 0x3F, *(0x80, 0x80, 0x04)]) + bytes(2**16)
    sent = proxy.bytes_to_server
    reached.stream.send(RefineRequest(finish=Finish()).SerializeToString() + unknown)
    site.server.wait_for(lambda _: proxy.bytes_to_server >= sent + 2**16)
    proxy.reset()
    assert reached.stream.call.code() is Code.UNAVAILABLE
    site.gate.release("decode")
    site.settle(sessions=1)
    check_resumed(site, reached, undisturbed)


# SIGTERM


@pytest.mark.parametrize("stage", STAGES)
def test_sigterm(start: Callable[..., Site], undisturbed: dict[str, Outcome], stage: str) -> None:
    site = start("--drain-seconds", "600")  # longer than any test: what ends before it ends by itself
    site.note()
    with connect(site.server, *NARROW) as channel:
        reached = STAGES[stage](site, channel, 60.0)
        stream = reached.stream
        site.server.terminate()
        if not reached.answered:
            failure = stream.failure()
            assert (failure.code, failure.reason) == (Code.UNAVAILABLE, "DRAINING")
            assert failure.retry_delay is not None
        else:
            if reached.held:
                response = stream.next()
                assert response.HasField("draining")
                assert response.draining.close_time.seconds > 0
                site.gate.release(reached.held)
            stream.finish()
            stream.rest()
            assert sum(response.HasField("draining") for response in stream.seen) == 1
            told = [response for response in stream.seen if not response.HasField("draining")]
            assert [one.applied_seq for one in results(told)] == [2 * i + 2 for i in range(len(EDITS))]
            assert Outcome.of(told) == undisturbed[reached.model]
        assert site.server.wait() == 0
    site.check_log()


def test_sigterm_does_not_wait_for_who_never_reads(start: Callable[..., Site]) -> None:
    site = start("--drain-seconds", "0.5")
    site.note()
    with connect(site.server, *NARROW) as channel:
        reached = writing(site, channel, 60.0)
        site.server.terminate()
        assert site.server.wait() == 0
        assert reached.stream.failure().code is Code.UNAVAILABLE
    site.check_log()


# SIGKILL of the worker


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_worker(site: Site, undisturbed: dict[str, Outcome], through_proxy: grpc.Channel, stage: str) -> None:
    reached = STAGES[stage](site, through_proxy, 60.0)
    stream = reached.stream
    site.kill_worker()
    if stage == "before config":
        stream.send(RefineRequest(config=config(fresh_image(SMALL), "gated")))
    elif stage == "uploading":
        half = len(reached.image) // 2
        stream.send(RefineRequest(image=ImageChunk(offset=half, data=reached.image[half:])))
    if not reached.answered:
        stream.opened()
        send_edits(stream)
    if reached.held:
        site.gate.wait_until_held(reached.held)  # by the next worker, which begins again
        site.gate.release(reached.held)
    stream.finish()
    stream.rest()
    assert [one.applied_seq for one in results(stream.seen)] == [2 * i + 2 for i in range(len(EDITS))]
    assert Outcome.of(stream.seen) == undisturbed[reached.model]
    restarts = site.before["engine"]["worker_restarts"] + 1
    site.server.wait_for(lambda stats: stats["engine"]["worker_restarts"] == restarts)


def test_a_worker_that_is_killed_again_and_again(start: Callable[..., Site], undisturbed: dict[str, Outcome]) -> None:
    site = start()
    with connect(site.server) as channel:
        reached = decoding(site, channel, 60.0)
        for _ in range(3):  # more often than the engine tries by itself
            site.kill_worker()
            site.gate.wait_until_held("decode")
        site.gate.release("decode")
        reached.stream.finish()
        reached.stream.rest()
        assert Outcome.of(reached.stream.seen) == undisturbed["gated"]


def test_an_edit_that_ends_the_worker_is_rejected(start: Callable[..., Site]) -> None:
    site = start()
    with connect(site.server) as channel, RefineStream(channel, config(fresh_image(SMALL), "deadly")) as stream:
        stream.opened()
        stream.edit(add_points=points((20, 12)))
        first = stream.result()
        stream.edit(add_points=points((40, 30), label=0))
        rejection = stream.rejected()
        assert (rejection.reason, len(rejection.violations)) == ("WORKER_UNAVAILABLE", 0)
        # It changed nothing, and the session goes on.
        stream.edit(add_points=points((40, 30)))
        (one,) = stream.result().rounds
        assert (one.revision, one.mask_revision, one.mask_index) == (2, 1, first.selected_mask)
        assert [(point.x, point.y) for point in one.prompt.points] == [(20, 12), (40, 30)]


def test_a_full_queue_rejects_edits(start: Callable[..., Site]) -> None:
    site = start("--max-pending-decodes", "1")
    with connect(site.server) as channel:
        busy = decoding(site, channel, 60.0)
        with RefineStream(channel, config(fresh_image(SMALL), "gated")) as other:
            other.opened()
            other.edit(add_points=points((20, 12)))
            other.edit("b", reset=Reset())
            rejection = other.rejected()
            assert (rejection.reason, len(rejection.violations)) == ("OVERLOADED", 0)
            assert other.result().shown_revision == 0
            site.gate.release("decode")
            busy.stream.finish()
            busy.stream.rest()
            other.edit(add_points=points((20, 12)))
            assert other.result().shown_revision == 2


def test_a_stream_that_is_lost_together_with_the_worker(
    start: Callable[..., Site], undisturbed: dict[str, Outcome]
) -> None:
    site = start()
    site.note()
    with TcpProxy(site.server.target) as proxy, grpc.insecure_channel(proxy.target) as channel:
        reached = decoding(site, channel, 60.0)
        proxy.reset()
        assert reached.stream.call.code() is Code.UNAVAILABLE
        site.kill_worker()
        site.gate.open()
    site.settle(sessions=1)
    check_resumed(site, reached, undisturbed)
    site.check_log()
