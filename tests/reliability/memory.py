"""How much memory a server and its workers hold over time."""

import asyncio
from dataclasses import dataclass

import numpy as np

from tests.reliability.record import Record
from tests.server_process import ServerProcess

MiB = 2**20


@dataclass(frozen=True)
class Sample:
    """What was held at a time.

    Attributes:
        at: Seconds since the beginning.
        server: MiB of the server's process.
        workers: MiB of its workers.
    """

    at: float
    server: float
    workers: float

    @property
    def total(self) -> float:
        """MiB of all."""
        return self.server + self.workers


class Memory:
    """Samples of a server's memory."""

    def __init__(self, server: ServerProcess, record: Record) -> None:
        self.samples: list[Sample] = []
        self._server = server
        self._record = record

    def sample(self) -> None:
        """Look once."""
        held = self._server.resident_bytes() / MiB, self._server.worker_resident_bytes() / MiB
        self.samples.append(Sample(self._record.now, *held))

    async def watch(self, seconds: float) -> None:
        """Look every so many seconds, until cancelled."""
        while True:
            self.sample()
            await asyncio.sleep(seconds)

    def slope(self) -> float | None:
        """Return by how many MiB per minute all grow in the second half; None if there are too few samples."""
        half = [sample for sample in self.samples if sample.at >= self.samples[-1].at / 2]
        if len(half) < 10:
            return None
        at = np.array([sample.at for sample in half]) / 60
        return float(np.polyfit(at, [sample.total for sample in half], 1)[0])

    def figures(self) -> dict[str, float | None]:
        """Return MiB: at the beginning, at the end, at most, and the slope."""
        slope = self.slope()
        return {
            "first_mib": round(self.samples[0].total, 1),
            "last_mib": round(self.samples[-1].total, 1),
            "most_mib": round(max(sample.total for sample in self.samples), 1),
            "slope_mib_per_minute": None if slope is None else round(slope, 2),
        }
