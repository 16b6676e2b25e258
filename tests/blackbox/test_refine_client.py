"""Interactive sessions of both clients against real servers, over connections that break when a test wants it."""

import asyncio
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segrpc.client import (
    AddPoints,
    AsyncSegmentationClient,
    DeadlineExceededError,
    EditRejectedError,
    InvalidRequestError,
    MovePoint,
    NotFoundError,
    OverloadedError,
    RefineResult,
    RefineSession,
    SegmentationClient,
    SessionClosedError,
    SessionTakenError,
    UnavailableError,
)
from segrpc.client.codec import ImageLike
from tests.blackbox.gate import Gate
from tests.photos import load_image, photo_path
from tests.server_process import ServerProcess
from tests.tcp_proxy import TcpProxy

WIDTH, HEIGHT = 150, 100
CUP, TABLE, SPOON = (75, 50), (8, 5), (105, 62)
RESULT_BYTES = 2**16  # of a result with logits


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


PHOTO = as_png(load_image("coffee").resize((WIDTH, HEIGHT)))  # small, so that GrabCut takes no time


@pytest.fixture
def client(server: ServerProcess) -> Iterator[SegmentationClient]:
    with SegmentationClient(server.target) as opened:
        yield opened
    assert not [thread for thread in threading.enumerate() if thread.name == "segrpc-refine"]


@dataclass(frozen=True)
class Gated:
    """A server with the model ``gated``, and the hand on it."""

    server: ServerProcess
    gate: Gate


@pytest.fixture(scope="module")
def gated_server(tmp_path_factory: pytest.TempPathFactory, third_party: dict[str, str]) -> Iterator[Gated]:
    folder = tmp_path_factory.mktemp("gated")
    gate, config = Gate(folder / "gates"), folder / "config.toml"
    config.write_text(f'[[models]]\nname = "gated"\nmodel_params = {{ gates = "{folder / "gates"}" }}\n')
    with ServerProcess("--config", str(config), log=folder / "log", environment=third_party) as process:
        yield Gated(process, gate)


@pytest.fixture
def gate(gated_server: Gated) -> Iterator[Gate]:
    yield gated_server.gate
    gated_server.gate.open()


@pytest.fixture
def cheap(gated_server: Gated) -> ServerProcess:
    """A server whose rounds take no time."""
    return gated_server.server


@pytest.fixture
def gated(cheap: ServerProcess) -> Iterator[SegmentationClient]:
    with SegmentationClient(cheap.target) as opened:
        yield opened
    assert not [thread for thread in threading.enumerate() if thread.name == "segrpc-refine"]


def mask_of(result: RefineResult | None) -> np.ndarray[Any, Any]:
    assert result is not None
    assert result.mask is not None
    return result.mask.array


# What edits do


def test_a_session(client: SegmentationClient) -> None:
    with client.refine(PHOTO, return_logits=True) as session:
        assert (session.image.width, session.image.height) == (WIDTH, HEIGHT)
        first = session.click(*CUP)
        assert len(first.prediction.masks) == 3
        assert first.selected == first.prediction.best_index
        assert mask_of(first)[50, 75]
        assert first.logits is not None
        assert first.logits.shape == (3, 256, 256)
        assert first.timing is not None

        second = session.click(*TABLE, 0)
        assert len(second.prediction.masks) == 1
        assert not mask_of(second)[5, 8]
        (computed,) = second.rounds
        assert computed.points == (CUP, TABLE)
        assert computed.labels == (1, 0)
        assert (computed.mask_revision, computed.mask_index) == (first.revision, first.selected)

        undone = session.undo()
        assert undone.shown_revision == first.shown_revision
        assert undone.timing is None
        np.testing.assert_array_equal(mask_of(undone), mask_of(first))
        np.testing.assert_array_equal(mask_of(session.redo()), mask_of(second))

        other = (first.selected + 1) % 3
        session.undo()
        assert session.select(other).selected == other
        (computed,) = session.click(*TABLE, 0).rounds
        assert computed.mask_index == other

        empty = session.reset()
        assert empty.mask is None
        assert session.shown_round() is None
        assert session.undo().mask is not None
        assert session.result() is session.results["1"]


