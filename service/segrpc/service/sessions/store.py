"""All sessions of a server: opening, resuming, fencing, expiry and budgets."""

import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from segrpc.service.admission.ledger import Ledger
from segrpc.service.admission.limits import Resource
from segrpc.service.errors import SegrpcError, SessionNotFoundError, SessionTakenError
from segrpc.service.images.known import KnownImage
from segrpc.service.sessions.edits import Scene
from segrpc.service.sessions.session import RefineOptions, Session


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long sessions are held.

    Attributes:
        idle_seconds: How long an attached session is held without an edit.
        detached_seconds: How long a detached session waits to be resumed.
    """

    idle_seconds: float = 600.0
    detached_seconds: float = 120.0


@dataclass(eq=False, slots=True)
class Attachment:
    """A stream's hold on a session.

    Attributes:
        session: The session.
        token: The secret that resumes it.
        resumed: Whether it was held by another stream before.
        end: Called with the reason when the session is taken away: resumed elsewhere, or expired.
    """

    session: Session
    token: str = field(repr=False)
    resumed: bool
    end: Callable[[SegrpcError], None] = field(repr=False)


@dataclass(slots=True)
class _Held:
    session: Session
    token: str
    attachment: Attachment | None
    expires: float


class SessionStore:
    """Holds sessions; all methods belong to the event loop.

    Args:
        ledger: Knows how many there may be, and what they may take: images, logits and masks.
        lifetimes: How long they are held.
        clock: Gives the time in seconds, for tests.
    """

    def __init__(self, ledger: Ledger, lifetimes: Lifetimes, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._lifetimes = lifetimes
        self._clock = clock
        self._held: dict[str, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    @property
    def attached(self) -> int:
        """How many sessions have a stream."""
        return sum(held.attachment is not None for held in self._held.values())

    @property
    def nbytes(self) -> int:
        """About how much memory the sessions take."""
        return self._ledger.used(Resource.SESSION_BYTES)

    @property
    def idle_seconds(self) -> float:
        """How long an attached session is held without an edit."""
        return self._lifetimes.idle_seconds

    def open(
        self, image: KnownImage, scene: Scene, options: RefineOptions, end: Callable[[SegrpcError], None]
    ) -> Attachment:
        """Make a session and attach a stream to it. It belongs to the owner of its image.

        Raises:
            OverloadedError: If there is no room for another one.
        """
        self.expire()
        if refusal := self._ledger.refusal(Resource.SESSION_BYTES, image.owner):
            raise refusal.error()
        self._ledger.take(Resource.SESSIONS, image.owner)
        session = Session(secrets.token_hex(16), image, scene, options, self._ledger)
        attachment = Attachment(session, secrets.token_urlsafe(32), False, end)
        self._held[session.id] = _Held(
            session, attachment.token, attachment, self._clock() + self._lifetimes.idle_seconds
        )
        return attachment

    def find(self, owner: str, session_id: str, token: str) -> Session:
        """Find an owner's session, and leave it to the stream that may have it.

        Raises:
            SessionNotFoundError: If the owner has no such session (any more), or the token is not its.
        """
        return self._find(owner, session_id, token).session

    def _find(self, owner: str, session_id: str, token: str) -> _Held:
        self.expire()
        held = self._held.get(session_id)
        is_own = held is not None and held.session.image.owner == owner
        # Another's session and a wrong token are answered like an unknown session: it tells nothing.
        if held is None or not (hmac.compare_digest(held.token.encode(), token.encode()) and is_own):
            raise SessionNotFoundError(
                f"there is no session {session_id[:64]!r} that this token opens; it may have expired"
            )
        return held

    def resume(self, owner: str, session_id: str, token: str, end: Callable[[SegrpcError], None]) -> Attachment:
        """Attach a stream to a session, and take it away from the stream that may still have it.

        Raises:
            SessionNotFoundError: If the owner has no such session (any more), or the token is not its.
        """
        held = self._find(owner, session_id, token)
        if held.attachment is not None:
            held.attachment.end(SessionTakenError(f"session {session_id} was resumed on another stream"))
        held.attachment = Attachment(held.session, held.token, True, end)
        held.expires = self._clock() + self._lifetimes.idle_seconds
        return held.attachment

    def touch(self, attachment: Attachment) -> None:
        """Note that the client did something."""
        held = self._held_by(attachment)
        if held is not None:
            held.expires = self._clock() + self._lifetimes.idle_seconds

    def detach(self, attachment: Attachment) -> None:
        """Let a session wait for being resumed, unless another stream has it already."""
        held = self._held_by(attachment)
        if held is not None:
            held.attachment, held.expires = None, self._clock() + self._lifetimes.detached_seconds

    def close(self, attachment: Attachment) -> None:
        """End a session, unless another stream has it already."""
        held = self._held_by(attachment)
        if held is not None:
            self._end(held)

    def expire(self) -> None:
        """End the sessions whose time is over."""
        now = self._clock()
        for held in [held for held in self._held.values() if held.expires <= now]:
            self._end(held)
            if held.attachment is not None:
                text = f"the session expired after {self._lifetimes.idle_seconds:g} s without an edit"
                held.attachment.end(SessionNotFoundError(text))

    def _end(self, held: _Held) -> None:
        del self._held[held.session.id]
        held.session.close()
        self._ledger.add(Resource.SESSIONS, held.session.image.owner, -1)

    def _held_by(self, attachment: Attachment) -> _Held | None:
        held = self._held.get(attachment.session.id)
        return held if held is not None and held.attachment is attachment else None
