"""The current image of each series of stateless calls that a caller named with a ``session_id``."""

import time
from collections import OrderedDict
from collections.abc import Callable

from segrpc.service.admission.shares import Shares
from segrpc.service.errors import NoPredictorStateError

Key = tuple[str, str]  # caller, session_id


class CurrentImages:
    """Remembers which image a caller used last under a session's name. Nobody sees another caller's.

    It remembers digests; the images themselves are in the image store.

    Args:
        max_sessions: How many are remembered; the longest unused is forgotten first, of a caller beyond its share if
            there is one (`Shares`).
        idle_seconds: How long an unused one is remembered.
        share: The part of them that is one caller's share, above 0, at most 1.
        clock: Gives the time in seconds, for tests.
    """

    def __init__(
        self,
        max_sessions: int,
        idle_seconds: float,
        share: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_sessions = max_sessions
        self._shares = Shares(max_sessions, share)
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._sessions: OrderedDict[Key, tuple[str, float]] = OrderedDict()  # digest, last use; oldest first

    def __len__(self) -> int:
        return len(self._sessions)

    def set(self, caller: str, session_id: str, digest: str) -> None:
        """Make an image the current one of a session."""
        self._forget_idle()
        key = (caller, session_id)
        if key not in self._sessions:
            self._shares.add(caller, 1)
        self._sessions[key] = (digest, self._clock())
        self._sessions.move_to_end(key)
        if len(self._sessions) > self._max_sessions:
            oldest = self._shares.first_to_go((key[0], key) for key in self._sessions)
            assert oldest is not None  # there are some
            self._forget(oldest)

    def get(self, caller: str, session_id: str) -> str:
        """Return the digest of a session's current image.

        Raises:
            NoPredictorStateError: If this caller has no such session, or has not used it for too long.
        """
        self._forget_idle()
        found = self._sessions.get((caller, session_id))
        if found is None:
            raise NoPredictorStateError(
                f"this caller has no session {session_id!r} with an image: send the image, with reset_predictor true"
            )
        self.set(caller, session_id, found[0])
        return found[0]

    def _forget_idle(self) -> None:
        limit = self._clock() - self._idle_seconds
        while self._sessions:
            oldest, (_, last_use) = next(iter(self._sessions.items()))
            if last_use >= limit:
                return
            self._forget(oldest)

    def _forget(self, key: Key) -> None:
        del self._sessions[key]
        self._shares.add(key[0], -1)
