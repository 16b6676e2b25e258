"""Keeping the server's process within a budget of memory."""

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

from segrpc.service.errors import OverloadedError

RETRY_AFTER = 5.0  # seconds
RELIEF_SECONDS = 1.0  # between two attempts to free memory, which take milliseconds

_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Return how much memory this process holds."""
    return int(_STATM.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def trim() -> None:
    """Give memory that was freed back to the system, where the C library keeps it and can be told (glibc)."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)


class MemoryGuard:
    """Refuses what takes much memory while the process is above its budget and caches do not help. For one thread.

    Args:
        budget: How many bytes the process may hold.
        resident: Tells how many it holds.
        clock: Gives the time in seconds, for tests.
    """

    def __init__(
        self,
        budget: int,
        resident: Callable[[], int] = resident_bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = budget
        self._resident = resident
        self._clock = clock
        self._caches: list[Callable[[int], int]] = []
        self._next_relief = -float("inf")

    def add_cache(self, shrink: Callable[[int], int]) -> None:
        """Add a cache that can give memory.

        Args:
            shrink: Gets how many bytes are needed, frees about as many, and returns how many these were.
        """
        self._caches.append(shrink)

    def relieve(self) -> bool:
        """Let caches go if the process is above its budget; return whether it is still."""
        if (excess := self._resident() - self._budget) <= 0:
            return False
        if self._clock() < self._next_relief:
            return True
        self._next_relief = self._clock() + RELIEF_SECONDS
        for shrink in self._caches:
            excess -= shrink(max(0, excess))
        trim()
        return self._resident() > self._budget

    def check(self) -> None:
        """Look whether something that takes much memory may begin.

        Raises:
            OverloadedError: If not.
        """
        if self.relieve():
            text = f"the server's memory is used up: it may hold {self._budget} bytes (memory_bytes); try again later"
            raise OverloadedError(text, RETRY_AFTER)
