"""A queue in which parties take turns, so that nobody waits for all that another has put there."""

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class TurnQueue(Generic[T]):
    """Items that wait. Parties take turns with one item each; the items of one are taken in the order of coming.

    An item that needs several turns is put back after each but the last.

    Before the first item of a party that begins to wait, every other has one turn at most; and none has one who had the
    turn just before, whose item may still be in work.

    Not safe to use from several threads.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, deque[T]] = OrderedDict()  # whose turn it is first
        self._last: Hashable = None  # who had the last turn

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, party: Hashable, item: T) -> None:
        """Put an item behind the others of its party."""
        self._waiting.setdefault(party, deque()).append(item)

    def put_back(self, party: Hashable, item: T) -> None:
        """Put an item that had a turn, and needs another, before the others of its party."""
        self._waiting.setdefault(party, deque()).appendleft(item)

    def take(self) -> T:
        """Take the next item.

        Raises:
            IndexError: If there is none.
        """
        if not self._waiting:
            raise IndexError("nothing waits")
        # Only now, not right after its turn: so whoever came in the meantime goes before it.
        if self._last in self._waiting:
            self._waiting.move_to_end(self._last)
        party, own = next(iter(self._waiting.items()))
        item = own.popleft()
        if not own:
            del self._waiting[party]
        self._last = party
        return item

    def discard(self, party: Hashable, item: T) -> bool:
        """Take an item out, wherever it is; return whether it was there."""
        own = self._waiting.get(party)
        if own is None or item not in own:
            return False
        own.remove(item)
        if not own:
            del self._waiting[party]
        return True
