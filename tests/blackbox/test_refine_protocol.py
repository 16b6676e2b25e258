"""Refine as the contract has it: its errors, its rejections, and what edits mean. Every stream is a real one."""

import hashlib
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image as PILImage

from segrpc.v1.model_service_pb2 import ListModelsRequest
from segrpc.v1.model_service_pb2_grpc import ModelServiceStub
from segrpc.v1.refine_pb2 import (
    EDIT_POLICY_EVERY_EDIT,
    MASK_FEEDBACK_NONE,
    AddPoints,
    ClearBox,
    Edit,
    ImageChunk,
    MaskResult,
    MovePoint,
    Redo,
    RefineConfig,
    RefineRequest,
    RefineResponse,
    RemovePoint,
    Reset,
    Resume,
    Round,
    SelectMask,
    Undo,
    UploadHeader,
)
from segrpc.v1.segmentation_service_pb2 import SegmentRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import (
    DATA_TYPE_BFLOAT16,
    DATA_TYPE_FLOAT16,
    DATA_TYPE_FLOAT32,
    DATA_TYPE_UINT8,
    MASK_ENCODING_COCO_RLE,
    MASK_ENCODING_PNG,
    MASK_ENCODING_RUN_LENGTHS,
    Box,
    Image,
    OutputOptions,
    Point,
    Prompt,
    Tensor,
)
from tests.blackbox.failure import Failure, failure_of
from tests.blackbox.gate import Gate
from tests.blackbox.refine_stream import RefineStream, points, replay, results
from tests.server_process import ServerProcess, connect

Code = grpc.StatusCode
NAN = math.nan
WIDTH, HEIGHT = 64, 48
SIDE = 128  # of the logits of the model `gated`

CONFIG = """
[[models]]
name = "gated"
model_params = { gates = "GATES" }

[[models]]
name = "bright"
model = "brightness"

[[models]]
name = "broken"

[[models]]
name = "hungry"
"""


