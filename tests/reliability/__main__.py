"""Long runs that a server must survive: ``python -m tests.reliability RUN [--seconds N] [--model MODEL]``.

RUN is ``soak``, ``overload`` or ``chaos``. Prints progress; writes figures as JSON and a picture into
``reliability-results``. The exit status is 1 if what must hold did not.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

from tests.reliability import chaos, overload, plot, report, soak
from tests.reliability.record import Effort, Outcome, Record
from tests.reliability.serving import MODELS, SCALES, serve
from tests.tcp_proxy import TcpProxy

T = TypeVar("T")

PROGRESS_SECONDS = 10.0


def main() -> None:
    """Do a run."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description="Do a long run.")
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long; default: 600")
    parser.add_argument("--model", choices=MODELS, help="default: the run's own")
    parser.add_argument("--sessions", type=int, default=64, help="interactive sessions at a time; default: 64")
    parser.add_argument("--strike-seconds", type=float, default=5.0, help="between strikes of chaos; default: 5")
    parser.add_argument("--output", type=Path, default=Path("reliability-results"), help="folder for what is written")
    options = parser.parse_args()
    run, own = RUNS[options.run]
    options.model = options.model or own
    with tempfile.TemporaryDirectory() as folder:
        outcome = asyncio.run(run(options, Path(folder)))
    settings = {"seconds": options.seconds, "model": options.model, "sessions": options.sessions}
    print(f"wrote {report.write(options.run, settings, outcome, options.output)}")
    for claim, holds in outcome.claims.items():
        print(f"{'yes' if holds else 'NO'}: {claim}")
    sys.exit(1 if outcome.failed else 0)


async def run_soak(options: argparse.Namespace, folder: Path) -> Outcome:
    """See `tests.reliability.soak`."""
    load = soak.Load(sessions=options.sessions)
    with serve(options.model, folder) as server:
        record = Record(soak.REFUSALS)
        run = soak.Soak(server, SCALES[options.model], load, record)
        outcome = await _told(record, run.run(Effort(seconds=options.seconds), Effort(seconds=options.seconds)))
        plot.soak(run.memory.samples, record.answers, options.output / "soak.png")
        return outcome


async def run_overload(options: argparse.Namespace, folder: Path) -> Outcome:
    """See `tests.reliability.overload`."""
    load = overload.Load(rounds=max(1, round(options.seconds / overload.ROUND_SECONDS)))
    with serve(options.model, folder) as server:
        run = overload.Overload(server, SCALES[options.model], load)
        outcome = await run.run(lambda: Effort(seconds=options.seconds / load.rounds / 3))
        plot.overload(run.rates, options.output / "overload.png")
        return outcome


async def run_chaos(options: argparse.Namespace, folder: Path) -> Outcome:
    """See `tests.reliability.chaos`."""
    load = chaos.Load(sessions=options.sessions)
    detached = ("--session-detached-seconds", str(chaos.DETACHED_SECONDS))
    with serve(options.model, folder, *detached) as server, TcpProxy(server.target) as proxy:
        record = Record(chaos.REFUSALS)
        run = chaos.Chaos(server, proxy, SCALES[options.model], load, record)
        strikes = chaos.from_time_to_time(options.strike_seconds)
        outcome = await _told(record, run.run(Effort(seconds=options.seconds), strikes))
        plot.chaos(run.kills, run.cuts, record.answers, options.output / "chaos.png")
        return outcome


# With the model that each has unless another is chosen. For chaos a cheap one, which starts in a second and is edited
# hundreds of times between two strikes.
RUNS = {"soak": (run_soak, "sam2"), "overload": (run_overload, "sam2"), "chaos": (run_chaos, "light")}


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
