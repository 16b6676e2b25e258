"""Holding the model ``held`` in the middle of its work, with named pipes instead of time."""

import asyncio
import os
from pathlib import Path


class Gate:
    """A place in the model's work where it waits for the test.

    Args:
        folder: The model's folder.
        stage: ``embed`` or ``decode``.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        self._started, self._proceed = folder / f"{stage}.started", folder / f"{stage}.proceed"
        os.mkfifo(self._proceed)
        os.mkfifo(self._started)

    async def reached(self) -> None:
        """Return once the model waits here."""
        assert await asyncio.to_thread(self._started.read_text) == "started\n"

    async def step(self) -> None:
        """Let the model, which waits, go on; the next time it waits again."""
        await asyncio.to_thread(self._proceed.write_text, "go\n")

    def leave(self) -> None:
        """Let nobody wait here any more but the model that does."""
        self._started.unlink()

    async def open(self) -> None:
        """Let the model, which waits, go on, and never wait again."""
        self._started.rename(self._started.with_suffix(".over"))
        await self.step()
        self._started.with_suffix(".over").unlink()
        self._proceed.unlink()


def log_of(folder: Path) -> list[str]:
    """What the model did, a line each."""
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []


def embeds(folder: Path) -> int:
    """How many images the model encoded."""
    return sum(line.startswith("embed ") for line in log_of(folder))


def unblock(folder: Path) -> None:
    """Let everybody go who waits at a gate, so that a test that failed ends."""
    for pipe in [*folder.glob("*.started"), *folder.glob("*.proceed")]:
        both_ends = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
        pipe.unlink()
        os.write(both_ends, b"started\n")
        os.close(both_ends)
