"""Fairness between principals: what one does much of costs another little."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from segrpc.service.identity.keys import toml_of
from segrpc.v1.segmentation_service_pb2 import SegmentRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import Image, Point, Prompt
from tests.blackbox.failure import failure_of
from tests.blackbox.gate import Gate
from tests.blackbox.refine_stream import RefineStream, points
from tests.blackbox.test_faults import fresh_image
from tests.blackbox.test_limits import ALICE, BOB, KEYS, SIZE, click, opening
from tests.server_process import ServerProcess, connect

EMBEDDING_BYTES = 128 * 128 * 8  # of the model
EMBEDDINGS, SERIES = 6, 4

CONFIG = f"""
keys_file = "KEYS"
max_sessions = {SERIES}
embedding_cache_bytes = {EMBEDDINGS * EMBEDDING_BYTES}

[[models]]
name = "gated"
model_params = {{ gates = "GATES" }}
"""


@dataclass(frozen=True)
class Site:
    """A server that knows alice and bob.

    Attributes:
        server: The server.
        gate: The hand on the model.
        stub: The service.
        channel: The connection of both.
    """

    server: ServerProcess
    gate: Gate
    stub: Any
    channel: grpc.Channel

    def wait_for_decoding(self, count: int) -> None:
        """Wait until so many works run or wait where prompts are decoded."""
        self.server.wait_for(lambda stats: bool(stats["engine"]["decoding"] == count))

    def is_cached(self, image: Image, metadata: Any) -> bool:
        """Click, and return whether the image had not to be encoded for that."""
        return bool(self.stub.Segment(click(image), metadata=metadata).timing.embedding_cached)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, third_party: dict[str, str]) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("fairness")
    (folder / "keys.toml").write_text("".join(toml_of(name, key) for name, key in KEYS.items()))
    files = {"KEYS": folder / "keys.toml", "GATES": folder / "gates"}
    config = folder / "config.toml"
    text = CONFIG
    for name, file in files.items():
        text = text.replace(name, str(file))
    config.write_text(text)
    gate = Gate(Path(files["GATES"]))
    with (
        ServerProcess("--config", str(config), log=folder / "log", environment=third_party) as server,
        connect(server) as channel,
    ):
        yield Site(server, gate, SegmentationServiceStub(channel), channel)


def test_a_click_does_not_wait_for_all_sessions_of_another(site: Site) -> None:
    stub, count = site.stub, 8
    bobs_image = Image(data=fresh_image(SIZE))
    stub.Segment(click(bobs_image), metadata=BOB)
    config = opening()  # one image, for which there is room: none is encoded again, which would change the order
    with ExitStack() as stack:
        streams = [stack.enter_context(RefineStream(site.channel, config, metadata=ALICE)) for _ in range(count)]
        for stream in streams:
            stream.opened()
            stream.edit(add_points=points((20, 12)))
            stream.result()
        site.wait_for_decoding(0)
        before = site.gate.decodes
        site.gate.hold("decode")
        for stream in streams:
            stream.edit(add_points=points((30, 20)))
        site.gate.wait_until_held("decode")
        site.wait_for_decoding(count)
        bobs = stub.Segment.future(click(bobs_image), metadata=BOB)
        site.wait_for_decoding(count + 1)
        behind = stub.Segment.future(click(bobs_image), metadata=BOB)
        site.wait_for_decoding(count + 2)
        behind.cancel()
        site.wait_for_decoding(count + 1)  # it was dropped from the lane, so what was sent before is there
        for _ in range(2):
            site.gate.step("decode")
            site.gate.wait_until_held("decode")
        assert len(bobs.result(timeout=60).predictions) == 1
        assert site.gate.decodes == before + 2  # the one that was being decoded, and bob's
        assert not any(stream.call.done() for stream in streams)
        site.gate.release("decode")
        for stream in streams:
            stream.result()
            stream.finish()
            stream.rest()


def kept(session_id: str) -> SegmentRequest:
    """A click on the current image of a series."""
    prompts = [Prompt(points=[Point(x=20, y=12)])]
    return SegmentRequest(session_id=session_id, reset_predictor=False, prompts=prompts)


def test_who_opens_many_series_ends_none_of_anothers(site: Site) -> None:
    image = Image(data=fresh_image(SIZE))

    def begin(session_id: str, metadata: Any) -> None:
        request = click(image)
        request.session_id = session_id
        site.stub.Segment(request, metadata=metadata)

    begin("bob's", BOB)
    names = [f"series {i}" for i in range(3 * SERIES)]
    for name in names:
        begin(name, ALICE)
    assert len(site.stub.Segment(kept("bob's"), metadata=BOB).predictions) == 1
    assert len(site.stub.Segment(kept(names[-1]), metadata=ALICE).predictions) == 1
    failure = failure_of(lambda: site.stub.Segment(kept(names[0]), metadata=ALICE))
    assert failure.reason == "NO_PREDICTOR_STATE"


def test_who_works_on_many_images_has_nobody_elses_encoded_again(site: Site) -> None:
    bobs = Image(data=fresh_image(SIZE))
    alices = [Image(data=fresh_image(SIZE)) for _ in range(3 * EMBEDDINGS)]
    assert not site.is_cached(bobs, BOB)
    for image in alices:
        assert not site.is_cached(image, ALICE)
    assert site.is_cached(bobs, BOB)
    assert site.is_cached(alices[-1], ALICE)
    assert not site.is_cached(alices[0], ALICE)
