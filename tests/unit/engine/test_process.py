"""Worker processes: what happens when they end, and what they are kept from."""

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from segrpc.service.engine import child, process
from segrpc.service.engine.base import CancelToken, Engine, EngineOptions
from segrpc.service.engine.factory import create_engine
from segrpc.service.errors import DeadlineError, ModelLoadError, WorkerUnavailableError
from segrpc.service.schemas import ModelDeploymentConfig
from tests.unit.engine.conftest import ask, click, encoding, picture, running
from tests.unit.engine.gates import Gate, embeds

A, B = picture(1), picture(2)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    async with running("process", tmp_path, "held") as started:
        yield started


def kill(engine: Engine) -> int:
    """Kill the worker, as the system does when memory runs out."""
    (pid,) = engine.stats().worker_pids
    os.kill(pid, signal.SIGKILL)
    return pid


async def test_the_models_run_in_another_process(engine: Engine, tmp_path: Path) -> None:
    await ask(engine, A)
    (pid,) = engine.stats().worker_pids
    assert pid != os.getpid()
    assert (tmp_path / "log").read_text().splitlines()[0] == f"embed {pid}"


async def test_a_worker_that_is_killed_while_idle_is_replaced(engine: Engine, tmp_path: Path) -> None:
    before = await ask(engine, A)
    pid = kill(engine)
    after = await ask(engine, A)
    stats = engine.stats()
    assert after.output == before.output
    assert stats.worker_pids != (pid,)
    assert (stats.worker_restarts, embeds(tmp_path)) == (1, 2)


@pytest.mark.parametrize("stage", ["embed", "decode"])
async def test_work_in_progress_is_done_again_by_the_next_worker(engine: Engine, tmp_path: Path, stage: str) -> None:
    expected = await ask(engine, A)
    other = await ask(engine, B, 90.0)
    kill(engine)
    await engine.encode(encoding(B), CancelToken())  # by the new worker, so that only A is to be encoded
    gate = Gate(tmp_path, stage)
    asked = asyncio.create_task(ask(engine, A))
    await gate.reached()
    beside = asyncio.create_task(ask(engine, B, 90.0))
    kill(engine)
    await gate.reached()
    await gate.open()
    assert (await asked).output == expected.output
    assert (await beside).output == other.output
    assert engine.stats().worker_restarts == 2


async def test_work_that_ends_two_workers_is_given_up(engine: Engine, tmp_path: Path) -> None:
    gate = Gate(tmp_path, "embed")
    asked = asyncio.create_task(ask(engine, A))
    for _ in range(2):
        await gate.reached()
        kill(engine)
    with pytest.raises(WorkerUnavailableError, match="ended 2 times") as caught:
        await asked
    assert caught.value.retry_after is not None
    assert caught.value.retry_after > 0
    again = asyncio.create_task(ask(engine, A))
    await gate.reached()
    await gate.open()
    assert len((await again).output.masks) == 1


@pytest.mark.parametrize("stage", ["embed", "decode"])
async def test_a_worker_that_is_stuck_is_replaced(
    tmp_path: Path, stage: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    async with running("process", tmp_path, "held", hang_seconds=2.0) as engine:
        gate = Gate(tmp_path, stage)
        asked = asyncio.create_task(ask(engine, A))
        await gate.reached()
        gate.leave()
        answer = await asked
        assert engine.stats().worker_restarts == 1
        assert answer.output == (await ask(engine, A)).output
    assert f"its thread '{'encode' if stage == 'embed' else 'decode'}' has given none for 2 s" in caplog.text
    assert f"in {stage}\n" in capfd.readouterr().err  # a line of a traceback


@pytest.fixture
def unkillable(monkeypatch: pytest.MonkeyPatch) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """The processes that were killed in vain, as those that wait in a driver: no test can make the system do that."""
    killed: list[subprocess.Popen[bytes]] = []
    with monkeypatch.context() as patch:
        patch.setattr(child, "KILL_SECONDS", 0.2)
        patch.setattr(subprocess.Popen, "kill", lambda one: killed.append(one))
        yield killed
    for one in killed:
        one.kill()
        one.wait()


async def test_a_worker_that_not_even_a_kill_ends_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, unkillable: list["subprocess.Popen[bytes]"]
) -> None:
    async with running("process", tmp_path, "held", hang_seconds=2.0) as engine:
        before = await ask(engine, A)
        (pid,) = engine.stats().worker_pids
        os.kill(pid, signal.SIGSTOP)
        assert (await ask(engine, A)).output == before.output
        stats = engine.stats()
        assert stats.worker_restarts == 1
        assert stats.worker_pids != (pid,)
    assert f"worker {pid} has not ended 0.2 s after it was killed" in caplog.text
    assert f"worker {pid} cannot be ended; another one is started" in caplog.text
    assert unkillable[0].pid == pid
    assert unkillable[0].poll() is None


