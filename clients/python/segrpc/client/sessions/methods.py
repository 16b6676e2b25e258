"""The methods that both kinds of session have."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from segrpc.client.errors import EditRejectedError, SessionClosedError
from segrpc.client.sessions import edits
from segrpc.client.sessions.edits import DEFAULT_OBJECT, Edit
from segrpc.client.sessions.state import SessionState
from segrpc.client.sessions.types import RefineResult, Round
from segrpc.client.types import ImageInfo
from segrpc.v1.refine_pb2 import RefineRequest

DETACH_SECONDS = 5.0  # for the server to end the stream after the last edit reached it

Answer_co = TypeVar("Answer_co", covariant=True)  # a RefineResult, or a coroutine that returns one


class BaseSession(ABC, Generic[Answer_co]):
    """What a person does in a session.

    `click` and its neighbours return the `RefineResult` that reflects the edit, or a newer one of the same object. They
    raise `EditRejectedError` if the edit was wrong (the session goes on), `DeadlineExceededError` after the timeout
    (the edit stays sent), ValueError if shapes do not fit, and another `SegmentationError` when the session has ended.
    While the connection is broken they wait: the session is resumed by itself, and nothing is lost.

    Args:
        state: The session.
        guard: Held while the state is looked at or changed.
    """

    def __init__(self, state: SessionState, guard: AbstractContextManager[Any]) -> None:
        self._state = state
        self._guard = guard

    # What is known

    @property
    def image(self) -> ImageInfo:
        """The image; raises `SessionClosedError` before the session is open."""
        if self._state.image is None:
            raise SessionClosedError("the session is not open: use it in a with statement")
        return self._state.image

    @property
    def session_id(self) -> str:
        """The server's name for the session, for `resume`."""
        return self._state.session_id

    @property
    def resume_token(self) -> str:
        """The secret for `resume`."""
        return self._state.resume_token

    @property
    def expire_time(self) -> datetime | None:
        """When the session expires if nothing more happens, as of its opening; in UTC."""
        return self._state.expire_time

    @property
    def draining(self) -> datetime | None:
        """When the server will close the stream because it is shutting down; None if it is not."""
        return self._state.draining

    @property
    def results(self) -> Mapping[str, RefineResult]:
        """The newest result of each object."""
        with self._guard:
            return dict(self._state.ledger.latest)

    @property
    def rejections(self) -> Mapping[int, EditRejectedError]:
        """The edits that were rejected, by number."""
        return MappingProxyType(self._state.ledger.rejections)

    def result(self, object_id: str = DEFAULT_OBJECT) -> RefineResult | None:
        """Return the newest result of an object; None if there is none."""
        return self._state.ledger.latest.get(object_id)

    def shown_round(self, object_id: str = DEFAULT_OBJECT) -> Round | None:
        """Return the round whose masks the newest result shows: the prompts behind them; None without masks."""
        with self._guard:
            newest = self._state.ledger.latest.get(object_id)
            return None if newest is None else self._state.ledger.history.rounds.get(newest.shown_revision)

    def export(self) -> dict[str, Any]:
        """Return what was computed as values of JSON, fit for `replay`.

        ::

            {"format": "segrpc-session", "version": 1, "image": {"digest", "width", "height"}, "model", "options",
             "rounds": [{"revision", "object_id", "points": [[x, y]], "labels", "box": [4] or null,
                         "mask": null, {"revision", "index"} or {"logits": base64 of float32, "shape"},
                         "multimask_output", "point_ids", "masks": [{"counts", "size", "score"}]}],
             "objects": {object_id: {"shown_revision", "selected"}}}

        A round whose masks were never sent (a newer one overtook it) has no ``masks``. A mask input that another
        process set, before the session was resumed here, is ``{"seq"}``; such a round cannot be replayed.
        """
        with self._guard:
            return self._state.ledger.history.export(
                self.image, self._state.model, self._state.options, self._state.ledger.latest
            )

    # Without waiting

    def send(self, edit: Edit) -> int:
        """Send an edit and return its number, for `wait`; the result also comes to who iterates over the session."""
        with self._guard:
            seq = self._state.submit(edit)
            self._flush()
            return seq

    def cancel(self, through_seq: int | None = None) -> None:
        """Drop edits that have not been computed, up to a number or all; each is rejected, reason ``CANCELLED``."""
        with self._guard:
            self._state.cancel(through_seq)
            self._flush()

    # Edits

    def click(
        self,
        x: float,
        y: float,
        label: int = 1,
        *,
        object_id: str = DEFAULT_OBJECT,
        point_id: str | None = None,
        timeout: float | None = None,
    ) -> Answer_co:
        """Add one click: pixels from the left and the top edge, label 1 (on the object) or 0 (off it)."""
        ids = () if point_id is None else (point_id,)
        return self._edit(edits.AddPoints([(x, y)], [label], ids, object_id=object_id), timeout)

    def add_points(
        self,
        points: Any,
        labels: Any = None,
        point_ids: Any = (),
        *,
        object_id: str = DEFAULT_OBJECT,
        timeout: float | None = None,
    ) -> Answer_co:
        """Add clicks: ``[num_points, 2]``, with labels and names for each (see `AddPoints`)."""
        return self._edit(edits.AddPoints(points, labels, point_ids, object_id=object_id), timeout)

    def move_point(
        self, point_id: str, x: float, y: float, *, object_id: str = DEFAULT_OBJECT, timeout: float | None = None
    ) -> Answer_co:
        """Move a click that has a name."""
        return self._edit(edits.MovePoint(point_id, x, y, object_id=object_id), timeout)

    def remove_point(
        self, point_id: str, *, object_id: str = DEFAULT_OBJECT, timeout: float | None = None
    ) -> Answer_co:
        """Remove a click that has a name."""
        return self._edit(edits.RemovePoint(point_id, object_id=object_id), timeout)

    def box(
        self,
        x_min: float,
        y_min: float,
        x_max: float,
        y_max: float,
        *,
        object_id: str = DEFAULT_OBJECT,
        timeout: float | None = None,
    ) -> Answer_co:
        """Set or replace the box around the object, edges in pixels."""
        return self._edit(edits.SetBox(x_min, y_min, x_max, y_max, object_id=object_id), timeout)

    def clear_box(self, *, object_id: str = DEFAULT_OBJECT, timeout: float | None = None) -> Answer_co:
        """Remove the box."""
        return self._edit(edits.ClearBox(object_id=object_id), timeout)

    def set_mask(self, logits: Any, *, object_id: str = DEFAULT_OBJECT, timeout: float | None = None) -> Answer_co:
        """Start the next round from logits, ``[256, 256]`` or ``[1, 256, 256]``."""
        return self._edit(edits.SetMask(logits, object_id=object_id), timeout)

    def select(self, index: int, *, object_id: str = DEFAULT_OBJECT, timeout: float | None = None) -> Answer_co:
        """Choose the candidate that the next round starts from."""
        return self._edit(edits.SelectMask(index, object_id=object_id), timeout)

    def undo(self, steps: int = 1, *, object_id: str = DEFAULT_OBJECT, timeout: float | None = None) -> Answer_co:
        """Go back in the object's history; nothing is computed."""
        return self._edit(edits.Undo(steps, object_id=object_id), timeout)

    def redo(self, steps: int = 1, *, object_id: str = DEFAULT_OBJECT, timeout: float | None = None) -> Answer_co:
        """Take back what was undone; nothing is computed."""
        return self._edit(edits.Redo(steps, object_id=object_id), timeout)

    def reset(self, *, object_id: str = DEFAULT_OBJECT, timeout: float | None = None) -> Answer_co:
        """Forget all prompts of the object; can be undone."""
        return self._edit(edits.Reset(object_id=object_id), timeout)

    # What the drivers add

    @abstractmethod
    def wait(self, seq: int, timeout: float | None = None) -> Answer_co:
        """Wait for the result that reflects an edit, given the number that `send` returned."""

    def _edit(self, edit: Edit, timeout: float | None) -> Answer_co:
        return self.wait(self.send(edit), timeout)

    def _flush(self) -> None:
        for message in self._state.take_messages():
            self._post(message)

    @abstractmethod
    def _post(self, message: RefineRequest) -> None:
        """Queue a message for the stream."""
