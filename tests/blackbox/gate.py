"""Holding the model ``gated`` of the third-party package, and counting what it computed."""

import os
from pathlib import Path


class Gate:
    """Lets a test hold a stage of the model, with named pipes instead of time.

    Args:
        folder: The model's parameter ``gates``; made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def _pipes(self, stage: str) -> tuple[Path, Path]:
        return self._folder / f"{stage}.started", self._folder / f"{stage}.proceed"

    def hold(self, stage: str) -> None:
        """Have the model wait at the beginning of ``embed`` or ``decode``."""
        for pipe in reversed(self._pipes(stage)):  # the model looks for the first one
            os.mkfifo(pipe)

    def wait_until_held(self, stage: str) -> None:
        """Return once the model waits there."""
        assert self._pipes(stage)[0].read_text() == "started\n"

    def step(self, stage: str) -> None:
        """Let the model, which waits, go on; it will be held again."""
        self._pipes(stage)[1].write_text("go\n")

    def release(self, stage: str) -> None:
        """Let the model, which waits, go on, and hold it no more."""
        started, proceed = self._pipes(stage)
        with proceed.open("w") as writer:  # opens once the model is there, so that it looks for no pipe any more
            started.unlink()
            proceed.unlink()
            writer.write("go\n")

    def open(self) -> None:
        """Hold nothing any more, although nothing waits."""
        for pipe in self._folder.glob("*.*"):
            pipe.unlink()

    @property
    def decodes(self) -> int:
        """How many prompts the model decoded so far."""
        log = self._folder / "decodes"
        return log.stat().st_size if log.exists() else 0