def test_objects_do_not_influence_each_other(client: SegmentationClient) -> None:
    with client.refine(PHOTO) as session:
        cup = session.click(*CUP, object_id="cup")
        table = session.box(0, 0, 30, 30, object_id="table")
        assert session.results == {"cup": cup, "table": table}
        assert session.undo(object_id="table").mask is None
        assert session.result("cup") is cup
    alone = client.segment(PHOTO, boxes=(0, 0, 30, 30))
    np.testing.assert_array_equal(mask_of(table), alone.predictions[0].best.array)


def test_points_boxes_and_masks(client: SegmentationClient) -> None:
    with client.refine(PHOTO, return_logits=True, mask_feedback="none") as session:
        session.add_points([CUP, TABLE], [1, 0], ["on", "off"])
        (moved,) = session.move_point("off", 40, 30).rounds
        assert moved.points == (CUP, (40, 30))
        assert moved.point_ids == ("on", "off")
        assert (moved.mask_revision, moved.mask_seq) == (0, 0)
        (boxed,) = session.box(25, 12, 125, 95).rounds
        assert boxed.box == (25, 12, 125, 95)
        (fewer,) = session.remove_point("off").rounds
        assert (fewer.points, fewer.labels) == ((CUP,), (1,))
        cleared = session.clear_box()
        assert cleared.rounds[0].box is None
        assert cleared.logits is not None
        (masked,) = session.set_mask(cleared.logits[0]).rounds
        assert masked.mask_seq > 0
        export = session.export()
    assert client.replay(export, PHOTO).identical


def test_each_edit_is_answered_in_order(gated: SegmentationClient) -> None:
    with gated.refine(PHOTO, edit_policy="every_edit") as session:
        seqs = [session.send(AddPoints([(x, 10)], [0])) for x in range(10, 60, 10)]
        session.wait(seqs[-1])
    results = list(session)
    assert [result.applied_seq for result in results] == seqs
    assert [len(result.rounds[0].points) for result in results] == [1, 2, 3, 4, 5]


def test_a_wrong_edit_changes_nothing_and_the_session_goes_on(gated: SegmentationClient) -> None:
    with gated.refine(PHOTO) as session:
        first = session.click(*CUP)
        with pytest.raises(EditRejectedError, match=r"edit\.add_points\.points\[0\]\.x") as wrong:
            session.click(9999, 1)
        assert (wrong.value.reason, wrong.value.seq) == ("INVALID_FIELD", 2)
        assert [violation.field for violation in wrong.value.violations] == ["edit.add_points.points[0].x"]
        with pytest.raises(EditRejectedError, match="nothing to redo"):
            session.redo()
        with pytest.raises(ValueError, match="points"):
            session.add_points([(1, 2, 3)])
        assert session.result() is first
        assert session.click(*TABLE, 0).rounds[0].points == (CUP, TABLE)
        assert sorted(session.rejections) == [2, 3]


def test_of_a_drag_only_the_newest_mask_is_read(gated: SegmentationClient, gate: Gate) -> None:
    with gated.refine(PHOTO) as session:
        session.click(*CUP, point_id="p")
        gate.hold("decode")
        first = session.send(MovePoint("p", 10, 10))
        gate.wait_until_held("decode")
        last = [session.send(MovePoint("p", x, 10)) for x in range(20, 100)][-1]
        gate.release("decode")
        assert session.wait(first).applied_seq >= first
        newest = session.wait(last)
        assert newest.rounds[-1].points == ((99, 10),)
        assert next(iter(session)) is newest
        export = session.export()
    assert list(session) == []
    assert gated.replay(export, PHOTO).identical


