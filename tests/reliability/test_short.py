"""The long runs, in short: a number of operations instead of a time, and nothing asserted that depends on time."""

import asyncio
from pathlib import Path

from tests.reliability.record import Effort, Record
from tests.reliability.serving import SCALES, serve
from tests.reliability.soak import REFUSALS, Load, Soak


def test_soak(tmp_path: Path) -> None:
    load = Load(sessions=16, edits=12, per_image=2, callers=3, repeat_every=4, clients=4)
    with serve("light", tmp_path) as server:

        async def run() -> None:
            record = Record(REFUSALS)
            soak = Soak(server, SCALES["light"], load, record)
            outcome = await soak.run(Effort(operations=32), Effort(operations=96))
            assert outcome.failed == []
            assert outcome.figures["sessions"] + record.refusals["open: OVERLOADED"] == 32
            assert "bug in" not in server.log_text()
            print(outcome.figures)

        asyncio.run(run())
