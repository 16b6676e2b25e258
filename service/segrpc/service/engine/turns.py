"""A queue in which owners take turns, so that nobody waits for all that another has put there."""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class TurnQueue(Generic[T]):
    """Items that wait. Owners take turns with one item each; the items of one owner are taken in the order of coming.

    Before the first item of an owner that begins to wait, every other owner has one turn at most; and none has one who
    had the turn just before, whose item may still be in work.

    Not safe to use from several threads.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()  # by owner; whose turn it is first
        self._last = ""  # who had the last turn

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, owner: str, item: T) -> None:
        """Put an item behind the others of its owner."""
        self._waiting.setdefault(owner, deque()).append(item)

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
        owner, own = next(iter(self._waiting.items()))
        item = own.popleft()
        if not own:
            del self._waiting[owner]
        self._last = owner
        return item

    def discard(self, owner: str, item: T) -> bool:
        """Take an item out, wherever it is; return whether it was there."""
        own = self._waiting.get(owner)
        if own is None or item not in own:
            return False
        own.remove(item)
        if not own:
            del self._waiting[owner]
        return True