def test_cancelling_what_has_not_been_computed(gated: SegmentationClient, gate: Gate) -> None:
    with gated.refine(PHOTO, edit_policy="every_edit") as session:
        session.click(*CUP)
        gate.hold("decode")
        seqs = [session.send(AddPoints([(x, 10)])) for x in (10, 20, 30)]
        gate.wait_until_held("decode")
        session.cancel(seqs[1])
        for seq in seqs[:2]:
            with pytest.raises(EditRejectedError) as cancelled:
                session.wait(seq)
            assert cancelled.value.reason == "CANCELLED"
        gate.release("decode")
        assert session.wait(seqs[2]).rounds[0].points == (CUP, (30, 10))


# Images


def noise(seed: int) -> bytes:
    file = as_png(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (700, 800, 3), dtype=np.uint8)))
    assert len(file) > 2**20
    return file


def test_a_large_image_goes_in_chunks_and_then_by_its_digest(server: ServerProcess) -> None:
    photo = noise(7)
    with TcpProxy(server.target) as proxy, SegmentationClient(proxy.target) as client:
        with client.refine(photo) as session:
            first = session.click(10, 10)
        sent = proxy.bytes_to_server
        assert sent > len(photo)
        with client.refine(photo) as session:
            np.testing.assert_array_equal(mask_of(session.click(10, 10)), mask_of(first))
        with client.refine(session.image.digest) as session:
            assert session.click(10, 10).mask is not None
        assert proxy.bytes_to_server < sent + 10_000


@pytest.mark.parametrize("large", [False, True])
def test_an_image_that_the_server_forgot_is_sent_again(large: bool, tmp_path: Path) -> None:
    photos = [noise(1), noise(2)] if large else [PHOTO, as_png(load_image("chelsea").resize((WIDTH, HEIGHT)))]
    small = ["--image-store-bytes", str(len(photos[0]) + 1)]
    with ServerProcess(*small, log=tmp_path / "log") as server, SegmentationClient(server.target) as client:
        for photo in (*photos, photos[0]):
            with client.refine(photo) as session:
                assert session.click(10, 10).mask is not None


@pytest.mark.parametrize("kind", ["path", "array", "image"])
def test_kinds_of_images(client: SegmentationClient, kind: str) -> None:
    path, image = photo_path("coffee"), load_image("coffee")
    given: ImageLike = {"path": path, "array": np.asarray(image), "image": image}[kind]  # type: ignore[assignment]
    with client.refine(given) as session:
        assert mask_of(session.click(300, 200))[200, 300]


def test_what_cannot_be_opened(client: SegmentationClient) -> None:
    attempts: list[tuple[Any, dict[str, Any], type[Exception]]] = [
        (b"no image", {}, InvalidRequestError),
        (PHOTO, {"model": "sam9"}, NotFoundError),
        (f"sha256:{'0' * 64}", {}, NotFoundError),
        ("no-such-file.jpg", {}, OSError),
        (PHOTO, {"edit_policy": "some"}, ValueError),
        (PHOTO, {"points": []}, TypeError),
    ]
    for image, options, error in attempts:
        with pytest.raises(error), client.refine(image, **options):
            pass


def test_a_server_that_has_no_room(tmp_path: Path) -> None:
    with (
        ServerProcess("--max-open-sessions", "1", log=tmp_path / "log") as server,
        SegmentationClient(server.target) as client,
        client.refine(PHOTO),
    ):
        with pytest.raises(OverloadedError) as full, client.refine(PHOTO):
            pass
        assert full.value.retry_after
        assert full.value.reason == "OVERLOADED"


# Exports


def test_an_export_is_json_and_replays_identically(client: SegmentationClient) -> None:
    with client.refine(PHOTO, edit_policy="every_edit") as session:
        session.click(*CUP, object_id="cup")
        session.click(*TABLE, 0, object_id="cup")
        session.undo(object_id="cup")
        session.box(25, 12, 125, 95, object_id="cup")
        session.select(0, object_id="cup")
        session.click(*SPOON, object_id="spoon")
        export = json.loads(json.dumps(session.export()))
    assert [one["object_id"] for one in export["rounds"]] == ["cup", "cup", "cup", "spoon"]
    assert all("masks" in one for one in export["rounds"])
    found = client.replay(export, PHOTO)
    assert found.identical
    assert [one.identical for one in found.rounds] == [True] * 4
    export["rounds"][3]["points"] = [TABLE]
    assert [one.revision for one in client.replay(export, PHOTO).different] == [export["rounds"][3]["revision"]]


