"""What a run is shown as: targets that are met or missed, Markdown, JSON. Plain functions of the values."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests.benchmarks.values import (
    Added,
    Click,
    ColdStart,
    Meanwhile,
    Measured,
    Memory,
    Run,
    Setup,
    Start,
    Stats,
    Throughput,
    Traffic,
)

MiB = 2**20
BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"

# The targets are ratios on 2 CPU cores; other devices and sizes are reported without.
TARGET_SETUP = Setup("cpu", "sam2.1-hiera-tiny", "float32")
_CLICKS = {("refinement", 1024, 1024): 0.50, ("first click", 1920, 1080): 0.45, ("first click", 3840, 2160): 0.22}


@dataclass(frozen=True)
class Target:
    """Something that is aimed at.

    Attributes:
        name: What.
        limit: The most that is good, or with ``at_least`` the least.
        value: What was measured.
        unit: Of both; empty for ratios.
        at_least: Whether more is better.
    """

    name: str
    limit: float
    value: float
    unit: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the value is good."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def targets(run: Run) -> list[Target]:
    """Compare a run with the targets; those that it did not measure are left out."""
    return [target for measured in run.measured if measured.setup == TARGET_SETUP for target in _targets(measured)]


def _targets(measured: Measured) -> Iterator[Target]:
    for click in measured.of(Click):
        limit = _CLICKS.get((click.workload, click.width, click.height))
        if limit is not None:
            name = f"{click.workload}, {_masks(click)}, {_size(click)}, {click.logits} logits: stream / in process"
            yield Target(name, limit, click.ratios()["stream"])
    for start in measured.of(Start):
        if start.what == "encode":
            name = f"encode, {_size(start)}: service / in process"
            yield Target(name, 0.90, start.ratios()["service"])
    for row in measured.of(Throughput):
        if row.sessions == 16:
            name = "clicks per second of 16 sessions / one loop in process"
            yield Target(name, 1.8, row.ratios()["clicks_per_second"], at_least=True)
    for clicks in measured.of(Meanwhile):
        yield Target("click p99 while another session encodes / idle p99", 2.0, clicks.ratios()["p99"])
    for added in measured.of(Added):
        yield Target("added to the decode in the worker, p50", 2.0, added.added.p50 * 1e3, "ms")
    for memory in measured.of(Memory):
        yield Target("memory per open session", 2.0, memory.server / MiB, "MiB")


def as_json(run: Run) -> dict[str, Any]:
    """Return a run as JSON takes it; times in seconds, memory and traffic in bytes."""
    return {
        "commit": run.commit,
        "dirty": run.dirty,
        "date": run.date,
        "quick": run.quick,
        "versions": run.versions,
        "machine": asdict(run.machine),
        "targets": [{**asdict(target), "met": target.met} for target in targets(run)],
        "measured": [_measured_as_json(measured) for measured in run.measured],
    }


def _measured_as_json(measured: Measured) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in measured.rows:
        rows.setdefault(row.kind, []).append({**asdict(row), "ratios": row.ratios()})
    return {"setup": asdict(measured.setup), **rows}


def as_markdown(run: Run) -> str:
    """Return a run as Markdown: the targets, and what was measured of each setup."""
    blocks = [_heading(run)]
    if found := targets(run):
        head = ("target", "at most or at least", "measured", "")
        blocks.append(_table(head, [(one.name, _limit(one), _value(one), _verdict(one)) for one in found]))
    for measured in run.measured:
        setup = measured.setup
        blocks.append(f"### {setup.model}, {setup.dtype}, {'CUDA' if setup.device == 'cuda' else 'CPU'}")
        blocks += _tables(measured)
    return "\n\n".join(blocks) + "\n"


def replace_block(document: str, block: str) -> str:
    """Put a block between the marks of a document, in place of what is there.

    Raises:
        ValueError: If the marks are missing.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{block.strip()}\n\n{END}{after}"