async def test_an_engine_stops_though_not_even_a_kill_ends_its_worker(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    unkillable: list["subprocess.Popen[bytes]"],
) -> None:
    monkeypatch.setattr(child, "STOP_SECONDS", 0.2)
    async with running("process", tmp_path, "held") as engine:
        os.kill(engine.stats().worker_pids[0], signal.SIGSTOP)
    assert "has not ended 0.2 s after it was killed" in caplog.text
    assert [one.poll() for one in unkillable] == [None]


async def test_a_worker_that_is_never_done_with_loading(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(child, "_COMMAND", (sys.executable, "-c", "import signal; signal.pause()"))
    monkeypatch.setattr(child, "LOAD_SECONDS", 0.5)
    engine = create_engine("process", EngineOptions((ModelDeploymentConfig(name="held"),), hang_seconds=0.1))
    with pytest.raises(ModelLoadError, match="while it loaded the models"):
        await engine.start()
    await engine.stop()
    assert "has not loaded its models within 0.5 s" in caplog.text


async def test_who_waits_for_a_worker_waits_no_longer_than_the_token(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "unloadable").touch()
    kill(engine)
    token = CancelToken()
    waiting = asyncio.create_task(engine.segment(click(A), token))
    await asyncio.sleep(0)
    token.cancel()
    with pytest.raises(DeadlineError):
        await waiting
    with pytest.raises(DeadlineError, match="deadline passed"):
        await engine.segment(click(A), CancelToken(0.2))


async def test_a_worker_that_cannot_be_started_again(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    troubles = engine.troubles()
    assert await anext(troubles) == ()
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.5)
    (tmp_path / "unloadable").touch()
    kill(engine)
    waiting = [asyncio.create_task(ask(engine, A)) for _ in range(2)]
    (trouble,) = await anext(troubles)
    assert "could be started for 0.5 s" in trouble
    for one in waiting:
        with pytest.raises(WorkerUnavailableError, match="could be started"):
            await one
    # Who comes now does not wait.
    with pytest.raises(WorkerUnavailableError, match="could be started") as caught:
        await asyncio.wait_for(ask(engine, A), 0.1)
    assert caught.value.retry_after
    (tmp_path / "unloadable").unlink()
    assert await anext(troubles) == ()
    assert len((await ask(engine, A)).output.masks) == 1
    assert engine.stats().worker_restarts == 1


async def test_workers_that_end_before_they_answer_anything(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "BARREN_LIVES", 2)
    troubles = engine.troubles()
    assert await anext(troubles) == ()
    gate = Gate(tmp_path, "embed")
    asked = asyncio.create_task(ask(engine, A))
    for _ in range(2):
        await gate.reached()
        kill(engine)
    (trouble,) = await anext(troubles)
    assert "2 worker processes in a row ended before they answered anything" in trouble
    with pytest.raises(WorkerUnavailableError, match="in a row"):
        await asyncio.wait_for(ask(engine, B), 0.1)
    with pytest.raises(WorkerUnavailableError):
        await asked
    # The next worker answers a prompt of the server's own before it takes those of others.
    await gate.reached()
    assert engine.stats().worker_pids == ()
    await gate.open()
    assert await anext(troubles) == ()
    assert engine.stats().encodes == 0
    assert len((await ask(engine, A)).output.masks) == 1


async def test_workers_that_answered_are_replaced_as_often_as_it_takes(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "BARREN_LIVES", 1)
    for _ in range(3):
        await ask(engine, A)
        kill(engine)
    assert len((await ask(engine, A)).output.masks) == 1
    assert engine.stats().worker_restarts == 3


async def test_a_worker_that_ends_while_it_loads_is_an_error_of_loading() -> None:
    engine = create_engine("process", EngineOptions((ModelDeploymentConfig(name="exiting"),)))
    with pytest.raises(ModelLoadError, match="ended with status 5 while it loaded the models"):
        await engine.start()
    await engine.stop()


_CLOSES_ONE_SOCKET_FIRST = """
import os, socket, sys
os.close(int(sys.argv[2]))  # the front can notice this while the modules are imported
from segrpc.service.engine.messages import Failed
from segrpc.service.engine.wire import Connection
from segrpc.service.errors import ModelLoadError
Connection(socket.socket(fileno=int(sys.argv[1]))).send(Failed(ModelLoadError("said last")))
"""


async def test_the_last_message_counts_although_another_socket_closed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_COMMAND", (sys.executable, "-c", _CLOSES_ONE_SOCKET_FIRST))
    engine = create_engine("process", EngineOptions((ModelDeploymentConfig(name="held"),)))
    with pytest.raises(ModelLoadError, match="said last"):
        await engine.start()
    await engine.stop()


async def test_signals_to_the_whole_group_leave_the_worker_alone(engine: Engine) -> None:
    (pid,) = engine.stats().worker_pids
    assert os.getpgid(pid) != os.getpgid(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert len((await ask(engine, A)).output.masks) == 1
    assert engine.stats().worker_pids == (pid,)


async def test_each_device_has_its_worker_and_its_share_of_the_images(tmp_path: Path) -> None:
    images = [picture(20 + i) for i in range(12)]
    async with running("process", tmp_path, "held", devices=("cpu", "cpu")) as engine:
        for _ in range(2):
            await asyncio.gather(*(ask(engine, image) for image in images))
        pids = engine.stats().worker_pids
        assert engine.stats().cached_embeddings == embeds(tmp_path) == len(images)
    encoded_by = [int(line.split()[1]) for line in (tmp_path / "log").read_text().splitlines() if "embed" in line]
    assert len(set(pids)) == 2
    assert set(encoded_by) == set(pids)


async def test_a_large_image_goes_there_and_back_whole(engine: Engine) -> None:
    large = picture(3, 3000, 2500)  # 22 MB
    result = await ask(engine, large, 120.0)
    assert result.output.masks[0][0].size == (2500, 3000)


SERVER = """
import asyncio, sys
from pathlib import Path
from tests.unit.engine.conftest import ask, picture, running

async def main():
    async with running("process", Path(sys.argv[1]), "held") as engine:
        print(*engine.stats().worker_pids, flush=True)
        await ask(engine, picture(1))

asyncio.run(main())
"""


@pytest.mark.parametrize("busy", [False, True])
async def test_a_worker_ends_with_its_server(tmp_path: Path, busy: bool) -> None:
    gate = Gate(tmp_path, "embed")
    command = [sys.executable, "-c", SERVER, str(tmp_path)]
    with await asyncio.to_thread(subprocess.Popen, command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        worker = os.pidfd_open(int(await asyncio.to_thread(server.stdout.readline)))
        try:
            if busy:
                await gate.reached()
            server.kill()
            ended, _, _ = await asyncio.to_thread(select.select, [worker], [], [], 30)
            assert ended
        finally:
            os.close(worker)