# Ending, detaching, taking over


def test_a_finished_session_is_gone(gated: SegmentationClient) -> None:
    with gated.refine(PHOTO) as session:
        session.click(*CUP)
    with pytest.raises(NotFoundError) as gone, gated.resume(session.session_id, session.resume_token):
        pass
    assert gone.value.reason == "SESSION_NOT_FOUND"
    with pytest.raises(SessionClosedError):
        session.click(*CUP)
    assert [result.applied_seq for result in session] == [1]
    session.finish()


def test_a_session_that_was_left_goes_on_in_another_client(cheap: ServerProcess, gated: SegmentationClient) -> None:
    with suppress(ZeroDivisionError), gated.refine(PHOTO) as session:
        session.click(*CUP, object_id="cup")
        session.click(*TABLE, 0, object_id="cup")
        spoon = session.click(*SPOON, object_id="spoon")
        raise ZeroDivisionError
    with SegmentationClient(cheap.target) as other:
        with other.resume(session.session_id, session.resume_token) as resumed:
            arrived = [result.object_id for result in islice(resumed, 2)]
            assert sorted(arrived) == ["cup", "spoon"]
            np.testing.assert_array_equal(mask_of(resumed.result("spoon")), mask_of(spoon))
            assert resumed.image == session.image
            assert resumed.undo(object_id="cup").rounds == ()
            assert resumed.click(*CUP, 0, object_id="spoon").rounds[0].points == (SPOON, CUP)
            export = resumed.export()
        assert other.replay(export, PHOTO).identical


def test_a_session_that_is_taken_over_ends(cheap: ServerProcess, gated: SegmentationClient) -> None:
    with gated.refine(PHOTO) as session:
        session.click(*CUP)
        with (
            SegmentationClient(cheap.target) as other,
            other.resume(session.session_id, session.resume_token) as taken,
        ):
            with pytest.raises(SessionTakenError):
                list(session)
            with pytest.raises(SessionTakenError):
                session.click(*TABLE, 0)
            assert taken.click(*TABLE, 0).rounds[0].points == (CUP, TABLE)


def test_a_session_ends_with_its_client(cheap: ServerProcess) -> None:
    with SegmentationClient(cheap.target) as client:
        session = client.refine(PHOTO)
        session.open()
    with pytest.raises(SessionClosedError):
        session.finish()


# Broken connections


def test_an_answer_that_was_lost_arrives_over_the_next_connection(cheap: ServerProcess) -> None:
    with (
        TcpProxy(cheap.target) as proxy,
        SegmentationClient(proxy.target) as client,
        client.refine(PHOTO, return_logits=True) as session,
    ):
        first = session.click(*CUP)
        proxy.swallow_answers()
        seq = session.send(AddPoints([TABLE], [0]))
        proxy.wait_until_swallowed(RESULT_BYTES)
        with pytest.raises(DeadlineExceededError):
            session.wait(seq, timeout=0)
        proxy.cut()
        result = session.wait(seq)
        assert (result.revision, result.applied_seq) == (first.revision + 1, seq)
        assert result.rounds[0].points == (CUP, TABLE)
        assert session.undo().shown_revision == first.revision, "the edit was applied once"


def test_edits_of_a_time_without_network_are_sent_afterwards(cheap: ServerProcess) -> None:
    with (
        TcpProxy(cheap.target) as proxy,
        SegmentationClient(proxy.target) as client,
        client.refine(PHOTO, edit_policy="every_edit") as session,
    ):
        session.click(*CUP)
        proxy.cut(stay_down=True)
        seqs = [session.send(AddPoints([(x, 10)], [0])) for x in (10, 20, 30)]
        proxy.wait_until_refused(2)
        proxy.mend()
        session.wait(seqs[-1])
        assert [len(result.rounds[0].points) for result in session_until(session, seqs[-1])] == [1, 2, 3, 4]


