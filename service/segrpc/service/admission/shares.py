"""Who has how much of a cache, and who gives when room is needed."""

from collections.abc import Iterable
from typing import TypeVar

from segrpc.service.admission.limits import share_of

K = TypeVar("K")


class Shares:
    """How much of a cache each owner has.

    While there is room anybody may use it. When there is none, the owner that has the most makes it, if that is more
    than its share: nobody within its share loses anything to one beyond. If all are within, what was not used for
    longest goes, whose ever it is: it would not do to take from who works now, and to leave what others left behind.

    Args:
        budget: How much all may have together.
        share: The part of it that is one owner's share, above 0, at most 1.
    """

    def __init__(self, budget: int, share: float) -> None:
        self._share = share_of(budget, share)
        self._held: dict[str, int] = {}

    def add(self, owner: str, amount: int) -> None:
        """Count what an owner has more, or with a negative amount less."""
        held = self._held.get(owner, 0) + amount
        if held:
            self._held[owner] = held
        else:
            self._held.pop(owner, None)  # owners come and go

    def first_to_go(self, entries: Iterable[tuple[str, K]]) -> K | None:
        """Choose what makes room.

        Args:
            entries: Owners and what they have that may go; what was not used for longest comes first.

        Returns:
            The one that goes; None if there are none.
        """
        giver, oldest = self._giver(), None
        for owner, entry in entries:
            if giver is None or owner == giver:
                return entry
            oldest = entry if oldest is None else oldest
        return oldest

    def _giver(self) -> str | None:
        most = max(self._held, key=self._held.__getitem__, default=None)
        return most if most is not None and self._held[most] > self._share else None
