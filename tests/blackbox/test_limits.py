"""Limits and overload: who reaches its limit is told which, and others do not notice."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest

from segrpc.service.identity.keys import new_key, toml_of
from segrpc.v1.model_service_pb2 import ListModelsRequest
from segrpc.v1.model_service_pb2_grpc import ModelServiceStub
from segrpc.v1.refine_pb2 import RefineConfig, UploadHeader
from segrpc.v1.segmentation_service_pb2 import SegmentRequest, UploadImageRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import Image, Point, Prompt
from tests.blackbox.failure import Failure, failure_of
from tests.blackbox.gate import Gate
from tests.blackbox.refine_stream import RefineStream, points
from tests.blackbox.test_faults import fresh_image
from tests.blackbox.test_lifecycle import failed_start
from tests.server_process import ServerProcess, connect

Metadata: TypeAlias = tuple[tuple[str, str], ...]

MiB = 2**20
STORE_BYTES = 40_000
SIZE = (96, 64)
KEYS = {name: new_key() for name in ("alice", "bob")}
ALICE, BOB = ((("authorization", f"Bearer {key}"),) for key in KEYS.values())

CONFIG = """
keys_file = "KEYS"
limits_file = "LIMITS"
max_image_bytes = "1MiB"
max_message_bytes = "1MiB"
in_flight_bytes = "4MiB"
image_store_bytes = "STORE_BYTES"
max_streams = 4
max_requests = 4
max_open_sessions = 100
max_pending_encodes = 4
max_pending_decodes = 4
session_detached_seconds = 0.5