def session_until(session: RefineSession, seq: int) -> Iterator[RefineResult]:
    for result in session:
        yield result
        if result.applied_seq >= seq:
            return


def test_the_connection_breaks_during_a_computation(gated_server: Gated, gate: Gate, gated: SegmentationClient) -> None:
    with (
        TcpProxy(gated_server.server.target) as proxy,
        SegmentationClient(proxy.target) as client,
        client.refine(PHOTO) as session,
    ):
        session.click(*CUP)
        gate.hold("decode")
        seqs = [session.send(AddPoints([TABLE], [0]))]
        gate.wait_until_held("decode")
        seqs.append(session.send(AddPoints([SPOON])))
        proxy.cut()
        seqs.append(session.send(AddPoints([(10, 10)])))
        gate.release("decode")
        for seq in seqs:
            session.wait(seq)
        shown = session.shown_round()
        assert shown is not None
        assert shown.points == (CUP, TABLE, SPOON, (10, 10))
        export = session.export()
    assert gated.replay(export, PHOTO).identical


def twelve_edits(session: RefineSession, before: Callable[[int], None]) -> dict[str, Any]:
    """Make the same edits each time, some without waiting; call ``before`` each of them with its number."""
    for i in range(12):
        before(i)
        seq = session.send(AddPoints([(10 + 10 * i, 50)], [i // 2 % 2], object_id=f"{i % 2}"))
        if i % 4 == 3:
            session.wait(seq)
    session.undo(2, object_id="0")
    session.click(10, 10, object_id="0")
    return session.export()


def test_a_session_over_a_bad_network_is_the_same_session(cheap: ServerProcess, gated: SegmentationClient) -> None:
    with gated.refine(PHOTO, edit_policy="every_edit") as session:
        expected = twelve_edits(session, lambda i: None)
    with (
        TcpProxy(cheap.target) as proxy,
        SegmentationClient(proxy.target) as other,
        other.refine(PHOTO, edit_policy="every_edit") as session,
    ):
        found = twelve_edits(session, lambda i: proxy.cut() if i % 2 else None)
    assert without_masks(found) == without_masks(expected)
    assert found["objects"] == expected["objects"]
    assert gated.replay(found, PHOTO).identical


def without_masks(export: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rounds but for the masks: those of a round that a newer one overtook while offline are not sent."""
    return [{name: value for name, value in one.items() if name != "masks"} for one in export["rounds"]]


def test_a_network_that_stays_broken_ends_the_session(cheap: ServerProcess) -> None:
    with (
        TcpProxy(cheap.target) as proxy,
        SegmentationClient(proxy.target) as client,
        client.refine(PHOTO, reconnect=0.2) as session,
    ):
        session.click(*CUP)
        proxy.cut(stay_down=True)
        with pytest.raises(UnavailableError):
            session.click(*TABLE, 0)


def test_a_server_that_was_started_anew_does_not_know_the_session(tmp_path: Path) -> None:
    with (
        ServerProcess(log=tmp_path / "log") as first,
        ServerProcess(log=tmp_path / "log") as second,
        TcpProxy(first.target) as proxy,
        SegmentationClient(proxy.target) as client,
        client.refine(PHOTO) as session,
    ):
        session.click(*CUP)
        proxy.lead_to(second.target)
        with pytest.raises(NotFoundError) as gone:
            session.click(*TABLE, 0)
        assert gone.value.reason == "SESSION_NOT_FOUND"


def test_a_server_that_shuts_down_says_so(tmp_path: Path) -> None:
    with (
        ServerProcess("--drain-seconds", "0.1", log=tmp_path / "log") as server,
        SegmentationClient(server.target) as client,
        client.refine(PHOTO, reconnect=0.1) as session,
    ):
        session.click(*CUP)
        assert session.draining is None
        server.terminate()
        with pytest.raises(UnavailableError):
            list(session)
        assert session.draining is not None


# asyncio


async def test_the_asyncio_client_does_the_same(server: ServerProcess) -> None:
    async with AsyncSegmentationClient(server.target) as client:
        async with client.refine(PHOTO, edit_policy="every_edit") as session:
            cup, spoon = await asyncio.gather(
                session.click(*CUP, object_id="cup"), session.click(*SPOON, object_id="spoon")
            )
            assert session.results == {"cup": cup, "spoon": spoon}
            last = session.send(AddPoints([TABLE], [0], object_id="cup"))
            async for result in session:
                if result.applied_seq == last:
                    break
            assert result.rounds[0].points == (CUP, TABLE)
            assert (await session.undo(object_id="cup")).shown_revision == cup.revision
            with pytest.raises(EditRejectedError):
                await session.click(9999, 1)
            export = session.export()
        assert (await client.replay(export, PHOTO)).identical
        with pytest.raises(NotFoundError):
            async with client.resume(session.session_id, session.resume_token):
                pass
    with SegmentationClient(server.target) as blocking:
        assert blocking.replay(export, PHOTO).identical


async def test_asyncio_sessions_are_left_and_taken_over(cheap: ServerProcess) -> None:
    async with AsyncSegmentationClient(cheap.target) as client, AsyncSegmentationClient(cheap.target) as other:
        with suppress(ZeroDivisionError):
            async with client.refine(PHOTO) as session:
                await session.click(*CUP)
                raise ZeroDivisionError
        async with client.resume(session.session_id, session.resume_token) as resumed:
            await resumed.click(*TABLE, 0)
            async with other.resume(session.session_id, session.resume_token) as taken:
                with pytest.raises(SessionTakenError):
                    async for _ in resumed:
                        pass
                assert (await taken.undo()).rounds == ()
        with pytest.raises(NotFoundError):
            async with client.refine(PHOTO, model="sam9"):
                pass


async def test_an_asyncio_session_over_a_bad_network(cheap: ServerProcess) -> None:
    with TcpProxy(cheap.target) as proxy:
        async with AsyncSegmentationClient(proxy.target) as client, client.refine(PHOTO, return_logits=True) as session:
            first = await session.click(*CUP)
            proxy.swallow_answers()
            seq = session.send(AddPoints([TABLE], [0]))
            await asyncio.to_thread(proxy.wait_until_swallowed, RESULT_BYTES)
            with pytest.raises(DeadlineExceededError):
                await session.wait(seq, timeout=0)
            proxy.cut(stay_down=True)
            await asyncio.to_thread(proxy.wait_until_refused, 1)
            later = session.send(AddPoints([SPOON]))
            proxy.mend()
            assert (await session.wait(seq)).rounds[-1].points[:2] == (CUP, TABLE)
            assert (await session.wait(later)).rounds[-1].points == (CUP, TABLE, SPOON)
            assert (await session.undo(2)).shown_revision == first.revision


async def test_an_asyncio_session_leaves_no_task_behind_where_its_connection_broke(cheap: ServerProcess) -> None:
    with TcpProxy(cheap.target) as proxy:
        async with AsyncSegmentationClient(proxy.target) as client, client.refine(PHOTO) as session:
            tasks = len(asyncio.all_tasks())
            for _ in range(5):
                await session.click(*CUP)
                proxy.cut()
            await session.click(*CUP)  # on the last of six streams
            assert len(asyncio.all_tasks()) == tasks


async def test_an_asyncio_session_ends_with_its_client(cheap: ServerProcess) -> None:
    async with AsyncSegmentationClient(cheap.target) as client:
        session = client.refine(PHOTO)
        await session.open()
    with pytest.raises(SessionClosedError):
        await session.finish()


async def test_an_asyncio_task_that_is_cancelled_leaves_the_session(cheap: ServerProcess) -> None:
    async with AsyncSegmentationClient(cheap.target) as client:
        opened = asyncio.get_running_loop().create_future()

        async def work() -> None:
            async with client.refine(PHOTO) as session:
                await session.click(*CUP)
                opened.set_result(session)
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        session = await opened
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with client.resume(session.session_id, session.resume_token) as resumed:
            assert (await resumed.undo()).mask is None
