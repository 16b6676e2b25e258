"""Not waiting for clients for ever: those that send nothing when it is their turn, and those that read nothing."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from segrpc.service.errors import DeadlineError

T = TypeVar("T")


class Patience:
    """Waits for a client's next message, or until it has taken one, for a limited time.

    Args:
        seconds: How long.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def read(self, requests: AsyncIterator[T], due: str) -> T | None:
        """Return the next message; None after the last.

        Args:
            requests: The client's messages. They are over when this has failed.
            due: What should come, for the error.

        Raises:
            DeadlineError: If nothing comes.
        """
        try:
            async with asyncio.timeout(self._seconds):
                return await anext(requests, None)
        except TimeoutError:
            text = f"nothing came for {self._seconds:g} s (stall_seconds), and {due} was due; begin anew"
            raise DeadlineError(text) from None

    async def write(self, context: Any, response: object) -> None:
        """Send a message of a stream.

        Raises:
            DeadlineError: If the client does not read those before it.
        """
        try:
            async with asyncio.timeout(self._seconds):
                await context.write(response)
        except TimeoutError:
            text = f"answers were not read for {self._seconds:g} s (stall_seconds); take the session up again"
            raise DeadlineError(text) from None
