"""Files that are read again when they change."""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger("segrpc.identity")

T = TypeVar("T")

_State = tuple[tuple[int, int, int], ...] | None  # of each file: inode, size, time of change; None if one is missing


class Watched(Generic[T]):
    """What some files say, read again when one of them changes. Safe to use from any thread.

    A change that cannot be read leaves the last value that could, and is logged once: a file that is half written, or
    that does not yet fit the one beside it, must neither lock everybody out nor let anybody in.

    Args:
        files: The files.
        load: Reads them; raises ValueError or OSError, with a text that gives away nothing secret.

    Raises:
        ValueError: If the first reading fails.
        OSError: If the first reading fails.
    """

    def __init__(self, files: Sequence[Path], load: Callable[[], T]) -> None:
        self._files = tuple(files)
        self._load = load
        self._lock = threading.Lock()
        self._seen = self._look()
        self._value = load()

    def get(self) -> T:
        """Return the newest value that could be read. Costs a ``stat`` of each file."""
        with self._lock:
            found = self._look()
            if found != self._seen:
                # Noted before reading: a change during the reading is another one.
                self._seen = found
                self._read()
            return self._value

    def _read(self) -> None:
        names = ", ".join(map(str, self._files))
        try:
            self._value = self._load()
        except (ValueError, OSError) as error:
            log.error("%s changed and cannot be used; what was read before stays: %s", names, error)
        else:
            log.info("%s changed and was read again", names)

    def _look(self) -> _State:
        try:
            found = [os.stat(file) for file in self._files]  # noqa: PTH116 - follows links, as secrets are often mounted
        except OSError:
            return None
        return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found)
