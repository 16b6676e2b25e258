"""Pictures of the long runs."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.reliability.memory import Sample
from tests.reliability.record import Answer

_BLUE, _ORANGE, _GREY, _RED = "#1f77b4", "#ff7f0e", "#b0b0b0", "#d62728"
_BINS = 60


def soak(samples: Sequence[Sample], answers: Sequence[Answer], file: Path) -> None:
    """Draw memory over time, and how long edits took over time."""
    figure, (memory, edits) = _panels(2)
    at = [sample.at for sample in samples]
    memory.plot(at, [sample.server for sample in samples], color=_BLUE, label="server")
    memory.plot(at, [sample.workers for sample in samples], color=_ORANGE, label="worker")
    memory.set_ylabel("resident memory, MiB")
    memory.set_ylim(bottom=0)
    memory.legend(frameon=False, fontsize=9)
    _latencies(edits, answers)
    _save(figure, file)


def chaos(kills: Sequence[float], cuts: Sequence[float], answers: Sequence[Answer], file: Path) -> None:
    """Draw how many edits were acknowledged over time and how long they took, with what was done to the server."""
    figure, (rate, edits) = _panels(2)
    at = [answer.at for answer in answers if answer.kind in ("edit", "drag")]
    rate.hist(at, bins=_BINS, color=_BLUE)
    rate.set_ylabel("edits acknowledged")
    _latencies(edits, answers)
    for panel in (rate, edits):
        for times, color, label in ((kills, _RED, "worker killed"), (cuts, _GREY, "connections cut")):
            for i, time in enumerate(times):
                panel.axvline(time, color=color, linewidth=0.8, label=label if i == 0 else None)
    rate.legend(frameon=False, fontsize=9)
    _save(figure, file)


def overload(rates: dict[str, dict[str, float]], file: Path) -> None:
    """Draw what was answered in time, and what was not, per second, for each kind of load."""
    figure, (panel,) = _panels(1)
    names = list(rates)
    bottom = [0.0] * len(names)
    for outcome, color in (("in time", _BLUE), ("refused", _GREY), ("too late", _RED)):
        heights = [rates[name][outcome] for name in names]
        panel.bar(names, heights, bottom=bottom, color=color, label=outcome, width=0.6)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    panel.axhline(rates[names[0]]["in time"], color="black", linewidth=0.8, linestyle="--")
    panel.set_ylabel("calls per second")
    panel.set_xlabel("")
    panel.legend(frameon=False, fontsize=9)
    _save(figure, file)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(10, 3.2 * count), layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Axes] = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("seconds")
    return figure, panels


def _latencies(panel: Axes, answers: Sequence[Answer]) -> None:
    edits = [answer for answer in answers if answer.kind == "edit"]
    panel.plot([edit.at for edit in edits], [edit.seconds for edit in edits], ".", markersize=2, color=_BLUE)
    panel.set_yscale("log")
    panel.set_ylabel("an edit's latency, s")


def _save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
