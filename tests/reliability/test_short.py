"""The long runs, in short: a number of operations instead of a time, and nothing asserted that depends on time."""

import asyncio
import json
from pathlib import Path

from PIL import Image

from tests.reliability import chaos, overload, plot, report, soak
from tests.reliability.record import Effort, Outcome, Record
from tests.reliability.serving import SCALES, serve
from tests.tcp_proxy import TcpProxy


def check_written(name: str, outcome: Outcome, folder: Path) -> None:
    """Look whether the figures can be read again, and whether the picture is one."""
    file = report.write(name, {"model": "light"}, outcome, folder / "results")
    assert json.loads(file.read_text())["figures"] == outcome.figures
    with Image.open(folder / f"{name}.png") as picture:
        assert picture.format == "PNG"


def test_soak(tmp_path: Path) -> None:
    load = soak.Load(sessions=16, edits=12, per_image=2, callers=3, repeat_every=4, clients=4)
    with serve("light", tmp_path) as server:

        async def run() -> None:
            record = Record(soak.REFUSALS)
            run = soak.Soak(server, SCALES["light"], load, record)
            outcome = await run.run(Effort(operations=32), Effort(operations=96))
            assert outcome.failed == []
            assert outcome.figures["sessions"] + record.refusals["open: OVERLOADED"] == 32
            assert "bug in" not in server.log_text()
            plot.soak(run.memory.samples, record.answers, tmp_path / "soak.png")
            check_written("soak", outcome, tmp_path)

        asyncio.run(run())


def test_chaos(tmp_path: Path) -> None:
    load = chaos.Load(sessions=8, edits=15, per_image=2, clients=4)
    options = ("--session-detached-seconds", str(chaos.DETACHED_SECONDS))
    with serve("light", tmp_path, *options) as server, TcpProxy(server.target) as proxy:

        async def run() -> None:
            record = Record(chaos.REFUSALS)
            run = chaos.Chaos(server, proxy, SCALES["light"], load, record)
            outcome = await run.run(Effort(operations=16), chaos.after_each(30, record, times=6))
            assert outcome.failed == []
            # What is opened while its worker is killed or its connection cut may be refused for that, too.
            refused = sum(count for what, count in record.refusals.items() if what.startswith("open: "))
            assert outcome.figures["sessions compared"] + refused == 16
            assert run.kills
            assert run.cuts
            assert "bug in" not in server.log_text()
            plot.chaos(run.kills, run.cuts, record.answers, tmp_path / "chaos.png")
            check_written("chaos", outcome, tmp_path)

        asyncio.run(run())


def test_overload(tmp_path: Path) -> None:
    load = overload.Load(callers=2, crowd=16, clients=2, rounds=2)
    with serve("light", tmp_path) as server:
        run = overload.Overload(server, SCALES["light"], load)
        outcome = asyncio.run(run.run(lambda: Effort(operations=50)))
    assert set(outcome.figures["calls per second"]) == {"capacity", "crowd", "flood"}
    assert len(outcome.figures["goodput of the flood by round"]) == 2
    # With a caller for each two jobs that may wait there is room for all; what a flood gets depends on time.
    for name in ("capacity", "crowd"):
        assert run.rates[name] == {"in time": run.rates[name]["in time"], "refused": 0.0, "too late": 0.0}
    assert "bug in" not in server.log_text()
    plot.overload(run.rates, tmp_path / "overload.png")
    check_written("overload", outcome, tmp_path)
