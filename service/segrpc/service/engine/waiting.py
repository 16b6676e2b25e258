"""Waiting on the event loop for as long as a token allows."""

import asyncio
from typing import Any, TypeVar

from segrpc.service.engine.base import CancelToken
from segrpc.service.errors import DeadlineError

T = TypeVar("T")


async def until(future: "asyncio.Future[T]", token: CancelToken) -> T:
    """Wait for a future, but no longer than a token allows. The future itself goes on.

    Raises:
        DeadlineError: If the token is cancelled, or its deadline passes, before the future is done.
    """
    loop = asyncio.get_running_loop()
    left: asyncio.Future[None] = loop.create_future()

    def leave() -> None:
        if not left.done():
            left.set_result(None)

    forget = token.on_cancel(lambda: loop.call_soon_threadsafe(leave))
    try:
        waited: set[asyncio.Future[Any]] = {future, left}
        await asyncio.wait(waited, timeout=token.remaining(), return_when=asyncio.FIRST_COMPLETED)
    finally:
        forget()
    if future.done():
        return future.result()
    token.check()
    raise DeadlineError("the deadline passed before the work was done")
