"""The plot of the benchmark."""

from pathlib import Path

from PIL import Image

from tests.benchmarks import plot
from tests.benchmarks.report import TARGET_SETUP
from tests.benchmarks.values import Click, Logits, Measured, Row, Stages, Stats


def test_it_draws_both_kinds_of_logits(tmp_path: Path) -> None:
    kinds: tuple[Logits, ...] = ("smooth", "rough")
    stats = Stats(0.1, 0.2, 0.05, 9)
    rows: list[Row] = [
        Click(workload, 3, width, 1024, logits, stats, stats, stats, Stages(0.0, 0.08, 0.015, 0.005))
        for logits in kinds
        for workload in ("first click", "refinement", "box")
        for width in (1024, 2048)
    ]
    file = tmp_path / "images" / "latency.png"
    plot.draw(Measured(TARGET_SETUP, tuple(rows)), file)
    with Image.open(file) as image:
        assert image.format == "PNG"
        colors = image.convert("RGB").getcolors(image.width * image.height)
    assert colors is not None
    counts = {color: count for count, color in colors}
    # White paper, the reference's bars and those of decoding in two panels.
    assert counts[(255, 255, 255)] > counts[(176, 176, 176)] > 10_000
    assert counts[(31, 119, 180)] > 10_000
