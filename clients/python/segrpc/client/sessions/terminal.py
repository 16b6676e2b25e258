"""A session in a terminal, or in a pipe: a line in, a mask out."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from segrpc.client.errors import DeadlineExceededError, EditRejectedError
from segrpc.client.render import overlay
from segrpc.client.sessions.commands import HELP, Own, parse
from segrpc.client.sessions.edits import DEFAULT_OBJECT, Edit
from segrpc.client.sessions.sync import RefineSession
from segrpc.client.sessions.types import RefineResult
from segrpc.client.types import Mask


class Prompted(Protocol):
    """Anything that tells the prompts of a mask: a `Round`, or a `ReplayedRound`."""

    @property
    def points(self) -> Sequence[tuple[float, float]]:
        """``x, y`` in pixels."""

    @property
    def labels(self) -> Sequence[int]:
        """1 or 0 for each point."""

    @property
    def box(self) -> tuple[float, float, float, float] | None:
        """Edges in pixels."""


def picture(photo: Image.Image, shown: Sequence[tuple[Mask, Prompted]]) -> Image.Image:
    """Draw the masks of several objects over an image, with the prompts that led to them."""
    return overlay(
        photo,
        [mask for mask, _ in shown],
        points=[list(prompted.points) for _, prompted in shown],
        labels=[list(prompted.labels) for _, prompted in shown],
        boxes=[prompted.box for _, prompted in shown],
    )


def typed_lines(prompt: str) -> Iterator[str]:
    """Return the lines of standard input; on a terminal with a prompt and, where there is readline, with editing."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - `input` uses it once it is imported
    while True:
        try:
            yield input(prompt)
        except (EOFError, KeyboardInterrupt):
            return


class Terminal:
    """Reads commands, edits, and tells what came of it.

    Args:
        session: The session, open.
        photo: The image to draw on; None if it is not here.
        output: The picture to write after each step; None for none.
        as_json: Whether to print JSON, a line for each command.
    """

    def __init__(self, session: RefineSession, photo: Image.Image | None, output: Path | None, as_json: bool) -> None:
        self._session = session
        self._photo = photo
        self._output = output
        self._as_json = as_json
        self._object_id = DEFAULT_OBJECT

    def run(self, lines: Iterable[str]) -> bool:
        """Obey commands until ``quit`` or the end; return whether all went well.

        Raises:
            SegmentationError: If the session has ended; what is wrong with a single command is only printed.
        """
        all_well = True
        for line in lines:
            try:
                command = parse(line, self._object_id)
                if command == Own("quit"):
                    break
                if isinstance(command, Own):
                    self._own(command)
                elif command is not None:
                    self._edit(command)
            except (EditRejectedError, DeadlineExceededError, ValueError, OSError) as error:
                all_well = False
                self._complain(error)
        return all_well

    def _edit(self, edit: Edit) -> None:
        start = time.perf_counter()
        result = self._session.wait(self._session.send(edit))
        milliseconds = (time.perf_counter() - start) * 1e3
        if self._output is not None:
            self._save(self._output)
        self._say(_described(result, milliseconds), _as_json(result, milliseconds))

    def _own(self, command: Own) -> None:
        match command.what:
            case "object":
                self._object_id = command.argument
                self._say(f"object {self._object_id}", {"object_id": self._object_id})
            case "save":
                self._save(Path(command.argument))
                self._say(f"wrote {command.argument}", {"saved": command.argument})
            case "help":
                self._say(HELP, {"help": HELP})

    def _save(self, file: Path) -> None:
        if self._photo is None:
            raise ValueError("the image is not a file here, so that there is nothing to draw on")
        shown = []
        for object_id, result in self._session.results.items():
            prompted = self._session.shown_round(object_id)
            if result.mask is not None and prompted is not None:
                shown.append((result.mask, prompted))
        picture(self._photo, shown).save(file)

    def _say(self, text: str, values: dict[str, Any]) -> None:
        sys.stdout.write((json.dumps(values) if self._as_json else text) + "\n")
        sys.stdout.flush()

    def _complain(self, error: Exception) -> None:
        violations = error.violations if isinstance(error, EditRejectedError) else ()
        if self._as_json:
            reason = error.reason if isinstance(error, EditRejectedError) else ""
            fields = [{"field": violation.field, "description": violation.description} for violation in violations]
            self._say("", {"error": str(error), "reason": reason, "violations": fields})
            return
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()


def _described(result: RefineResult, milliseconds: float) -> str:
    head = f"object {result.object_id}: "
    if result.mask is None:
        return f"{head}no prompts, {milliseconds:.0f} ms"
    text = f"{head}score {result.mask.score:.3f}, {result.mask.area} px, {milliseconds:.0f} ms"
    if len(result.prediction.masks) == 1:
        return text
    candidates = [
        f"  {'*' if i == result.selected else ' '} {i}: score {mask.score:.3f}, {mask.area} px"
        for i, mask in enumerate(result.prediction.masks)
    ]
    return "\n".join([text, *candidates])


def _as_json(result: RefineResult, milliseconds: float) -> dict[str, Any]:
    return {
        "object_id": result.object_id,
        "revision": result.revision,
        "shown_revision": result.shown_revision,
        "score": None if result.mask is None else result.mask.score,
        "area": None if result.mask is None else result.mask.area,
        "selected": result.selected,
        "scores": result.prediction.scores,
        "computed": bool(result.rounds),
        "latency_ms": round(milliseconds, 3),
    }
