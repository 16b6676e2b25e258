"""A picture of where the time of a click goes, beside the reference's."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.benchmarks.values import Click, Logits, Measured, stage_names

_REFERENCE = "#b0b0b0"
_COLORS = ("#9467bd", "#1f77b4", "#2ca02c", "#ff7f0e")
_LABELS = {
    "queue": "queue",
    "decode_mask": "decode: embedding and prompt to logits",
    "postprocess": "postprocess: logits to masks",
    "rest": "rest: transport, session, client",
}
_WORKLOADS = ("first click", "refinement")


def draw(measured: Measured, file: Path) -> None:
    """Draw the median latency by stage as a PNG, a panel for each kind of logits."""
    clicks = [click for click in measured.of(Click) if click.workload in _WORKLOADS]
    kinds: list[Logits] = sorted({click.logits for click in clicks}, reverse=True)
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        _panel(panel, [click for click in clicks if click.logits == kind])
        panel.set_title(f"{kind} logits", fontsize=10)
    panels[0].set_ylabel("median latency, ms")
    setup = measured.setup
    figure.suptitle(f"A click on an encoded image: {setup.model}, {setup.dtype}, {setup.device.upper()}", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def _panel(panel: Axes, clicks: list[Click]) -> None:
    clicks = sorted(clicks, key=lambda click: (_WORKLOADS.index(click.workload), click.width))
    width = 0.38
    for place, click in enumerate(clicks):
        first = place == 0  # has the legend's entries
        left, right = place - width / 2, place + width / 2
        label = "in-process reference" if first else None
        panel.bar(left, click.reference.p50 * 1e3, width, color=_REFERENCE, label=label)
        bottom = 0.0
        for name, color in zip(stage_names(), _COLORS, strict=True):
            height = max(0.0, float(getattr(click.stages, name)) * 1e3)
            panel.bar(right, height, width, bottom=bottom, color=color, label=_LABELS[name] if first else None)
            bottom += height
        ratio = click.ratios()["stream"]
        panel.annotate(f"{ratio:.2f}", (right, bottom), ha="center", va="bottom", fontsize=8)
    panel.set_xticks(range(len(clicks)), [_tick(click) for click in clicks], fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _tick(click: Click) -> str:
    return f"{click.workload}\n{click.masks} mask{'s' if click.masks > 1 else ''}\n{click.width} x\n{click.height}"
