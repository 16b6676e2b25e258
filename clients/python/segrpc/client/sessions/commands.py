"""The commands of a terminal session: a line becomes an edit, or something that the terminal does by itself."""

import re
from dataclasses import dataclass
from typing import Literal

from segrpc.client.sessions import edits

HELP = """\
  X,Y  or  + X,Y     a click on the object, in pixels
  - X,Y              a click on the background
  box X0,Y0,X1,Y1    set the box; clear-box removes it
  pick N             go on from candidate N
  undo [N], redo [N] go back and forward; reset forgets all prompts
  object NAME        work on another object
  save FILE          write the masks over the image
  help, quit"""

_CLICK = re.compile(r"([+-]?)\s*([^\s,+-][^,]*),([^,]*)")


@dataclass(frozen=True, slots=True)
class Own:
    """What the terminal does by itself.

    Attributes:
        what: Which of these.
        argument: The object's name, or the file.
    """

    what: Literal["object", "save", "help", "quit"]
    argument: str = ""


def parse(line: str, object_id: str) -> edits.Edit | Own | None:
    """Read a line.

    Args:
        line: What was typed.
        object_id: The object that edits are for.

    Returns:
        The command; None for an empty line or a comment (``#``).

    Raises:
        ValueError: If it is no command; the text says what would be one.
    """
    line = line.strip()
    if not line or line.startswith("#"):
        return None
    click = _CLICK.fullmatch(line)
    if click and not line[0].isalpha():
        sign, x, y = click.groups()
        return edits.AddPoints([(_number(x), _number(y))], [0 if sign == "-" else 1], object_id=object_id)
    word, _, rest = line.partition(" ")
    return _command(word.lower(), rest.strip(), object_id)


def _command(word: str, rest: str, object_id: str) -> edits.Edit | Own:
    match word, rest:
        case "box", _ if rest.count(",") == 3:
            x_min, y_min, x_max, y_max = (_number(corner) for corner in rest.split(","))
            return edits.SetBox(x_min, y_min, x_max, y_max, object_id=object_id)
        case "clear-box", "":
            return edits.ClearBox(object_id=object_id)
        case "pick", _ if rest:
            return edits.SelectMask(_whole(rest), object_id=object_id)
        case "undo", _:
            return edits.Undo(_whole(rest or "1"), object_id=object_id)
        case "redo", _:
            return edits.Redo(_whole(rest or "1"), object_id=object_id)
        case "reset", "":
            return edits.Reset(object_id=object_id)
        case ("object" | "save") as own, _ if rest:
            return Own(own, rest)
        case ("help" | "quit") as own, "":
            return Own(own)
    raise ValueError(f"not a command: {f'{word} {rest}'.strip()!r}; help lists them")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text.strip()!r} is no number") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is no whole number") from None
