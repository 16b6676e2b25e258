"""``segrpc refine`` and ``segrpc replay`` as processes, against a real server."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.photos import photo_path
from tests.server_process import ServerProcess

PHOTO = str(photo_path("chelsea"))  # 451 x 300 pixels


def run(server: ServerProcess, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "segrpc.client.cli", *arguments]
    environment = {**os.environ, "SEGRPC_SERVER": server.target}
    return subprocess.run(
        command, input=typed, capture_output=True, text=True, timeout=120, env=environment, check=False
    )


def lines_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def pixels(file: Path | str) -> np.ndarray[Any, Any]:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def exported(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session of two objects, with an undone round, and its last picture beside it."""
    folder = tmp_path_factory.mktemp("exported")
    typed = "200,150\n- 30,30\nundo\nbox 10,5,390,295\nobject nose\n220,180\n"
    options = ["--output", str(folder / "picture.png"), "--export", str(folder / "session.json")]
    done = run(server, "refine", PHOTO, *options, typed=typed)
    assert done.returncode == 0, done.stderr
    return folder / "session.json"


def test_a_session_in_a_pipe(server: ServerProcess, tmp_path: Path) -> None:
    picture, other = tmp_path / "picture.png", tmp_path / "other.png"
    typed = f"200,150\n# a comment\n\nsave {other}\npick 0\n- 30,30\nundo 2\nredo\nclear-box\nreset\nhelp\nquit\n9,9\n"
    done = run(server, "refine", PHOTO, "--output", str(picture), "--policy", "every_edit", typed=typed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("score") > 3
    assert " * " in done.stdout
    assert f"wrote {other}" in done.stdout
    assert "object 1: no prompts" in done.stdout
    assert "undo [N]" in done.stdout
    np.testing.assert_array_equal(pixels(picture), pixels(PHOTO))  # after `reset` there is nothing to draw
    assert np.any(pixels(other) != pixels(PHOTO))


def test_a_session_for_programs(server: ServerProcess) -> None:
    typed = "200,150\n9999,1\nnonsense\nobject b\nbox 10,5,390,295\n+ 20,20\nundo\n"
    done = run(server, "refine", PHOTO, "--json", "--single", typed=typed)
    first, wrong, unknown, named, boxed, second, undone = lines_of(done)
    assert done.returncode == 1
    assert (first["object_id"], len(first["scores"]), first["computed"]) == ("1", 1, True)
    assert first["area"] > 0
    assert first["latency_ms"] > 0
    assert wrong["reason"] == "INVALID_FIELD"
    assert wrong["violations"][0]["field"] == "edit.add_points.points[0].x"
    assert "not a command" in unknown["error"]
    assert named == {"object_id": "b"}
    assert boxed["object_id"] == "b"
    assert (undone["shown_revision"], undone["computed"]) == (boxed["revision"], False)
    assert (undone["score"], undone["area"]) == (boxed["score"], boxed["area"])
    assert second["revision"] == undone["revision"] - 1


def test_what_is_wrong_is_said_and_the_session_goes_on(server: ServerProcess) -> None:
    done = run(server, "refine", PHOTO, typed="9999,1\nundo\npick x\nsave /no/such/folder/x.png\n200,150\n")
    assert done.returncode == 1
    for said in ("edit.add_points.points[0].x", "nothing to undo", "whole number", "/no/such/folder"):
        assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "score" in done.stdout


def test_on_a_terminal(server: ServerProcess) -> None:
    mine, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "segrpc.client.cli", "refine", PHOTO],
        stdin=its,
        stdout=its,
        stderr=its,
        env={**os.environ, "SEGRPC_SERVER": server.target, "TERM": "dumb"},
    )
    os.close(its)
    try:
        assert "451 x 300 pixels" in read_until(mine, "segrpc> ")
        os.write(mine, b"200,150\n")
        assert "object 1: score" in read_until(mine, "segrpc> ")
        os.write(mine, b"\x04")  # the end of the file
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(mine)


def read_until(terminal: int, end: str) -> str:
    text = ""
    while not text.endswith(end):
        text += os.read(terminal, 4096).decode()
    return text


def test_replaying(server: ServerProcess, exported: Path, tmp_path: Path) -> None:
    picture = tmp_path / "again.png"
    done = run(server, "replay", str(exported), PHOTO, "--output", str(picture))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": identical") == 4
    assert "4 of 4" in done.stdout
    np.testing.assert_array_equal(pixels(picture), pixels(exported.parent / "picture.png"))


def test_replaying_tells_differences(server: ServerProcess, exported: Path, tmp_path: Path) -> None:
    export = json.loads(exported.read_text())
    export["rounds"][1]["masks"][0]["score"] = 0.123
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(export))
    done = run(server, "replay", str(changed), PHOTO)
    assert done.returncode == 1
    assert f"revision {export['rounds'][1]['revision']}: DIFFERENT" in done.stdout
    assert "3 of 4" in done.stdout
    told = lines_of(run(server, "replay", str(changed), PHOTO, "--json"))[0]
    assert not told["identical"]
    assert told["same_image"]
    assert [one["identical"] for one in told["rounds"]] == [True, False, True, True]


def test_replaying_over_a_copy_of_the_image(server: ServerProcess, exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.png"
    with Image.open(PHOTO) as photo:
        photo.save(copy)
    done = run(server, "replay", str(exported), str(copy))
    assert done.returncode == 0, done.stderr
    assert "another file" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["refine", "no-such-file.jpg"], 2, "no-such-file.jpg"),
        (["refine", "file:///etc/passwd"], 1, "URI_NOT_ALLOWED"),
        (["refine", "file:///a.jpg", "--output", "x.png"], 2, "drawn"),
        (["refine", PHOTO, "--model", "sam9"], 1, "MODEL_NOT_FOUND"),
        (["refine", PHOTO, "--policy", "some"], 2, "--policy"),
        (["replay", PHOTO, PHOTO], 2, "segrpc: "),
        (["replay", __file__, PHOTO], 2, "segrpc: "),
        (["replay", "no-such-file.json", PHOTO], 2, "no-such-file.json"),
        (["refine", PHOTO, "--server", "127.0.0.1:9"], 1, "UNAVAILABLE"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(
    server: ServerProcess, arguments: list[str], status: int, said: str
) -> None:
    done = run(server, *arguments)
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_replaying_over_another_image(server: ServerProcess, exported: Path) -> None:
    done = run(server, "replay", str(exported), str(photo_path("coffee")))
    assert done.returncode == 2
    assert "600 x 400" in done.stderr
