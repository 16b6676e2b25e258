"""Which edits were sent, and what came of them."""

from collections import deque
from collections.abc import Iterator

from segrpc.client.codec import tensor_array
from segrpc.client.errors import EditRejectedError
from segrpc.client.sessions.history import History
from segrpc.client.sessions.types import RefineResult
from segrpc.v1 import refine_pb2

UNREAD_RESULTS = 1000


class Ledger:
    """Edits by number, the results of each object, and what is to be sent again after the connection broke.

    Args:
        keep_all: Whether every result is kept until it is taken; otherwise the newest of each object.

    Attributes:
        latest: The newest result of each object.
        rejections: The edits that were rejected.
        history: What was computed.
        complete: The revision up to which no result is missing: where to resume.
        progress: Whether an edit was answered on this stream.
    """

    def __init__(self, *, keep_all: bool) -> None:
        self.latest: dict[str, RefineResult] = {}
        self.rejections: dict[int, EditRejectedError] = {}
        self.history = History()
        self.complete = 0
        self.progress = False
        self._keep_all = keep_all
        self._last_seq = 0
        self._log: dict[int, refine_pb2.RefineRequest] = {}  # edits that the server may not have applied
        self._objects: dict[int, str] = {}  # the object of every edit
        self._unanswered: dict[int, str] = {}  # edits without a result or rejection, and their objects
        self._cancelled_through = 0
        self._newest = 0  # the newest revision of any result
        self._sent_again = 0  # the newest edit whose answer the server may be sending again on this stream
        self._unread: deque[RefineResult] = deque(maxlen=UNREAD_RESULTS)

    @property
    def all_answered(self) -> bool:
        """Whether each edit has a result or a rejection."""
        return not self._unanswered

    # What is sent

    def add(self, edit: refine_pb2.Edit) -> refine_pb2.RefineRequest:
        """Number an edit; return the message to send."""
        self._last_seq += 1
        request = refine_pb2.RefineRequest(seq=self._last_seq, edit=edit)
        self._log[request.seq] = request
        self._objects[request.seq] = self._unanswered[request.seq] = edit.object_id
        if edit.HasField("set_mask"):
            self.history.add_logits(request.seq, tensor_array(edit.set_mask).astype("float32", copy=False))
        return request

    def cancel(self, through_seq: int | None) -> refine_pb2.RefineRequest:
        """Return the message that drops edits up to a number; None for all."""
        through = self._last_seq if through_seq is None else min(through_seq, self._last_seq)
        self._cancelled_through = max(self._cancelled_through, through)
        return refine_pb2.RefineRequest(cancel=refine_pb2.CancelThrough(seq=through))

    def begin_stream(self, applied_seq: int, last_seq: int) -> Iterator[refine_pb2.RefineRequest]:
        """Return what is to be sent again on a new stream.

        Args:
            applied_seq: The last edit that the server has applied.
            last_seq: The last edit that has arrived there; of a session that was taken over, another client's.
        """
        self.progress = False
        self._sent_again = applied_seq
        self._last_seq = max(self._last_seq, last_seq)
        self.applied(applied_seq)
        yield from self._log.values()
        if self._cancelled_through > applied_seq and self._log:
            yield self.cancel(self._cancelled_through)

    # What comes back

    def applied(self, seq: int) -> None:
        """Note that the server has dealt with the edits up to a number: they need not be sent again."""
        for known in [known for known in self._log if known <= seq]:
            del self._log[known]

    def result(self, result: RefineResult) -> None:
        """Take in a result; one that was sent again changes nothing."""
        self.history.add(result)
        self._newest = max(self._newest, result.revision)
        newest = self.latest.get(result.object_id)
        if newest is not None and newest.revision >= result.revision:
            return
        self.latest[result.object_id] = result
        for seq, object_id in list(self._unanswered.items()):
            if object_id == result.object_id and seq <= result.applied_seq:
                self._answered(seq)
        if not self._keep_all:
            self._unread = deque((one for one in self._unread if one.object_id != result.object_id), UNREAD_RESULTS)
        self._unread.append(result)

    def rejected(self, error: EditRejectedError) -> None:
        """Take in a rejection."""
        self.rejections[error.seq] = error
        self._log.pop(error.seq, None)
        self.history.forget_logits(error.seq)
        self._answered(error.seq)

    def _answered(self, seq: int) -> None:
        self._unanswered.pop(seq, None)
        self.progress = True
        # A result that is missing belongs to an edit without an answer, or is one that the server is sending again.
        if seq > self._sent_again and not self._unanswered:
            self.complete = self._newest

    # What one asks for

    def outcome(self, seq: int) -> RefineResult | None:
        """Return the newest result of an edit's object once it reflects the edit; None before.

        Raises:
            EditRejectedError: If the edit was rejected.
            ValueError: If no edit has that number.
        """
        if seq not in self._objects:
            raise ValueError(f"no edit was sent under the number {seq}")
        if seq in self.rejections:
            raise self.rejections[seq]
        return None if seq in self._unanswered else self.latest[self._objects[seq]]

    def take_unread(self) -> RefineResult | None:
        """Return the oldest result that was not taken yet."""
        return self._unread.popleft() if self._unread else None