[[models]]
name = "gated"
model_params = { gates = "GATES" }
"""


@dataclass(frozen=True)
class Site:
    """A server that knows alice and bob, with the model that can be held.

    Attributes:
        server: The server.
        gate: The hand on the model.
        folder: Where its files are.
    """

    server: ServerProcess
    gate: Gate
    folder: Path

    @property
    def limits_file(self) -> Path:
        return self.folder / "limits.toml"

    def wait_for_taken(self, name: str, amount: int) -> None:
        """Wait until all have so much of something together."""
        self.server.wait_for(lambda stats: bool(stats["taken"][name] == amount))

    def write_limits(self, text: str) -> None:
        """Replace the file of limits, at once."""
        new = self.folder / "limits.new"
        new.write_text(text)
        new.replace(self.limits_file)


Start: TypeAlias = Callable[[], Site]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, third_party: dict[str, str]) -> Iterator[Start]:
    """Starts servers."""
    with ExitStack() as started:

        def run() -> Site:
            folder = tmp_path_factory.mktemp("limits")
            config = CONFIG.replace("STORE_BYTES", str(STORE_BYTES))
            for name, file in (("KEYS", "keys.toml"), ("LIMITS", "limits.toml"), ("GATES", "gates")):
                config = config.replace(name, str(folder / file))
            (folder / "config.toml").write_text(config)
            (folder / "keys.toml").write_text("".join(toml_of(name, key) for name, key in KEYS.items()))
            (folder / "limits.toml").write_text("")
            gate, options = Gate(folder / "gates"), ("--config", str(folder / "config.toml"))
            server = ServerProcess(*options, log=folder / "log", environment=third_party)
            return Site(started.enter_context(server), gate, folder)

        yield run


@pytest.fixture(scope="module")
def shared(start: Start) -> Site:
    return start()


@pytest.fixture
def site(shared: Site) -> Iterator[Site]:
    """The server, of which nothing may be taken any more after the test."""
    yield shared
    shared.gate.open()
    shared.write_limits("")

    def settled(stats: dict[str, Any]) -> bool:
        left = {name: amount for name, amount in stats["taken"].items() if amount and name != "image_store_bytes"}
        return not left and stats["engine"]["pending"] == 0 and bool(stats["limits"]["max_streams"] == 4)

    shared.server.wait_for(settled)


@pytest.fixture
def channel(site: Site) -> Iterator[grpc.Channel]:
    with connect(site.server) as opened:
        yield opened


def opening() -> RefineConfig:
    return RefineConfig(image=Image(data=fresh_image(SIZE)))


def click(image: Image | None = None, clicks: int = 1) -> SegmentRequest:
    prompts = [Prompt(points=[Point(x=20, y=12)])] * clicks
    return SegmentRequest(image=image or Image(data=fresh_image(SIZE)), prompts=prompts)


def check_overloaded(failure: Failure, whose: str, limit: str) -> None:
    assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert failure.message.startswith(whose), failure.message
    assert f"({limit})" in failure.message
    assert failure.retry_delay is not None
    assert failure.retry_delay > 0


# One principal's limits are not another's


def test_streams(site: Site, channel: grpc.Channel) -> None:
    with ExitStack() as stack:
        own = connect(site.server)
        alices = [stack.enter_context(RefineStream(one, opening(), metadata=ALICE)) for one in (channel, own)]
        for stream in alices:
            stream.opened()
        with RefineStream(channel, opening(), metadata=ALICE) as third:
            check_overloaded(third.failure(), "'key:alice' may have 2 streams at once", "max_streams")
        bobs = [stack.enter_context(RefineStream(channel, opening(), metadata=BOB)) for _ in range(2)]
        for stream in bobs:
            stream.opened()
            stream.edit(add_points=points((20, 12)))
            stream.result()
        alices[0].call.cancel()
        site.wait_for_taken("max_streams", 3)
        own.close()  # a client that is gone frees as much as one that says so
        site.wait_for_taken("max_streams", 2)
        for _ in range(2):
            stack.enter_context(RefineStream(channel, opening(), metadata=ALICE)).opened()


def test_sessions(site: Site, channel: grpc.Channel) -> None:
    site.write_limits("max_open_sessions = 2\n")
    site.server.wait_for(lambda stats: bool(stats["limits"]["max_open_sessions"] == 2))
    with RefineStream(channel, opening(), metadata=ALICE) as first:
        first.opened()
        with RefineStream(channel, opening(), metadata=ALICE) as second:
            check_overloaded(second.failure(), "'key:alice' may have 1 open sessions", "max_open_sessions")
        with RefineStream(channel, opening(), metadata=BOB) as other:
            other.opened()
        first.finish()
        first.rest()
        with RefineStream(channel, opening(), metadata=ALICE) as second:
            second.opened()


def test_requests(site: Site, channel: grpc.Channel) -> None:
    segmentation: Any = SegmentationServiceStub(channel)
    models: Any = ModelServiceStub(channel)
    site.gate.hold("decode")
    calls = [segmentation.Segment.future(click(), metadata=ALICE) for _ in range(2)]
    site.gate.wait_until_held("decode")
    site.wait_for_taken("max_requests", 2)
    for refused in (
        lambda: segmentation.Segment(click(), metadata=ALICE),
        lambda: models.ListModels(ListModelsRequest(), metadata=ALICE),
        lambda: segmentation.UploadImage(iter(()), metadata=ALICE),
    ):
        check_overloaded(failure_of(refused), "'key:alice' may have 2 requests at once", "max_requests")
    assert len(models.ListModels(ListModelsRequest(), metadata=BOB).models) == 1
    bobs = segmentation.Segment.future(click(), metadata=BOB)
    site.wait_for_taken("max_requests", 3)
    site.gate.release("decode")
    for call in (*calls, bobs):
        assert len(call.result().predictions) == 1
    site.wait_for_taken("max_requests", 0)
    assert len(segmentation.Segment(click(), metadata=ALICE).predictions) == 1


def upload(stub: Any, image: bytes, metadata: Metadata) -> str:
    header = UploadImageRequest(header=UploadHeader(size=len(image)))
    chunk = UploadImageRequest()
    chunk.chunk.data = image
    digest: str = stub.UploadImage(iter([header, chunk]), metadata=metadata).image.digest
    return digest


def test_images(site: Site, channel: grpc.Channel) -> None:
    stub: Any = SegmentationServiceStub(channel)
    bobs = upload(stub, fresh_image(SIZE), BOB)
    alices, sent = [], 0
    while sent <= STORE_BYTES // 2:
        image = fresh_image(SIZE)
        alices.append(upload(stub, image, ALICE))
        sent += len(image)
    assert site.server.stats()["taken"]["image_store_bytes"] < STORE_BYTES
    # Her oldest went, although there is room for it, and his is there.
    assert failure_of(lambda: stub.Segment(click(Image(digest=alices[0])), metadata=ALICE)).reason == "IMAGE_NOT_FOUND"
    for digest, metadata in ((alices[-1], ALICE), (bobs, BOB)):
        assert len(stub.Segment(click(Image(digest=digest)), metadata=metadata).predictions) == 1


def announce(channel: grpc.Channel, metadata: Metadata, size: int = MiB) -> Any:
    """Begin an upload that goes no further than its header."""
    stub: Any = SegmentationServiceStub(channel)
    over = threading.Event()

    def requests() -> Iterator[UploadImageRequest]:
        yield UploadImageRequest(header=UploadHeader(size=size))
        over.wait()

    call = stub.UploadImage.future(requests(), metadata=metadata)
    call.add_done_callback(lambda _: over.set())
    return call


def test_announced_uploads(site: Site, channel: grpc.Channel) -> None:
    alices = [announce(channel, ALICE) for _ in range(2)]
    site.wait_for_taken("in_flight_bytes", 2 * MiB)
    stub: Any = SegmentationServiceStub(channel)
    config = RefineConfig(upload=UploadHeader(size=MiB))
    with RefineStream(channel, config, metadata=ALICE) as stream:
        check_overloaded(stream.failure(), "'key:alice' may have 2097152 bytes in flight", "in_flight_bytes")
    assert upload(stub, fresh_image(SIZE), BOB).startswith("sha256:")
    for call in alices:
        call.cancel()
    site.wait_for_taken("in_flight_bytes", 0)
    assert upload(stub, fresh_image(SIZE), ALICE).startswith("sha256:")


def test_jobs_that_wait(site: Site, channel: grpc.Channel) -> None:
    stub: Any = SegmentationServiceStub(channel)
    site.write_limits('max_requests = 16\n[principals."key:alice"]\nmax_requests = 8\n')
    site.server.wait_for(lambda stats: bool(stats["limits"]["max_requests"] == 16))
    known = Image(digest=upload(stub, fresh_image(SIZE), BOB))
    stub.Segment(click(known), metadata=BOB)
    site.gate.hold("embed")
    alices = [stub.Segment.future(click(), metadata=ALICE) for _ in range(2)]
    site.gate.wait_until_held("embed")
    site.server.wait_for(lambda stats: bool(stats["engine"]["encoding"] == 2))
    failure = failure_of(lambda: stub.Segment(click(), metadata=ALICE))
    check_overloaded(failure, "'key:alice' may have 2 jobs", "max_pending_encodes")
    assert len(stub.Segment(click(known), metadata=BOB).predictions) == 1  # a click waits for no image
    bobs = stub.Segment.future(click(), metadata=BOB)
    site.server.wait_for(lambda stats: bool(stats["engine"]["encoding"] == 3))
    site.gate.release("embed")
    for call in (*alices, bobs):
        assert len(call.result().predictions) == 1


# Changing limits


def test_limits_change_while_the_server_runs(site: Site, channel: grpc.Channel) -> None:
    def limit() -> int:
        found: int = site.server.stats()["limits"]["max_streams"]
        return found

    site.write_limits("max_streams = 2\nprincipal_share = 0.5\n")
    site.server.wait_for(lambda stats: bool(stats["limits"]["max_streams"] == 2))
    with RefineStream(channel, opening(), metadata=ALICE) as first:
        first.opened()
        with RefineStream(channel, opening(), metadata=ALICE) as second:
            check_overloaded(second.failure(), "'key:alice' may have 1 streams", "max_streams")
        logged = len(site.server.log_text())
        site.write_limits("max_streams = 3\nmax_stream = 1\n")
        site.server.wait_for(lambda stats: "what was read before stays" in site.server.log_text()[logged:])
        told = site.server.log_text()[logged:]
        assert str(site.limits_file) in told
        assert "max_stream" in told
        assert limit() == 2
        site.write_limits("max_streams = 6\n")
        site.server.wait_for(lambda stats: bool(stats["limits"]["max_streams"] == 6))
        with RefineStream(channel, opening(), metadata=ALICE) as second:
            second.opened()


# Deadlines


def test_a_deadline_that_cannot_be_met_is_told_at_once(start: Start) -> None:
    site = start()  # which has learned nothing yet
    with connect(site.server) as channel:
        stub: Any = SegmentationServiceStub(channel)
        known = Image(digest=upload(stub, fresh_image(SIZE), BOB))
        site.gate.hold("decode")
        slow = stub.Segment.future(click(known), metadata=BOB)
        site.gate.wait_until_held("decode")
        time.sleep(0.5)  # what decoding a prompt takes, at least
        site.gate.step("decode")
        slow.result()
        running = stub.Segment.future(click(known), metadata=BOB)
        site.gate.wait_until_held("decode")
        decodes = site.gate.decodes
        # Thirty prompts take 15 s.
        failure = failure_of(lambda: stub.Segment(click(known, clicks=30), metadata=BOB, timeout=14))
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert "the jobs before this one will take" in failure.message
        assert failure.retry_delay is not None
        assert failure.retry_delay >= 1
        assert site.gate.decodes == decodes
        site.gate.release("decode")
        running.result()
        # Alone it is given the chance to be quicker.
        assert len(stub.Segment(click(known, clicks=30), metadata=BOB, timeout=14).predictions) == 30


# Freed by those who leave


@pytest.mark.parametrize("way", ["cancelled", "disconnected", "expired"])
def test_work_of_those_who_left_is_not_done(site: Site, channel: grpc.Channel, way: str) -> None:
    stub: Any = SegmentationServiceStub(channel)
    before = site.server.stats()["engine"]["encodes"]
    site.gate.hold("embed")
    first = stub.Segment.future(click(), metadata=ALICE)
    site.gate.wait_until_held("embed")
    with connect(site.server) as other:
        leaving: Any = SegmentationServiceStub(other)
        call = leaving.Segment.future(click(), metadata=BOB, timeout=5 if way == "expired" else 60)
        site.server.wait_for(lambda stats: bool(stats["engine"]["encoding"] == 2))
        if way == "cancelled":
            call.cancel()
        elif way == "disconnected":
            other.close()
        site.server.wait_for(lambda stats: bool(stats["engine"]["encoding"] == 1))
        site.wait_for_taken("max_requests", 1)
    site.gate.release("embed")
    assert len(first.result().predictions) == 1
    assert site.server.stats()["engine"]["encodes"] == before + 1


# Memory


def test_above_the_budget_of_memory_only_what_is_small_is_served(tmp_path: Path, third_party: dict[str, str]) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        'engine = "inline"\nmemory_bytes = "200MiB"\nimage_store_bytes = "16MiB"\nsession_bytes = "16MiB"\n'
        'max_image_bytes = "1MiB"\nmax_message_bytes = "1MiB"\nin_flight_bytes = "16MiB"\n'
        'embedding_cache_bytes = "8MiB"\nhost_embedding_cache_bytes = "8MiB"\n'
        f'[[models]]\nname = "brightness"\nmodel_params = {{ ballast = {300 * MiB} }}\n'
    )
    with (
        ServerProcess("--config", str(config), log=tmp_path / "log", environment=third_party) as server,
        connect(server) as channel,
    ):
        stub: Any = SegmentationServiceStub(channel)
        announced = announce(channel, ())
        failure = failure_of(announced.result)
        check_overloaded(failure, "the server's memory is used up", "memory_bytes")
        with RefineStream(channel, opening()) as stream:
            check_overloaded(stream.failure(), "the server's memory is used up", "memory_bytes")
        assert len(stub.Segment(click()).predictions) == 1
        # What was kept of it is let go within a second.
        server.wait_for(lambda stats: bool(stats["images"] == 0))


def test_budgets_that_do_not_fit_into_the_memory() -> None:
    told = failed_start({}, "--memory-bytes", "1GiB")
    assert "memory_bytes is 1073741824, but the budgets are" in told


def test_streams_of_one_connection(tmp_path: Path) -> None:
    with (
        ServerProcess("--max-streams-per-connection", "2", log=tmp_path / "log") as server,
        connect(server) as channel,
        connect(server) as other,
        ExitStack() as stack,
    ):
        streams = [stack.enter_context(RefineStream(channel, opening())) for _ in range(2)]
        for stream in streams:
            stream.opened()
        models: Any = ModelServiceStub(channel)
        waiting = models.ListModels.future(ListModelsRequest())
        assert len(ModelServiceStub(other).ListModels(ListModelsRequest()).models) == 1
        assert not waiting.done()
        streams[0].finish()
        streams[0].rest()
        assert len(waiting.result(timeout=60).models) == 1
