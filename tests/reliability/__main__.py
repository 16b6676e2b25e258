"""Long runs that a server must survive: ``python -m tests.reliability RUN [--seconds N] [--model MODEL]``.

Prints progress; writes figures as JSON and a picture into ``reliability-results``. The exit status is 1 if what must
hold did not.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

from tests.reliability import plot, report
from tests.reliability.record import Effort, Outcome, Record
from tests.reliability.serving import MODELS, SCALES, serve
from tests.reliability.soak import REFUSALS as SOAK_REFUSALS
from tests.reliability.soak import Load, Soak

T = TypeVar("T")

PROGRESS_SECONDS = 10.0


def main() -> None:
    """Do a run."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description="Do a long run.")
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long; default: 600")
    parser.add_argument("--model", choices=MODELS, help="default: the run's own")
    parser.add_argument("--sessions", type=int, default=64, help="interactive sessions at a time; default: 64")
    parser.add_argument("--output", type=Path, default=Path("reliability-results"), help="folder for what is written")
    options = parser.parse_args()
    outcome = asyncio.run(RUNS[options.run](options))
    settings = {"seconds": options.seconds, "model": options.model, "sessions": options.sessions}
    print(f"wrote {report.write(options.run, settings, outcome, options.output)}")
    for claim, holds in outcome.claims.items():
        print(f"{'yes' if holds else 'NO'}: {claim}")
    sys.exit(1 if outcome.failed else 0)


async def soak(options: argparse.Namespace) -> Outcome:
    """See `tests.reliability.soak`."""
    options.model = options.model or "sam2"
    with tempfile.TemporaryDirectory() as folder, serve(options.model, Path(folder)) as server:
        record = Record(SOAK_REFUSALS)
        run = Soak(server, SCALES[options.model], Load(sessions=options.sessions), record)
        outcome = await _told(record, run.run(Effort(seconds=options.seconds), Effort(seconds=options.seconds)))
        plot.soak(run.memory.samples, record.answers, options.output / "soak.png")
        return outcome


RUNS = {"soak": soak}


async def _told(record: Record, run: Awaitable[T]) -> T:
    """Print how far a run is until it ends."""

    async def tell() -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            refused = record.refusals.total()
            print(f"{record.now:.0f} s: {len(record.answers)} answers, {refused} refusals", file=sys.stderr, flush=True)

    telling = asyncio.create_task(tell())
    try:
        return await run
    finally:
        telling.cancel()


if __name__ == "__main__":
    main()
