"""The lines of a terminal session."""

from typing import Any

import pytest

from segrpc.client import AddPoints, ClearBox, Redo, Reset, SelectMask, SetBox, Undo
from segrpc.client.sessions.commands import Own, parse


@pytest.mark.parametrize("line", ["3,4", "+3,4", "+ 3,4", " 3 , 4 ", "3.0,4"])
def test_a_click_on_the_object(line: str) -> None:
    edit = parse(line, "cup")
    assert isinstance(edit, AddPoints)
    assert (edit.points, edit.labels, edit.object_id) == ([(3, 4)], [1], "cup")


@pytest.mark.parametrize("line", ["-3,4", "- 3,4"])
def test_a_click_on_the_background(line: str) -> None:
    edit = parse(line, "cup")
    assert isinstance(edit, AddPoints)
    assert (edit.points, edit.labels) == ([(3, 4)], [0])


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("box 1,2,3,4.5", SetBox(1, 2, 3, 4.5, object_id="cup")),
        ("BOX 1, 2, 3, 4", SetBox(1, 2, 3, 4, object_id="cup")),
        ("clear-box", ClearBox(object_id="cup")),
        ("pick 2", SelectMask(2, object_id="cup")),
        ("undo", Undo(object_id="cup")),
        ("undo 3", Undo(3, object_id="cup")),
        ("redo", Redo(object_id="cup")),
        ("redo 2", Redo(2, object_id="cup")),
        ("reset", Reset(object_id="cup")),
        ("object left eye", Own("object", "left eye")),
        ("save a,b.png", Own("save", "a,b.png")),
        ("help", Own("help")),
        ("quit\n", Own("quit")),
        ("", None),
        ("  # a comment", None),
    ],
)
def test_commands(line: str, command: Any) -> None:
    assert parse(line, "cup") == command


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("jump", "'jump'; help"),
        ("1", "'1'; help"),
        ("1,2,3", "'1,2,3'; help"),
        ("1,x", "'x' is no number"),
        ("box 1,2,3", "'box 1,2,3'; help"),
        ("box 1,2,3,x", "'x' is no number"),
        ("pick", "'pick'; help"),
        ("pick x", "whole number"),
        ("undo 1.5", "whole number"),
        ("object", "'object'; help"),
        ("quit now", "'quit now'; help"),
    ],
)
def test_what_is_no_command(line: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(line, "cup")
