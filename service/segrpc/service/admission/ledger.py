"""Who has how much of what."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

from segrpc.service.admission.limits import Limits, Resource
from segrpc.service.admission.memory import MemoryGuard
from segrpc.service.errors import OverloadedError, Quota

# Seconds after which another try makes sense: streams and sessions end when people are done, not in milliseconds.
_RETRY_AFTER = {Resource.STREAMS: 5.0, Resource.SESSIONS: 5.0, Resource.SESSION_BYTES: 5.0}
_DEFAULT_RETRY_AFTER = 1.0

BIG_BYTES = 256 * 1024  # more in flight is asked of the guard of the memory; less is a click


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something cannot be taken.

    Attributes:
        resource: Of what there is not enough.
        owner: Whose limit is reached; None for that of all together.
        used: How much is taken already.
        allowed: How much may be.
        amount: How much was asked for.
    """

    resource: Resource
    owner: str | None
    used: int
    allowed: int
    amount: int

    def __str__(self) -> str:
        who = "all callers together" if self.owner is None else repr(self.owner)
        text = f"{who} may have {self.allowed} {self.resource.noun} at once ({self.resource})"
        if self.amount > self.allowed:
            return f"{text}, and this alone has {self.amount}"
        more = f" and {self.amount} more are asked for" if self.amount > 1 else ""
        return f"{text}; {self.used} are taken{more}"

    def error(self) -> OverloadedError:
        """Make the error that says so; with a time to wait, unless that would not help."""
        hopeless = self.amount > self.allowed
        wait = None if hopeless else _RETRY_AFTER.get(self.resource, _DEFAULT_RETRY_AFTER)
        quota = None if self.owner is None else Quota(self.owner, str(self))
        return OverloadedError(f"{self}; {'send less' if hopeless else 'try again later'}", wait, quota)


class Ledger:
    """Counts what is taken, by owner and altogether, and refuses what would be too much.

    All methods may be called from any thread. An owner's name is empty where callers are not identified.

    Args:
        limits: How much may be taken.
        memory: Asked before a session, or much in flight, is taken. Default: nobody is.

    Attributes:
        limits: The same; may be replaced at any time. What is taken already stays taken.
    """

    def __init__(self, limits: Limits | None = None, memory: MemoryGuard | None = None) -> None:
        self.limits = limits or Limits()
        self._memory = memory
        self._totals = dict.fromkeys(Resource, 0)
        self._owned: dict[tuple[Resource, str], int] = {}
        self._lock = Lock()

    def take(self, resource: Resource, owner: str, amount: int = 1) -> None:
        """Take some, to be given back by `add` with the negative amount; see `held` too.

        Raises:
            OverloadedError: If the owner, or all together, would have more than allowed, or the memory is used up.
        """
        big = resource is Resource.SESSIONS or (resource is Resource.IN_FLIGHT_BYTES and amount > BIG_BYTES)
        if big and self._memory is not None:
            self._memory.check()
        with self._lock:
            refusal = self._refusal(resource, owner, amount)
            if refusal is None:
                self._add(resource, owner, amount)
        if refusal is not None:
            raise refusal.error()

    def add(self, resource: Resource, owner: str, amount: int) -> None:
        """Count what was taken, or with a negative amount given back, whatever the limits."""
        with self._lock:
            self._add(resource, owner, amount)

    @contextmanager
    def held(self, resource: Resource, owner: str, amount: int = 1) -> Iterator[None]:
        """Take some inside the context.

        Raises:
            OverloadedError: As `take`.
        """
        self.take(resource, owner, amount)
        try:
            yield
        finally:
            self.add(resource, owner, -amount)

    def refusal(self, resource: Resource, owner: str, amount: int = 1) -> Refusal | None:
        """Tell why some could not be taken now; None if it could."""
        with self._lock:
            return self._refusal(resource, owner, amount)

    def used(self, resource: Resource, owner: str | None = None) -> int:
        """Return how much an owner has, or all together."""
        with self._lock:
            return self._totals[resource] if owner is None else self._owned.get((resource, owner), 0)

    def taken(self) -> dict[str, int]:
        """Return how much all have together, by the names of the limits."""
        with self._lock:
            return {str(resource): amount for resource, amount in self._totals.items()}

    def _refusal(self, resource: Resource, owner: str, amount: int) -> Refusal | None:
        if owner:
            used, allowed = self._owned.get((resource, owner), 0), self.limits.of_one(resource, owner)
            if used + amount > allowed:
                return Refusal(resource, owner, used, allowed, amount)
        used, allowed = self._totals[resource], self.limits.of_all(resource)
        return Refusal(resource, None, used, allowed, amount) if used + amount > allowed else None

    def _add(self, resource: Resource, owner: str, amount: int) -> None:
        self._totals[resource] += amount
        own = self._owned.get((resource, owner), 0) + amount
        if own:
            self._owned[resource, owner] = own
        else:
            self._owned.pop((resource, owner), None)  # owners come and go