def _heading(run: Run) -> str:
    machine = run.machine
    parts = [f"{machine.cores} cores of {machine.cpu}", f"{machine.memory_gib:g} GiB"]
    if machine.gpu:
        parts.append(machine.gpu)
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    changed = " with changes" if run.dirty else ""
    quick = " A quick run: few rounds." if run.quick else ""
    return f"{run.date}, commit {run.commit[:12]}{changed}; {', '.join(parts)}; {versions}.{quick}"


def _tables(measured: Measured) -> Iterator[str]:
    if clicks := measured.of(Click):
        yield _table(
            (
                "click, p50 / p99 in ms",
                "logits",
                "in process",
                "unary",
                "stream",
                "unary ratio",
                "stream ratio",
            ),
            [
                (
                    f"{click.workload}, {_masks(click)}, {_size(click)}",
                    click.logits,
                    *(_milliseconds(stats) for stats in (click.reference, click.unary, click.stream)),
                    *(f"{ratio:.2f}" for ratio in click.ratios().values()),
                )
                for click in clicks
            ],
        )
    if rows := measured.of(Throughput):
        yield _table(
            ("clicks per second", "one loop in process", "service", "ratio", "latency, p50 / p99 in ms"),
            [
                (
                    f"{row.sessions} session{'s' if row.sessions > 1 else ''}",
                    f"{row.reference:.1f}",
                    f"{row.service:.1f}",
                    f"{row.ratios()['clicks_per_second']:.2f}",
                    _milliseconds(row.latency),
                )
                for row in rows
            ],
        )
    if starts := measured.of(Start):
        yield _table(
            ("new image, p50 / p99 in ms", "in process", "service", "ratio"),
            [
                (
                    f"{start.what}, {_size(start)}",
                    _milliseconds(start.reference),
                    _milliseconds(start.service),
                    f"{start.ratios()['service']:.2f}",
                )
                for start in starts
            ],
        )
    if traffic := measured.of(Traffic):
        yield _table(
            ("bytes per click, to / from the server", "logits", "unary", "stream"),
            [
                (
                    row.workload,
                    row.logits,
                    f"{row.unary_to_server:,.0f} / {row.unary_to_client:,.0f}",
                    f"{row.stream_to_server:,.0f} / {row.stream_to_client:,.0f}",
                )
                for row in traffic
            ],
        )
    if other := list(_other(measured)):
        yield _table(("sessions and server", "measured"), other)


def _other(measured: Measured) -> Iterator[tuple[str, str]]:
    for added in measured.of(Added):
        yield "added by stream, session and worker process, p50 / p99", f"{_milliseconds(added.added)} ms"
        yield "added on the same way with nothing done on it, p50 / p99", f"{_milliseconds(added.bare)} ms"
    for clicks in measured.of(Meanwhile):
        yield "click on an idle server, p50 / p99", f"{_milliseconds(clicks.idle)} ms"
        name = f"click while another client encodes ({clicks.encoded} images), p50 / p99"
        yield name, f"{_milliseconds(clicks.busy)} ms"
    for memory in measured.of(Memory):
        name = f"memory per open session ({memory.sessions} open), server / worker process"
        yield name, f"{memory.server / MiB:.2f} / {memory.worker / MiB:.2f} MiB"
    for cold in measured.of(ColdStart):
        yield "cold start, to the address / to the first mask", f"{cold.address.p50:.1f} / {cold.first_mask.p50:.1f} s"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _milliseconds(stats: Stats) -> str:
    return f"{stats.p50 * 1e3:.1f} / {stats.p99 * 1e3:.1f}"


def _masks(click: Click) -> str:
    return f"{click.masks} mask{'s' if click.masks > 1 else ''}"


def _size(row: Click | Start) -> str:
    return f"{row.width} x {row.height}"


def _limit(target: Target) -> str:
    return f"{'>=' if target.at_least else '<='} {target.limit:.2f}{target.unit and ' ' + target.unit}"


def _value(target: Target) -> str:
    return f"{target.value:.2f}{target.unit and ' ' + target.unit}"


def _verdict(target: Target) -> str:
    return "met" if target.met else "**missed**"