def picture() -> bytes:
    """A small image that is not the same everywhere."""
    file = io.BytesIO()
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    PILImage.fromarray(((x * 3 + y * y // 9) % 256).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


PICTURE = picture()
DIGEST = f"sha256:{hashlib.sha256(PICTURE).hexdigest()}"
OTHER_DIGEST = f"sha256:{hashlib.sha256(b'other').hexdigest()}"


def opening(**fields: Any) -> RefineConfig:
    """A config with the picture."""
    if not {"image", "upload", "resume"} & fields.keys():
        fields["image"] = Image(data=PICTURE)
    return RefineConfig(**fields)


def every_edit(**fields: Any) -> RefineConfig:
    return opening(edit_policy=EDIT_POLICY_EVERY_EDIT, **fields)


def tensor(*shape: int, value: float = 0.0) -> Tensor:
    return Tensor(dtype=DATA_TYPE_FLOAT32, shape=shape, data=np.full(shape, value, "<f4").tobytes())


def box(*corners: float) -> Box:
    return Box(x_min=corners[0], y_min=corners[1], x_max=corners[2], y_max=corners[3])


@dataclass(frozen=True)
class Models:
    """The server with the models of the third party, and the hand on the model ``gated``."""

    server: ServerProcess
    gate: Gate


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, third_party: dict[str, str]) -> Iterator[Models]:
    folder = tmp_path_factory.mktemp("models")
    gate, config = Gate(folder / "gates"), folder / "config.toml"
    config.write_text(CONFIG.replace("GATES", str(folder / "gates")))
    with ServerProcess("--config", str(config), log=folder / "log", environment=third_party) as process:
        yield Models(process, gate)


@pytest.fixture
def gate(models: Models) -> Iterator[Gate]:
    yield models.gate
    models.gate.open()


@pytest.fixture
def gated(models: Models) -> Iterator[grpc.Channel]:
    """A connection to the server with the models of the third party; all is as before after the test."""
    before = models.server.stats()
    with connect(models.server) as opened:
        yield opened
    kept = ("calls", "attached_sessions")
    models.server.wait_for(
        lambda stats: all(stats[key] == before[key] for key in kept) and stats["engine"]["pending"] == 0
    )


Starter = Callable[..., ServerProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    """Starts servers of the test's own."""
    started: list[ServerProcess] = []

    def run(*arguments: str) -> ServerProcess:
        started.append(ServerProcess(*arguments, log=tmp_path / f"log-{len(started)}"))
        return started[-1]

    yield run
    for process in started:
        process.__exit__(None, None, None)


def assert_failure(failure: Failure, code: Code, reason: str, *fields: str) -> None:
    assert (failure.code, failure.reason, failure.fields) == (code, reason, fields), failure
    assert failure.domain == "segrpc.v1"
    assert failure.message
    assert "Traceback" not in failure.message


def edit_message(seq: int = 1, **action: Any) -> RefineRequest:
    return RefineRequest(seq=seq, edit=Edit(object_id="1", **action))


CLICK = edit_message(add_points=points((10, 10)))
CHUNK = RefineRequest(image=ImageChunk(data=PICTURE))


def config_message(**fields: Any) -> RefineRequest:
    return RefineRequest(config=opening(**fields))


def output(**fields: Any) -> RefineRequest:
    return config_message(output=OutputOptions(**fields))


def uploading(**fields: Any) -> RefineRequest:
    header = {"size": len(PICTURE), **fields}
    return config_message(upload=UploadHeader(**header))


def chunk(offset: int, data: bytes) -> RefineRequest:
    return RefineRequest(image=ImageChunk(offset=offset, data=data))


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    PILImage.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


Messages = list[RefineRequest | bytes]

# What is sent, how the stream ends. All of it is sent before anything is read.
WRONG: dict[str, tuple[Messages, Code, str, tuple[str, ...]]] = {
    "bytes that are no message": ([b"\xff\xff\xff"], Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE", ()),
    "such bytes after the config": ([config_message(), b"\xff"], Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE", ()),
    "such bytes in an upload": ([uploading(), b"\xff"], Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE", ()),
    "an edit first": ([CLICK], Code.INVALID_ARGUMENT, "CONFIG_NOT_FIRST", ()),
    "a chunk first": ([CHUNK], Code.INVALID_ARGUMENT, "CONFIG_NOT_FIRST", ()),
    "nothing set first": ([RefineRequest()], Code.INVALID_ARGUMENT, "CONFIG_NOT_FIRST", ()),
    "the config twice": ([config_message(), config_message()], Code.INVALID_ARGUMENT, "CONFIG_NOT_FIRST", ()),
    "the config in an upload": ([uploading(), config_message()], Code.INVALID_ARGUMENT, "CONFIG_NOT_FIRST", ()),
    "no source": ([RefineRequest(config=RefineConfig())], Code.INVALID_ARGUMENT, "INVALID_FIELD", ("config",)),
    "an empty image": ([config_message(image=Image())], Code.INVALID_ARGUMENT, "INVALID_FIELD", ("config.image",)),
    "an image of no bytes": (
        [config_message(image=Image(data=b""))],
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ("config.image.data",),
    ),
    "what is no image": (
        [config_message(image=Image(data=b"no image"))],
        Code.INVALID_ARGUMENT,
        "IMAGE_UNDECODABLE",
        ("config.image.data",),
    ),
    "too many pixels": (
        [config_message(image=Image(data=png(10_000, 6_401)))],
        Code.INVALID_ARGUMENT,
        "IMAGE_TOO_LARGE",
        ("config.image.data",),
    ),
    "a malformed digest": (
        [config_message(image=Image(digest="md5:0"))],
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ("config.image.digest",),
    ),
    "an unknown digest": ([config_message(image=Image(digest=OTHER_DIGEST))], Code.NOT_FOUND, "IMAGE_NOT_FOUND", ()),
    "a URI that is not allowed": (
        [config_message(image=Image(uri="file:///etc/passwd"))],
        Code.PERMISSION_DENIED,
        "URI_NOT_ALLOWED",
        (),
    ),
    "an unknown model": ([config_message(model="sam9")], Code.NOT_FOUND, "MODEL_NOT_FOUND", ()),
    "a long model name": (
        [config_message(model="x" * 129)],
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ("config.model",),
    ),
    "a long request id": (
        [config_message(request_id="x" * 129)],
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ("config.request_id",),
    ),
    "an unknown policy": (
        [config_message(edit_policy=9)],
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ("config.edit_policy",),
    ),
    "an unknown feedback": (
        [config_message(mask_feedback=9)],
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ("config.mask_feedback",),
    ),
    "an unknown encoding": (
        [output(mask_encoding=9)],
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ("config.output.mask_encoding",),
    ),
    "tensors of bytes": (
        [output(tensor_dtype=DATA_TYPE_UINT8)],
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ("config.output.tensor_dtype",),
    ),
    "the embedding asked for": (
        [output(return_image_embedding=True)],
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ("config.output.return_image_embedding",),
    ),
    "no candidates": (
        [output(num_multimask_outputs=0)],
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ("config.output.num_multimask_outputs",),
    ),
    "two candidates": ([output(num_multimask_outputs=2)], Code.FAILED_PRECONDITION, "CAPABILITY_MISSING", ()),
    "an upload without size": (
        [uploading(size=0)],
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ("config.upload.size",),
    ),
    "an upload that is too large": ([uploading(size=2**26 + 1)], Code.INVALID_ARGUMENT, "IMAGE_TOO_LARGE", ()),
    "an upload's malformed digest": (
        [uploading(digest="sha256:0")],
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ("config.upload.digest",),
    ),
    "an upload's other digest": (
        [uploading(digest=OTHER_DIGEST), CHUNK],
        Code.INVALID_ARGUMENT,
        "DIGEST_MISMATCH",
        (),
    ),
    "an upload of no image": ([uploading(size=3), chunk(0, b"abc")], Code.INVALID_ARGUMENT, "IMAGE_UNDECODABLE", ()),
    "a gap": ([uploading(), chunk(0, PICTURE[:9]), chunk(10, PICTURE[10:])], Code.INVALID_ARGUMENT, "CHUNK_OFFSET", ()),
    "a chunk twice": (
        [uploading(), chunk(0, PICTURE[:9]), chunk(0, PICTURE[:9])],
        Code.INVALID_ARGUMENT,
        "CHUNK_OFFSET",
        (),
    ),
    "too many bytes": ([uploading(), chunk(0, PICTURE + b"0")], Code.INVALID_ARGUMENT, "CHUNK_OFFSET", ()),
    "an empty chunk": ([uploading(), chunk(0, b"")], Code.INVALID_ARGUMENT, "INVALID_FIELD", ("image.data",)),
    "a chunk that is too large": (
        [uploading(size=2**22), chunk(0, bytes(2**20 + 1))],
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ("image.data",),
    ),
    "an edit in an upload": ([uploading(), chunk(0, PICTURE[:9]), CLICK], Code.INVALID_ARGUMENT, "CHUNK_OFFSET", ()),
    "a chunk without an upload": ([config_message(), CHUNK], Code.INVALID_ARGUMENT, "CHUNK_OFFSET", ()),
    "an edit without a number": (
        [config_message(), edit_message(seq=0, add_points=points((1, 1)))],
        Code.INVALID_ARGUMENT,
        "INVALID_FIELD",
        ("seq",),
    ),
    "nothing set": ([config_message(), RefineRequest()], Code.INVALID_ARGUMENT, "INVALID_FIELD", ("payload",)),
    "an unknown session": (
        [config_message(resume=Resume(session_id="nobody", resume_token="x"))],
        Code.NOT_FOUND,
        "SESSION_NOT_FOUND",
        (),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_stream_that_breaks_the_protocol(channel: grpc.Channel, case: str) -> None:
    messages, code, reason, fields = WRONG[case]
    with RefineStream(channel, *messages) as stream:
        assert_failure(stream.failure(), code, reason, *fields)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [([], "CONFIG_NOT_FIRST"), ([uploading()], "CHUNK_OFFSET"), ([uploading(), chunk(0, PICTURE[:9])], "CHUNK_OFFSET")],
    ids=["nothing", "the header only", "a part"],
)
def test_a_stream_that_is_half_closed_too_early(channel: grpc.Channel, messages: Messages, reason: str) -> None:
    with RefineStream(channel, *messages) as stream:
        stream.half_close()
        assert_failure(stream.failure(), Code.INVALID_ARGUMENT, reason)


def test_an_error_names_the_request(channel: grpc.Channel) -> None:
    with RefineStream(channel, opening(request_id="mine"), RefineRequest()) as stream:
        assert stream.failure().request_id == "mine"


def test_a_model_without_logits(models: Models, gated: grpc.Channel) -> None:
    with RefineStream(gated, opening(model="bright", output=OutputOptions(return_logits=True))) as stream:
        assert_failure(stream.failure(), Code.FAILED_PRECONDITION, "CAPABILITY_MISSING")
    with RefineStream(gated, opening(model="bright")) as stream:
        stream.opened()
        stream.edit(set_mask=tensor(1, SIDE, SIDE))
        rejection = stream.rejected()
        assert (rejection.reason, len(rejection.violations)) == ("CAPABILITY_MISSING", 0)
        stream.edit(add_points=points((10, 10)))
        first = stream.result()
        stream.edit(add_points=points((20, 10)))
        second = stream.result()
        assert first.prediction.masks == second.prediction.masks
        assert [(r.mask_revision, r.mask_seq) for r in (*first.rounds, *second.rounds)] == [(0, 0), (0, 0)]
        assert not first.HasField("mask_logits")
        stream.finish()
        assert stream.rest() == []


# Resuming


def test_a_session_opens_only_for_its_token(channel: grpc.Channel) -> None:
    with RefineStream(channel, opening()) as stream:
        stream.opened()
        wrong = stream.resuming()
        wrong.resume.resume_token = "x" + wrong.resume.resume_token[1:]
        with RefineStream(channel, wrong) as other:
            assert_failure(other.failure(), Code.NOT_FOUND, "SESSION_NOT_FOUND")
        for token in ("", "\N{SNOWMAN}"):
            wrong.resume.resume_token = token
            with RefineStream(channel, wrong) as other:
                assert_failure(other.failure(), Code.NOT_FOUND, "SESSION_NOT_FOUND")
        # The stream still has it.
        stream.edit(add_points=points((10, 10)))
        assert stream.result().shown_revision == 1
        stream.finish()
        assert stream.rest() == []
        with RefineStream(channel, stream.resuming()) as other:
            assert_failure(other.failure(), Code.NOT_FOUND, "SESSION_NOT_FOUND")


def test_resuming_refuses_another_model_and_an_unknown_revision(gated: grpc.Channel) -> None:
    with RefineStream(gated, opening()) as stream:
        stream.opened()
        stream.edit(add_points=points((10, 10)))
        first = stream.result()
        other_model = stream.resuming()
        other_model.model = "bright"
        with RefineStream(gated, other_model) as other:
            assert_failure(other.failure(), Code.INVALID_ARGUMENT, "INVALID_FIELD", "config.model")
        with RefineStream(gated, stream.resuming(last_revision=2)) as other:
            assert_failure(other.failure(), Code.INVALID_ARGUMENT, "INVALID_FIELD", "config.resume.last_revision")
        # Whoever asked wrongly took nothing away.
        stream.edit(undo=Undo())
        stream.edit(redo=Redo())
        assert stream.result().shown_revision in (0, 1)
        same_model = stream.resuming()
        same_model.model = "gated"
        with RefineStream(gated, same_model) as other:
            assert other.opened().opened.resumed
            again = other.result()
            assert again.prediction == first.prediction
            other.finish()
            assert results(other.rest()) == []


def test_the_stream_that_had_the_session_is_told(server: ServerProcess, channel: grpc.Channel) -> None:
    with RefineStream(channel, opening()) as stream, connect(server) as second:
        stream.opened()
        stream.edit(add_points=points((10, 10)))
        first = stream.result()
        with RefineStream(second, stream.resuming()) as other:
            response = other.opened()
            assert (response.opened.session_id, response.opened.resumed) == (stream.session.session_id, True)
            assert (response.revision, response.applied_seq) == (1, 2)
            assert response.opened.image == stream.session.image
            assert_failure(stream.failure(), Code.ABORTED, "SESSION_TAKEN")
            again = other.result()
            assert (again.prediction, again.rounds) == (first.prediction, first.rounds)
            other.edit(seq=4, add_points=points((20, 10)))
            assert other.result().shown_revision == 2
            other.finish()
            assert other.rest() == []


def test_resuming_tells_what_was_missed(gated: grpc.Channel) -> None:
    with RefineStream(gated, every_edit()) as stream:
        stream.opened()
        stream.edit("a", add_points=points((10, 10)))  # revision 1
        stream.edit("b", add_points=points((20, 20)))  # 2
        stream.edit("a", add_points=points((30, 20)))  # 3
        wrong = stream.edit("a", undo=Undo(steps=9))
        stream.edit("a", undo=Undo())  # 4
        told = [stream.next() for _ in range(5)]
        with RefineStream(gated, stream.resuming(last_revision=2)) as other:
            opened = other.opened()
            assert (opened.revision, opened.applied_seq) == (4, stream.next_seq - 2)
            assert other.rejected().seq == wrong
            again = other.next()
            assert (again.revision, again.result.object_id, again.result.shown_revision) == (4, "a", 1)
            assert [one.revision for one in again.result.rounds] == [3]
            assert again.result.prediction == told[0].result.prediction
            assert not again.result.HasField("timing")
            with RefineStream(gated, stream.resuming()) as third:
                third.opened()
                third.rejected()
                everything = [third.result(), third.result()]
                assert [one.object_id for one in everything] == ["b", "a"]
                assert [[one.revision for one in result.rounds] for result in everything] == [[2], [1, 3]]
                third.finish()
                assert third.rest() == []


# Budgets, expiry, shutting down


def test_too_many_sessions(start: Starter) -> None:
    server = start("--max-open-sessions", "2")
    with connect(server) as channel, RefineStream(channel, opening()) as first:
        first.opened()
        with RefineStream(channel, opening()) as second:
            second.opened()
            with RefineStream(channel, opening()) as third:
                failure = third.failure()
                assert_failure(failure, Code.RESOURCE_EXHAUSTED, "OVERLOADED")
                assert failure.retry_delay is not None
                assert failure.retry_delay > 0
            # A detached session counts, and a resumed one is no more.
            second.half_close()
            assert second.rest() == []
            with RefineStream(channel, opening()) as third:
                assert_failure(third.failure(), Code.RESOURCE_EXHAUSTED, "OVERLOADED")
            with RefineStream(channel, second.resuming()) as again:
                again.opened()
                again.finish()
                assert again.rest() == []
        with RefineStream(channel, opening()) as third:
            third.opened()


def test_the_memory_for_sessions_is_full(start: Starter) -> None:
    server = start("--session-bytes", str(500_000))  # less than the logits of a first round
    with connect(server) as channel, RefineStream(channel, opening()) as stream:
        stream.opened()
        stream.edit(add_points=points((10, 10)))
        first = stream.result()
        stream.edit(add_points=points((20, 10)))
        rejection = stream.rejected()
        assert (rejection.reason, len(rejection.violations)) == ("OVERLOADED", 0)
        with RefineStream(channel, opening()) as other:
            failure = other.failure()
            assert_failure(failure, Code.RESOURCE_EXHAUSTED, "OVERLOADED")
            assert failure.retry_delay is not None
        stream.edit("another", reset=Reset())
        assert stream.rejected().reason == "OVERLOADED"
        # What computes nothing is still possible.
        stream.edit(undo=Undo())
        assert len(stream.result().prediction.masks) == 0
        stream.edit(redo=Redo())
        assert stream.result().prediction == first.prediction
        assert server.stats()["session_bytes"] > 500_000
        stream.finish()
        assert stream.rest() == []
        assert server.stats()["session_bytes"] == 0
        with RefineStream(channel, opening()) as other:
            other.opened()


def test_objects_without_prompts_count(gated: grpc.Channel, models: Models) -> None:
    with RefineStream(gated, every_edit()) as stream:
        stream.opened()
        before = models.server.stats()["session_bytes"]
        for i in range(10):
            stream.edit(f"{i % 5}", reset=Reset())
            assert stream.result().shown_revision == 0
        assert models.server.stats()["session_bytes"] >= before + 5 * 256
        stream.finish()
        assert stream.rest() == []


def test_a_session_that_is_not_used_expires(start: Starter) -> None:
    server = start("--session-idle-seconds", "0.5")
    with connect(server) as channel, RefineStream(channel, opening()) as stream:
        assert stream.opened().opened.HasField("expire_time")
        assert_failure(stream.failure(), Code.NOT_FOUND, "SESSION_NOT_FOUND")
        assert server.wait_for(lambda stats: stats["calls"] == 0)["sessions"] == 0
        with RefineStream(channel, stream.resuming()) as other:
            assert_failure(other.failure(), Code.NOT_FOUND, "SESSION_NOT_FOUND")


def test_a_session_that_is_not_resumed_expires(start: Starter) -> None:
    server = start("--session-detached-seconds", "0.5")
    with connect(server) as channel, RefineStream(channel, opening()) as stream:
        stream.opened()
        stream.half_close()
        assert stream.rest() == []
        stats = server.wait_for(lambda stats: stats["sessions"] == 0)
        assert (stats["calls"], stats["session_bytes"]) == (0, 0)
        with RefineStream(channel, stream.resuming()) as other:
            assert_failure(other.failure(), Code.NOT_FOUND, "SESSION_NOT_FOUND")


def test_an_image_that_is_too_large_for_the_server(start: Starter) -> None:
    server = start("--max-image-bytes", str(len(PICTURE) - 1), "--max-chunk-bytes", "9")
    with connect(server) as channel:
        with RefineStream(channel, opening()) as stream:
            assert_failure(stream.failure(), Code.INVALID_ARGUMENT, "IMAGE_TOO_LARGE", "config.image.data")
        with RefineStream(channel, uploading()) as stream:
            assert_failure(stream.failure(), Code.INVALID_ARGUMENT, "IMAGE_TOO_LARGE")
        with RefineStream(channel, uploading(size=20), chunk(0, PICTURE[:10])) as stream:
            assert_failure(stream.failure(), Code.INVALID_ARGUMENT, "INVALID_FIELD", "image.data")


def test_shutting_down_is_told(start: Starter) -> None:
    server = start("--drain-seconds", "1")
    with connect(server) as channel, RefineStream(channel, opening()) as stream:
        stream.opened()
        stream.edit(add_points=points((10, 10)))
        assert stream.result().shown_revision == 1
        server.terminate()
        response = stream.next()
        assert response.HasField("draining")
        assert (response.revision, response.applied_seq) == (1, 2)
        assert response.draining.close_time.seconds > 0
        # Edits are answered until then.
        stream.edit(add_points=points((20, 10)))
        assert stream.result().shown_revision == 2
        with RefineStream(channel, opening()) as other:
            failure = other.failure()
            assert_failure(failure, Code.UNAVAILABLE, "DRAINING")
            assert failure.retry_delay is not None
        failure = stream.failure()
        assert_failure(failure, Code.UNAVAILABLE, "DRAINING")
        assert failure.retry_delay is not None
        assert server.wait() == 0


# Rejections

REJECTED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a point right of the image": ({"add_points": points((64.01, 1))}, ("edit.add_points.points[0].x",)),
    "a point above the image": ({"add_points": points((1, 1), (1, -0.01))}, ("edit.add_points.points[1].y",)),
    "a point that is NaN": (
        {"add_points": points((1, 1), (2, 2), (NAN, NAN))},
        ("edit.add_points.points[2].x", "edit.add_points.points[2].y"),
    ),
    "a point that is infinite": ({"add_points": points((math.inf, 1))}, ("edit.add_points.points[0].x",)),
    "no points": ({"add_points": AddPoints()}, ("edit.add_points.points",)),
    "too many points": ({"add_points": points(*[(1.0, 1.0)] * 1024)}, ("edit.add_points.points",)),
    "an unknown label": (
        {"add_points": AddPoints(points=[Point(x=1, y=1, label=9)])},  # type: ignore[arg-type]
        ("edit.add_points.points[0].label",),
    ),
    "more names than points": ({"add_points": points((1, 1), ids=("b", "c"))}, ("edit.add_points.point_ids",)),
    "a name that is taken": ({"add_points": points((1, 1), ids=("a",))}, ("edit.add_points.point_ids[0]",)),
    "a name twice": ({"add_points": points((1, 1), (2, 2), ids=("b", "b"))}, ("edit.add_points.point_ids[1]",)),
    "a name that is too long": ({"add_points": points((1, 1), ids=("x" * 129,))}, ("edit.add_points.point_ids[0]",)),
    "moving what is unknown": (
        {"move_point": MovePoint(point_id="z", x=1, y=1)},
        ("edit.move_point.point_id",),
    ),
    "moving without a name": ({"move_point": MovePoint(x=1, y=1)}, ("edit.move_point.point_id",)),
    "moving out of the image": (
        {"move_point": MovePoint(point_id="a", x=-1, y=NAN)},
        ("edit.move_point.x", "edit.move_point.y"),
    ),
    "removing what is unknown": ({"remove_point": RemovePoint(point_id="z")}, ("edit.remove_point.point_id",)),
    "removing without a name": ({"remove_point": RemovePoint()}, ("edit.remove_point.point_id",)),
    "an inverted box": ({"set_box": box(20, 5, 10, 15)}, ("edit.set_box",)),
    "an empty box": ({"set_box": box(5, 5, 15, 5)}, ("edit.set_box",)),
    "a box that is NaN": ({"set_box": box(5, NAN, 15, 15)}, ("edit.set_box.y_min",)),
    "a box beyond the image": (
        {"set_box": box(-1, 5, 65, 49)},
        ("edit.set_box.x_min", "edit.set_box.x_max", "edit.set_box.y_max"),
    ),
    "a mask of three candidates": ({"set_mask": tensor(3, SIDE, SIDE)}, ("edit.set_mask",)),
    "a mask of another size": ({"set_mask": tensor(1, 64, 64)}, ("edit.set_mask",)),
    "a mask of other axes": ({"set_mask": tensor(SIDE, SIDE)}, ("edit.set_mask",)),
    "a mask with NaN": ({"set_mask": tensor(1, SIDE, SIDE, value=NAN)}, ("edit.set_mask.data",)),
    "a mask of bytes": (
        {"set_mask": Tensor(dtype=DATA_TYPE_UINT8, shape=[1, 1, 1], data=b"1")},
        ("edit.set_mask.dtype",),
    ),
    "a mask without type": ({"set_mask": Tensor(shape=[1, 1, 1], data=b"1234")}, ("edit.set_mask.dtype",)),
    "a mask that is too short": (
        {"set_mask": Tensor(dtype=DATA_TYPE_FLOAT32, shape=[1, SIDE, SIDE], data=b"1234")},
        ("edit.set_mask.data",),
    ),
    "a mask of enormous shape": (
        {"set_mask": Tensor(dtype=DATA_TYPE_FLOAT32, shape=[2**62, 2**62, 2**62], data=b"1234")},
        ("edit.set_mask.data",),
    ),
    "a mask without data": ({"set_mask": Tensor()}, ("edit.set_mask.dtype",)),
    "a candidate that there is not": ({"select_mask": SelectMask(index=3)}, ("edit.select_mask.index",)),
    "a negative candidate": ({"select_mask": SelectMask(index=-1)}, ("edit.select_mask.index",)),
    "undoing too much": ({"undo": Undo(steps=2)}, ("edit.undo.steps",)),
    "undoing a negative number": ({"undo": Undo(steps=-1)}, ("edit.undo.steps",)),
    "redoing nothing": ({"redo": Redo()}, ("edit.redo.steps",)),
    "no action": ({}, ("edit",)),
    "no object": ({"object_id": "", "undo": Undo()}, ("edit.object_id",)),
    "an object's name that is too long": (
        {"object_id": "x" * 129, "add_points": points((1, 1))},
        ("edit.object_id",),
    ),
    "undoing what an unknown object never had": ({"object_id": "2", "undo": Undo()}, ("edit.undo.steps",)),
    "a candidate of an unknown object": ({"object_id": "2", "select_mask": SelectMask()}, ("edit.select_mask.index",)),
}


def two_rounds(stream: RefineStream, between: dict[str, Any] | None) -> list[RefineResponse]:
    """Add a point, make a wrong edit if there is one, add another point, undo and redo."""
    stream.opened()
    stream.edit(add_points=points((20, 12), ids=("a",)))
    answers = [stream.next()]
    if between is not None:
        seq = stream.edit(**between)
        response = stream.next()
        assert (response.revision, response.applied_seq, response.rejected.seq) == (1, seq, seq)
        assert response.rejected.reason == "INVALID_FIELD"
        assert response.rejected.message
    stream.edit(add_points=points((40, 30), label=0))
    answers.append(stream.next())
    stream.edit(undo=Undo())
    answers.append(stream.next())
    stream.edit(redo=Redo())
    answers.append(stream.next())
    return answers


@pytest.fixture
def undisturbed(gated: grpc.Channel) -> list[RefineResponse]:
    with RefineStream(gated, opening()) as stream:
        return two_rounds(stream, None)


@pytest.mark.parametrize("case", REJECTED)
def test_a_wrong_edit_changes_nothing(gated: grpc.Channel, undisturbed: list[RefineResponse], case: str) -> None:
    action, fields = REJECTED[case]
    with RefineStream(gated, opening()) as stream:
        answers = two_rounds(stream, action)
        (rejected,) = [response.rejected for response in stream.seen if response.HasField("rejected")]
        assert tuple(violation.field for violation in rejected.violations) == fields
        assert all(violation.description for violation in rejected.violations)
        for answer, expected in zip(answers, undisturbed, strict=True):
            assert without_times(answer) == without_times(expected)


def without_times(response: RefineResponse) -> tuple[int, MaskResult]:
    """What a result says besides how long it took and which number the edit had."""
    result = MaskResult()
    result.CopyFrom(response.result)
    result.ClearField("timing")
    return response.revision, result


def test_a_model_that_fails(gated: grpc.Channel) -> None:
    with RefineStream(gated, opening(model="hungry")) as stream:
        stream.opened()
        stream.edit(add_points=points((1, 1)))
        assert stream.rejected().reason == "OUT_OF_MEMORY"
        stream.edit(reset=Reset())
        assert stream.result().shown_revision == 0
    with RefineStream(gated, opening(model="broken")) as stream:
        stream.opened()
        stream.edit(add_points=points((1, 1)))
        failure = stream.failure()
        assert_failure(failure, Code.INTERNAL, "INTERNAL")
        assert "secret" not in failure.message


# What edits mean


def shown(round_of: MaskResult) -> Round:
    """The round that a result of one computation shows."""
    (one,) = round_of.rounds
    assert one.revision == round_of.shown_revision
    return one


def test_the_first_round_proposes_and_later_ones_refine(gated: grpc.Channel) -> None:
    with RefineStream(gated, opening(output=OutputOptions(return_logits=True))) as stream:
        response = stream.opened()
        assert (response.revision, response.applied_seq) == (0, 0)
        assert not response.opened.resumed
        assert (response.opened.image.digest, response.opened.image.width, response.opened.image.height) == (
            DIGEST,
            WIDTH,
            HEIGHT,
        )
        stream.edit(add_points=points((20, 12)))
        response = stream.next()
        first = response.result
        assert (response.revision, response.applied_seq, first.object_id) == (1, 2, "1")
        scores = [mask.score for mask in first.prediction.masks]
        assert first.selected_mask == scores.index(max(scores))
        one = shown(first)
        assert (one.multimask_output, one.mask_revision, one.mask_seq) == (True, 0, 0)
        assert one.prompt == Prompt(points=points((20, 12)).points)
        assert first.mask_logits.shape == [3, SIDE, SIDE]
        assert first.HasField("timing")

        stream.edit(set_box=box(5, 5, 50, 40))
        response = stream.next()
        second = response.result
        assert (response.revision, response.applied_seq) == (2, 4)
        assert len(second.prediction.masks) == 1
        one = shown(second)
        assert (one.multimask_output, one.mask_revision, one.mask_index) == (False, 1, first.selected_mask)
        assert one.prompt == Prompt(points=points((20, 12)).points, box=box(5, 5, 50, 40))
        assert second.mask_logits.shape == [1, SIDE, SIDE]

        stream.edit(clear_box=ClearBox())
        third = stream.result()
        assert shown(third).mask_revision == 2
        assert not shown(third).prompt.HasField("box")


def test_one_mask_from_the_beginning(gated: grpc.Channel) -> None:
    with RefineStream(gated, opening(output=OutputOptions(multimask_output=False))) as stream:
        stream.opened()
        stream.edit(add_points=points((20, 12)))
        first = stream.result()
        assert len(first.prediction.masks) == 1
        assert not shown(first).multimask_output


def test_points_are_moved_and_removed_by_name(gated: grpc.Channel) -> None:
    with RefineStream(gated, opening()) as stream:
        stream.opened()
        stream.edit(add_points=points((20, 12), (30, 30), ids=("a", "b")))
        one = shown(stream.result())
        assert list(one.point_ids) == ["a", "b"]
        stream.edit(add_points=points((64, 48), label=0))  # the corner is in the image
        one = shown(stream.result())
        assert list(one.point_ids) == ["a", "b", ""]
        stream.edit(move_point=MovePoint(point_id="a", x=0, y=0))
        one = shown(stream.result())
        assert [(point.x, point.y) for point in one.prompt.points] == [(0, 0), (30, 30), (64, 48)]
        stream.edit(remove_point=RemovePoint(point_id="b"))
        one = shown(stream.result())
        assert [(point.x, point.y) for point in one.prompt.points] == [(0, 0), (64, 48)]
        assert list(one.point_ids) == ["a", ""]
        # The name is free again.
        stream.edit(add_points=points((1, 2), ids=("b",)))
        assert list(shown(stream.result()).point_ids) == ["a", "", "b"]


def test_without_feedback_rounds_see_only_points_and_box(gated: grpc.Channel) -> None:
    with RefineStream(gated, opening(mask_feedback=MASK_FEEDBACK_NONE)) as stream:
        stream.opened()
        stream.edit(add_points=points((20, 12)))
        stream.result()
        stream.edit(add_points=points((40, 30)))
        second = stream.result()
        assert (shown(second).mask_revision, shown(second).mask_seq) == (0, 0)
        assert len(second.prediction.masks) == 1
        mask = tensor(1, SIDE, SIDE, value=-8)
        seq = stream.edit(set_mask=mask)
        third = stream.result()
        assert (shown(third).mask_revision, shown(third).mask_seq) == (0, seq)
        assert third.prediction != second.prediction
        stream.edit(add_points=points((50, 30)))
        assert shown(stream.result()).mask_seq == 0
        every = [one for response in results(stream.seen) for one in response.result.rounds]
        again = list(replay(gated, PICTURE, every, masks={seq: mask}))
        assert [one.predictions[0] for one in again] == [one.result.prediction for one in results(stream.seen)]


def test_a_mask_alone_begins_an_object(gated: grpc.Channel) -> None:
    mask = tensor(1, SIDE, SIDE, value=4)
    with RefineStream(gated, opening()) as stream:
        stream.opened()
        seq = stream.edit(set_mask=mask)
        first = stream.result()
        assert shown(first).mask_seq == seq
        assert shown(first).prompt == Prompt()
        (again,) = replay(gated, PICTURE, list(first.rounds), masks={seq: mask})
        assert again.predictions[0] == first.prediction
        stream.edit(add_points=points((20, 12)))
        assert (shown(stream.result()).mask_revision, shown(stream.seen[-1].result).mask_seq) == (1, 0)


def test_the_next_round_starts_from_the_selected_candidate(gated: grpc.Channel, gate: Gate) -> None:
    predictions = []
    for index in range(3):
        with RefineStream(gated, opening()) as stream:
            stream.opened()
            stream.edit(add_points=points((20, 12)))
            first, decodes = stream.result(), gate.decodes
            stream.edit(select_mask=SelectMask(index=index))
            response = stream.next()
            chosen = response.result
            assert (response.revision, chosen.selected_mask, chosen.shown_revision) == (2, index, 1)
            assert (chosen.prediction, len(chosen.rounds)) == (first.prediction, 0)
            assert not chosen.HasField("timing")
            assert gate.decodes == decodes
            stream.edit(add_points=points((40, 30)))
            second = stream.result()
            assert (shown(second).mask_revision, shown(second).mask_index) == (1, index)
            predictions.append(second.prediction)
    assert len({one.SerializeToString(deterministic=True) for one in predictions}) == 3


def test_undo_and_redo_compute_nothing(models: Models, gated: grpc.Channel, gate: Gate) -> None:
    with RefineStream(gated, every_edit()) as stream:
        stream.opened()
        for x in range(10, 60, 10):
            stream.edit(add_points=points((x, 12)))
        made = [stream.result() for _ in range(5)]
        decodes, encodes = gate.decodes, models.server.stats()["engine"]["encodes"]
        revision = 5
        moves: list[tuple[dict[str, Any], int]] = [
            ({"undo": Undo()}, 4),
            ({"undo": Undo(steps=1)}, 3),
            ({"redo": Redo(steps=2)}, 5),
            ({"undo": Undo(steps=4)}, 1),
            ({"undo": Undo(steps=1)}, 0),
            ({"redo": Redo(steps=5)}, 5),
            ({"undo": Undo(steps=5)}, 0),
            ({"redo": Redo()}, 1),
            ({"redo": Redo(steps=3)}, 4),
        ]
        for move, expected in moves:
            stream.edit(**move)
            response, revision = stream.next(), revision + 1
            result = response.result
            assert (response.revision, result.shown_revision, len(result.rounds)) == (revision, expected, 0)
            assert not result.HasField("timing")
            if expected:
                assert result.prediction == made[expected - 1].prediction
                assert result.selected_mask == made[expected - 1].selected_mask
            else:
                assert len(result.prediction.masks) == 0
        assert gate.decodes == decodes
        assert models.server.stats()["engine"]["encodes"] == encodes
        # A new round drops what was undone: here the fifth.
        stream.edit(add_points=points((1, 1)))
        assert (shown(stream.result()).mask_revision, gate.decodes) == (4, decodes + 1)
        stream.edit(redo=Redo())
        assert stream.rejected().violations[0].field == "edit.redo.steps"
        stream.edit(undo=Undo())
        assert stream.result().prediction == made[3].prediction


def test_a_selection_is_kept_by_undo(gated: grpc.Channel) -> None:
    with RefineStream(gated, every_edit()) as stream:
        stream.opened()
        stream.edit(add_points=points((20, 12)))
        index = (stream.result().selected_mask + 1) % 3
        stream.edit(select_mask=SelectMask(index=index))
        stream.edit(add_points=points((40, 30)))
        stream.edit(undo=Undo())
        assert [stream.result().selected_mask for _ in range(3)] == [index, 0, index]


def test_reset_forgets_and_can_be_undone(gated: grpc.Channel) -> None:
    with RefineStream(gated, every_edit()) as stream:
        stream.opened()
        stream.edit(add_points=points((20, 12), ids=("a",)))
        stream.edit(add_points=points((40, 30)))
        stream.edit(reset=Reset())
        first, second, empty = (stream.result() for _ in range(3))
        assert (len(empty.prediction.masks), empty.shown_revision, len(empty.rounds)) == (0, 0, 0)
        assert not empty.HasField("timing")
        stream.edit(undo=Undo())
        assert stream.result().prediction == second.prediction
        stream.edit(redo=Redo())
        assert len(stream.result().prediction.masks) == 0
        # From the beginning, with the name free again: the same masks.
        stream.edit(add_points=points((20, 12), ids=("a",)))
        again = stream.result()
        assert again.prediction == first.prediction
        assert (shown(again).multimask_output, shown(again).mask_revision) == (True, 0)
        # Resetting what is empty.
        stream.edit("2", reset=Reset())
        assert stream.result().shown_revision == 0


def test_an_object_whose_last_point_was_removed_is_empty(gated: grpc.Channel, gate: Gate) -> None:
    with RefineStream(gated, every_edit()) as stream:
        stream.opened()
        stream.edit(add_points=points((20, 12), ids=("a",)))
        first, decodes = stream.result(), gate.decodes
        stream.edit(remove_point=RemovePoint(point_id="a"))
        empty = stream.result()
        assert (len(empty.prediction.masks), empty.shown_revision, gate.decodes) == (0, 0, decodes)
        stream.edit(undo=Undo())
        assert stream.result().prediction == first.prediction
        stream.edit(redo=Redo())
        stream.result()
        stream.edit(add_points=points((20, 12)))
        again = stream.result()
        assert again.prediction == first.prediction
        assert shown(again).mask_revision == 0


def test_objects_are_independent(gated: grpc.Channel) -> None:
    alone: dict[str, list[MaskResult]] = {}
    clicks = {"left": (10.0, 12.0), "right": (50.0, 30.0), "x" * 128: (30.0, 20.0)}
    for name, (x, y) in clicks.items():
        with RefineStream(gated, every_edit()) as stream:
            stream.opened()
            stream.edit(name, add_points=points((x, y)))
            stream.edit(name, add_points=points((x + 2, y)))
            alone[name] = [stream.result(), stream.result()]
    with RefineStream(gated, every_edit()) as stream:
        stream.opened()
        for name, (x, y) in clicks.items():
            stream.edit(name, add_points=points((x, y), ids=("the same name",)))
        for name, (x, y) in clicks.items():
            stream.edit(name, add_points=points((x + 2, y)))
        stream.edit("left", undo=Undo())
        together = [stream.result() for _ in range(7)]
        for i, name in enumerate(clicks):
            assert together[i].object_id == name
            assert [together[i].prediction, together[i + 3].prediction] == [one.prediction for one in alone[name]]
        assert [one.shown_revision for one in together] == [1, 2, 3, 4, 5, 6, 1]


def test_every_edit_is_answered_in_order(gated: grpc.Channel, gate: Gate) -> None:
    with RefineStream(gated, every_edit()) as stream:
        stream.opened()
        gate.hold("decode")
        seqs = [stream.edit(add_points=points((x, 12))) for x in range(10, 40, 10)]
        seqs.append(stream.edit(add_points=AddPoints()))
        seqs.append(stream.edit(undo=Undo()))
        seqs.append(stream.edit("2", set_box=box(1, 1, 9, 9)))
        gate.wait_until_held("decode")
        stream.barrier()
        gate.release("decode")
        answers = [stream.next() for _ in seqs]
        assert [answer.applied_seq for answer in answers] == seqs
        assert [answer.revision for answer in answers] == [1, 2, 3, 3, 4, 5]
        assert [answer.result.shown_revision for answer in answers if answer.HasField("result")] == [1, 2, 3, 2, 5]


def test_the_latest_edit_wins(gated: grpc.Channel, gate: Gate) -> None:
    with RefineStream(gated, opening()) as stream:
        stream.opened()
        gate.hold("decode")
        stream.edit(add_points=points((10, 12)))
        gate.wait_until_held("decode")
        decodes = gate.decodes
        for x in (20, 30, 40):
            stream.edit(add_points=points((x, 12)))
        wrong = stream.edit(add_points=points((99, 12)))
        last = stream.edit(set_box=box(1, 1, 60, 40))
        stream.barrier()
        gate.release("decode")
        *early, rejected, result = [stream.next() for _ in range(3)]
        assert [(one.revision, one.applied_seq) for one in early] == [(1, 2)]
        assert (rejected.rejected.seq, result.revision, result.applied_seq) == (wrong, 2, last)
        assert gate.decodes == decodes + 2
        one = shown(result.result)
        assert [point.x for point in one.prompt.points] == [10, 20, 30, 40]
        assert one.prompt.box == box(1, 1, 60, 40)
        assert (one.mask_revision, one.mask_index) == (1, early[0].result.selected_mask)


def test_what_looks_back_is_not_folded_over(gated: grpc.Channel, gate: Gate) -> None:
    with RefineStream(gated, opening()) as stream:
        stream.opened()
        gate.hold("decode")
        stream.edit(add_points=points((10, 12)))  # revision 1
        gate.wait_until_held("decode")
        stream.edit(add_points=points((20, 12)))
        stream.edit(add_points=points((30, 12)))  # 2: both
        stream.edit(undo=Undo())
        stream.edit(select_mask=SelectMask(index=0))
        stream.edit(add_points=points((40, 12)))  # 3: these three
        last = stream.edit("2", add_points=points((50, 12)))  # 4
        stream.barrier()
        gate.release("decode")
        while stream.next().applied_seq < last:
            pass
        answers = results(stream.seen)
        rounds = {one.revision: one for answer in answers for one in answer.result.rounds}
        assert {revision: [point.x for point in one.prompt.points] for revision, one in rounds.items()} == {
            1: [10],
            2: [10, 20, 30],
            3: [10, 40],
            4: [50],
        }
        assert (rounds[3].mask_revision, rounds[3].mask_index) == (1, 0)
        of_first = [answer for answer in answers if answer.result.object_id == "1"]
        again = list(replay(gated, PICTURE, [one for answer in of_first for one in answer.result.rounds]))
        assert of_first[-1].result.prediction == again[-1].predictions[0]


def test_cancelling_drops_what_was_not_computed(gated: grpc.Channel, gate: Gate) -> None:
    with RefineStream(gated, every_edit()) as stream:
        stream.opened()
        stream.edit(add_points=points((10, 12)))
        first = stream.result()
        gate.hold("decode")
        running = stream.edit(add_points=points((20, 12)))
        gate.wait_until_held("decode")
        waiting = [stream.edit(add_points=points((x, 12))) for x in (30, 40)]
        kept = stream.edit(add_points=points((50, 12)))
        stream.cancel_through(waiting[-1])
        # They are answered while the model is still at work.
        for seq in (running, *waiting):
            response = stream.next()
            assert (response.rejected.seq, response.rejected.reason) == (seq, "CANCELLED")
            assert (response.revision, response.applied_seq) == (1, seq)
        gate.release("decode")
        response = stream.next()
        assert (response.revision, response.applied_seq) == (2, kept)
        assert [point.x for point in shown(response.result).prompt.points] == [10, 50]
        # There is nothing left to cancel, and what comes later is not.
        stream.cancel_through(10**6)
        stream.edit(undo=Undo())
        assert stream.result().prediction == first.prediction


def test_an_edit_that_arrives_twice_is_applied_once(gated: grpc.Channel) -> None:
    with RefineStream(gated, every_edit()) as stream:
        stream.opened()
        for seq, x in ((1, 10), (1, 10), (5, 20), (5, 20), (1, 10), (5, 99), (6, 30)):
            stream.edit(seq=seq, add_points=points((x, 12)))
        answers = [stream.next() for _ in range(3)]
        assert [answer.applied_seq for answer in answers] == [1, 5, 6]
        assert [point.x for point in shown(answers[-1].result).prompt.points] == [10, 20, 30]
        # Rejected ones were seen, too.
        stream.edit(seq=7, undo=Undo(steps=9))
        stream.edit(seq=7, undo=Undo(steps=1))
        stream.edit(seq=8, undo=Undo())
        assert [response.applied_seq for response in (stream.next(), stream.next())] == [7, 8]
        assert stream.seen[-1].result.prediction == answers[1].result.prediction


def test_an_unseen_edit_under_a_lower_number_is_rejected(gated: grpc.Channel) -> None:
    with RefineStream(gated, every_edit()) as stream:
        stream.opened()
        stream.edit(seq=5, add_points=points((10, 12)))
        first = stream.result()
        for _ in range(2):
            stream.edit(seq=4, add_points=points((20, 12)))
            rejection = stream.rejected()
            assert (rejection.seq, rejection.reason, rejection.violations[0].field) == (4, "INVALID_FIELD", "seq")
        stream.edit(seq=2**64 - 1, undo=Undo())
        stream.result()
        stream.edit(seq=2**64 - 2, redo=Redo())
        assert stream.rejected().seq == 2**64 - 2
        with RefineStream(gated, stream.resuming(last_revision=2)) as other:
            opened = other.opened()
            assert opened.applied_seq == 2**64 - 1
            assert [other.rejected().seq for _ in range(1)] == [2**64 - 2]
        assert first.shown_revision == 1


def test_a_half_closed_stream_is_answered_and_its_session_waits(gated: grpc.Channel, gate: Gate) -> None:
    with RefineStream(gated, every_edit()) as stream:
        stream.opened()
        gate.hold("decode")
        seqs = [stream.edit(add_points=points((x, 12))) for x in (10, 20, 30)]
        stream.half_close()
        gate.wait_until_held("decode")
        gate.release("decode")
        answers = stream.rest()
        assert [answer.applied_seq for answer in answers] == seqs
        with RefineStream(gated, stream.resuming(last_revision=3)) as other:
            opened = other.opened()
            assert (opened.revision, opened.applied_seq) == (3, seqs[-1])
            other.edit(seq=seqs[-1] + 1, undo=Undo())
            assert other.result().prediction == answers[1].result.prediction
            other.finish()
            assert other.rest() == []


def test_finishing_answers_what_was_sent_before(models: Models, gated: grpc.Channel) -> None:
    sessions = models.server.stats()["sessions"]
    with RefineStream(gated, every_edit()) as stream:
        for x in (10, 20, 30):
            stream.edit(add_points=points((x, 12)))
        stream.finish()
        stream.edit(add_points=points((40, 12)))
        stream.send(b"\xff")  # nobody reads on
        stream.opened()
        assert [answer.applied_seq for answer in stream.rest()] == [2, 4, 6]
    assert models.server.stats()["sessions"] == sessions


def test_an_uploaded_image(gated: grpc.Channel) -> None:
    header = uploading(digest=DIGEST)
    with RefineStream(gated, header) as stream, RefineStream(gated, opening()) as other:
        stream.upload(PICTURE, 50)
        progress = []
        while not (response := stream.next()).HasField("opened"):
            progress.append(response.upload.received_size)
        assert progress == [*range(50, len(PICTURE), 50), len(PICTURE)]
        other.opened()
        assert response.opened.image == other.session.image
        for one in (stream, other):
            one.edit(add_points=points((20, 12)))
        assert stream.result().prediction == other.result().prediction
    # It is known by its digest from now on.
    with RefineStream(gated, RefineConfig(image=Image(digest=DIGEST))) as stream:
        assert stream.opened().opened.image.width == WIDTH


def test_encodings_of_masks_and_types_of_logits(gated: grpc.Channel) -> None:
    stub = SegmentationServiceStub(gated)
    for encoding in (MASK_ENCODING_COCO_RLE, MASK_ENCODING_RUN_LENGTHS, MASK_ENCODING_PNG):
        for dtype in (DATA_TYPE_FLOAT32, DATA_TYPE_FLOAT16, DATA_TYPE_BFLOAT16):
            wanted = OutputOptions(mask_encoding=encoding, tensor_dtype=dtype, return_logits=True)
            with RefineStream(gated, opening(output=wanted)) as stream:
                stream.opened()
                stream.edit(add_points=points((20, 12)))
                result = stream.result()
                stream.edit(add_points=points((40, 12)))
                second = stream.result()
            request = SegmentRequest(image=Image(data=PICTURE), prompts=[shown(result).prompt], output=wanted)
            response = stub.Segment(request)
            assert result.prediction == response.predictions[0]
            assert result.mask_logits.dtype == dtype
            assert result.mask_logits.data == response.mask_logits.data
            # What is kept for the next round is float32 all the same.
            *_, again = replay(gated, PICTURE, [shown(result), shown(second)])
            masks = again.predictions[0].masks
            assert [(mask.area, mask.score) for mask in second.prediction.masks] == [
                (mask.area, mask.score) for mask in masks
            ]


def assert_replays(
    channel: grpc.Channel, image: bytes, config: RefineConfig, clicks: list[tuple[float, float]]
) -> None:
    """Refine with clicks, a box, a selection and a mask; Segment must give the same, byte for byte."""
    with RefineStream(channel, config) as stream:
        stream.opened()
        for i, click in enumerate(clicks):
            stream.edit(add_points=points(click, label=i % 2 == 0))
        stream.edit(undo=Undo(steps=len(clicks) - 1))
        stream.edit(select_mask=SelectMask(index=2))
        x, y = clicks[0]
        stream.edit(set_box=box(x - 8, y - 8, x + 8, y + 8))
        stream.edit(undo=Undo())
        stream.edit(add_points=points(clicks[-1], label=0))
        stream.finish()
        rest = stream.rest()
    answers = [one.result for one in rest if one.HasField("result")]
    assert len(answers) == len(clicks) + 5
    rounds = [one for answer in answers for one in answer.rounds]
    assert len(rounds) == len(clicks) + 2
    assert rounds[-1].mask_index == 2
    again = dict(zip((one.revision for one in rounds), replay(channel, image, rounds), strict=True))
    for answer in answers:
        expected = again[answer.shown_revision].predictions[0]
        assert answer.prediction.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


def test_rounds_can_be_repeated_with_segment(gated: grpc.Channel) -> None:
    assert_replays(gated, PICTURE, every_edit(), [(20, 12), (40, 30), (10, 40), (50, 20)])


def test_rounds_of_grabcut_can_be_repeated_with_segment(channel: grpc.Channel, photo: bytes) -> None:
    config = RefineConfig(image=Image(data=photo), edit_policy=EDIT_POLICY_EVERY_EDIT)
    assert_replays(channel, photo, config, [(120, 100), (20, 20), (200, 120)])


def test_rounds_of_sam2_can_be_repeated_with_segment(sam2_server: ServerProcess, photo: bytes) -> None:
    config = RefineConfig(image=Image(data=photo), edit_policy=EDIT_POLICY_EVERY_EDIT)
    with connect(sam2_server) as channel:
        assert_replays(channel, photo, config, [(120, 100), (20, 20), (200, 120)])


def test_other_calls_go_on_beside_a_stream(channel: grpc.Channel) -> None:
    with RefineStream(channel, opening()) as stream:
        stream.opened()
        assert len(ModelServiceStub(channel).ListModels(ListModelsRequest()).models) == 1
        failure = failure_of(lambda: SegmentationServiceStub(channel).Segment(SegmentRequest()))
        assert failure.code is Code.INVALID_ARGUMENT
        stream.edit(add_points=points((10, 10)))
        assert stream.result().shown_revision == 1
