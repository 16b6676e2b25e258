"""The benchmark: segrpc over gRPC beside the reference predictor in this process.

    python -m tests.benchmarks [--quick] [--device cpu|cuda] [--only TEXT] [--logits smooth|rough]
                               [--output FOLDER] [--docs]

Both have the same weights (SAM 2.1, random), threads, precision and prompts, and take turns, so that what disturbs the
machine disturbs both. Ratios are to be quoted, times are context. Prints Markdown; writes ``report.md``,
``results.json`` and ``latency.png``.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from tests.benchmarks import clicks, machine, plot, report, sessions, startup, throughput, traffic
from tests.benchmarks.common import FULL, QUICK, Bench, Effort, prepare
from tests.benchmarks.values import DType, Logits, Measured, Row, Run, Setup

_DOCS = Path(__file__).parents[2] / "docs"
_KINDS: tuple[Logits, ...] = ("smooth", "rough")
_DTYPES: tuple[DType, ...] = ("float32", "bfloat16")

Step = tuple[str, Callable[[Bench], Sequence[Row]]]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Compare segrpc with the in-process reference.")
    parser.add_argument("--quick", action="store_true", help="few rounds: within 3 minutes on 2 cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the CPU, and CUDA if there is any")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="setups in whose names it is, such as large-bfloat16"
    )
    parser.add_argument("--logits", choices=_KINDS, help="of which weights; default: of both")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="folder for what is written")
    parser.add_argument("--docs", action="store_true", help="also renew the table and the plot of docs/performance.md")
    args = parser.parse_args()
    # sam2's own predictor, the reference, beside torch 2.13.
    warnings.filterwarnings("ignore", "`torch.jit.", DeprecationWarning)

    setups = [setup for setup in _setups(args.device) if args.only in f"{setup.device}-{setup.model}-{setup.dtype}"]
    if not setups:
        parser.error(f"no setup has {args.only!r} in its name")
    kinds = (args.logits,) if args.logits else _KINDS
    args.output.mkdir(parents=True, exist_ok=True)
    markdown = ""
    # After each step, so that a run which is cut off leaves what it measured.
    for run in _runs(setups, kinds, QUICK if args.quick else FULL, quick=args.quick):
        markdown = report.as_markdown(run)
        (args.output / "report.md").write_text(markdown, "utf-8")
        (args.output / "results.json").write_text(json.dumps(report.as_json(run), indent=2) + "\n", "utf-8")
    plot.draw(run.measured[0], args.output / "latency.png")
    if args.docs:
        page = _DOCS / "performance.md"
        page.write_text(report.replace_block(page.read_text("utf-8"), markdown), "utf-8")
        plot.draw(run.measured[0], _DOCS / "images" / "latency.png")
    print(markdown)


def _setups(device: str | None) -> list[Setup]:
    """What is measured: SAM 2.1 tiny on the CPU; tiny and large in two precisions on a GPU."""
    found = [report.TARGET_SETUP] if device != "cuda" else []
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        names = ("sam2.1-hiera-tiny", "sam2.1-hiera-large")
        found += [Setup("cuda", name, dtype) for name in names for dtype in _DTYPES]
    return found


def _steps(logits: Logits) -> list[Step]:
    """What is measured with one kind of logits: rough ones, which no trained model gives, only where they matter."""
    steps: list[Step] = [
        (f"clicks, {width} x {height}", partial(clicks.measure, width=width, height=height))
        for width, height in clicks.SIZES
    ]
    steps.append(("bytes per click", traffic.measure))
    if logits == "rough":
        return steps
    together: list[Step] = [
        (f"clicks per second, sessions: {count}", partial(throughput.measure, sessions=count))
        for count in throughput.SESSIONS
    ]
    return [
        *steps,
        *together,
        ("encode", startup.encode),
        ("first mask", startup.first_mask),
        ("what sessions add", sessions.added),
        ("clicks during encodes", sessions.meanwhile),
        ("memory of sessions", sessions.memory),
        ("cold start", startup.cold_start),
    ]


def _runs(setups: Sequence[Setup], kinds: Sequence[Logits], effort: Effort, *, quick: bool) -> Iterator[Run]:
    """Measure, and yield what is known after each step."""
    start = time.monotonic()
    name, dirty = machine.commit()
    date = datetime.now(UTC).date().isoformat()
    here = machine.machine(gpu=any(setup.device == "cuda" for setup in setups))
    total = len(setups) * sum(len(_steps(logits)) for logits in kinds)
    done = 0
    rows: dict[Setup, list[Row]] = {setup: [] for setup in setups}
    for setup in setups:
        for logits in kinds:
            with tempfile.TemporaryDirectory() as folder, prepare(setup, logits, effort, Path(folder)) as bench:
                for title, step in _steps(logits):
                    done += 1
                    where = f"{setup.device}, {setup.model}, {setup.dtype}, {logits} logits"
                    seconds = time.monotonic() - start
                    print(f"[{done}/{total}, {seconds:.0f} s] {title} ({where})", file=sys.stderr, flush=True)
                    rows[setup] += step(bench)
                    measured = tuple(Measured(one, tuple(found)) for one, found in rows.items() if found)
                    yield Run(name, dirty, date, quick, machine.versions(), here, measured)


if __name__ == "__main__":
    main()
