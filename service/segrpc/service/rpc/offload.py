"""Keeping the event loop free: work that grows with a message goes to a thread, if the message is large.

For a small one the way to a thread and back costs more than the work.
"""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

COPY_BYTES = 256 * 1024  # of what is done in C, such as parsing and copying: 0.2 ms
CONVERT_BYTES = 4 * 1024  # of what is done in Python, field by field: 0.3 ms


async def sized(nbytes: int | None, most: int, work: Callable[..., T], *args: Any) -> T:
    """Do work on ``nbytes``: here if they are at most ``most``; in a thread if they are more, or nobody knows."""
    return await asyncio.to_thread(work, *args) if nbytes is None or nbytes > most else work(*args)
