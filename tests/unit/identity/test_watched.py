import logging
from pathlib import Path

import pytest

from segrpc.service.identity.watched import Watched


def write(file: Path, text: str) -> None:
    """Replace a file at once, as a careful operator does: it gets another inode."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "file"
    write(file, "1")
    return file


def watch(file: Path) -> Watched[int]:
    return Watched([file], lambda: int(file.read_text()))


def test_a_change_is_read(file: Path) -> None:
    watched = watch(file)
    assert watched.get() == 1
    write(file, "2")
    assert watched.get() == 2


def test_what_did_not_change_is_not_read_again(file: Path) -> None:
    reads: list[int] = []
    watched = Watched([file], lambda: reads.append(1))
    watched.get()
    watched.get()
    assert len(reads) == 1


@pytest.mark.parametrize("broken", ["x", None])
def test_a_broken_change_keeps_the_old_value_and_is_logged_once(
    file: Path, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch(file)
    if broken is None:
        file.unlink()
    else:
        write(file, broken)
    with caplog.at_level(logging.ERROR):
        assert [watched.get(), watched.get()] == [1, 1]
    (record,) = caplog.records
    assert str(file) in record.getMessage()
    write(file, "3")
    assert watched.get() == 3


def test_a_link_that_points_elsewhere_is_a_change(tmp_path: Path) -> None:
    old, new, link = tmp_path / "old", tmp_path / "new", tmp_path / "link"
    old.write_text("1")
    new.write_text("2")
    link.symlink_to(old)
    watched = watch(link)
    link.unlink()
    link.symlink_to(new)
    assert watched.get() == 2


def test_the_first_reading_must_succeed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        watch(tmp_path / "nothing")
