"""How runs of the benchmark are shown; what they measure is not asserted anywhere."""

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.benchmarks import report
from tests.benchmarks.values import (
    Added,
    Click,
    ColdStart,
    Logits,
    Machine,
    Meanwhile,
    Measured,
    Memory,
    Row,
    Run,
    Setup,
    Stages,
    Start,
    Stats,
    Throughput,
    Traffic,
)

GPU = Setup("cuda", "sam2.1-hiera-large", "bfloat16")


def stats(p50: float) -> Stats:
    return Stats(p50, 2 * p50, p50 / 2, 25)


def click(workload: str, width: int, height: int, ratio: float, logits: Logits = "smooth") -> Click:
    masks = 1 if workload == "refinement" else 3
    stages = Stages(0.0, 0.02, 0.005, 0.001)
    return Click(workload, masks, width, height, logits, stats(0.1), stats(0.09), stats(0.1 * ratio), stages)


GOOD: tuple[Row, ...] = (
    click("refinement", 1024, 1024, 0.4),
    click("first click", 1024, 1024, 0.99),
    click("first click", 1920, 1080, 0.4),
    click("first click", 3840, 2160, 0.2),
    Traffic("first click", "smooth", 193.2, 18371.0, 66.4, 17529.0),
    Throughput(1, 15.0, 30.0, stats(0.03)),
    Throughput(16, 15.0, 45.0, stats(0.3)),
    Start("encode", 1024, 1024, stats(2.0), stats(1.0)),
    Start("first mask", 1024, 1024, stats(2.0), stats(4.0)),
    Added(stats(0.03), stats(0.029), stats(0.001), stats(0.001)),
    Meanwhile(stats(0.03), stats(0.045), 12),
    Memory(64, 1.5 * 2**20, 0.0),
    ColdStart(stats(3.0), stats(6.0)),
)
BAD: tuple[Row, ...] = (
    click("refinement", 1024, 1024, 0.6),
    click("first click", 1920, 1080, 0.5),
    click("first click", 3840, 2160, 0.3),
    Throughput(16, 15.0, 20.0, stats(0.3)),
    Start("encode", 1024, 1024, stats(1.0), stats(1.0)),
    Added(stats(0.03), stats(0.027), stats(0.003), stats(0.001)),
    Meanwhile(stats(0.03), stats(0.09), 12),
    Memory(64, 3 * 2**20, 0.0),
)


def run_of(rows: Sequence[Row], setup: Setup = report.TARGET_SETUP) -> Run:
    return Run(
        commit="0123456789abcdef0123456789abcdef01234567",
        dirty=False,
        date="2026-01-02",
        quick=False,
        versions={"python": "3.11.7", "torch": "2.13.0"},
        machine=Machine("A CPU", 2, 16.0, None),
        measured=(Measured(setup, tuple(rows)),),
    )


def test_all_targets_are_met_by_a_good_run() -> None:
    found = report.targets(run_of(GOOD))
    assert len(found) == len(BAD)
    assert all(target.met for target in found)


@pytest.mark.parametrize("row", BAD, ids=lambda row: row.kind)
def test_what_is_too_slow_misses_its_target(row: Row) -> None:
    (target,) = report.targets(run_of([row]))
    assert not target.met


def test_a_target_is_met_at_its_limit() -> None:
    (target,) = report.targets(run_of([Throughput(16, 10.0, 18.0, stats(0.3))]))
    assert target.at_least
    assert target.met
    (target,) = report.targets(run_of([Memory(64, 2 * 2**20, 0.0)]))
    assert not target.at_least
    assert target.met


def test_each_kind_of_logits_has_its_own_target() -> None:
    rows = [click("refinement", 1024, 1024, 0.4), click("refinement", 1024, 1024, 0.6, "rough")]
    smooth, rough = report.targets(run_of(rows))
    assert (smooth.met, rough.met) == (True, False)
    assert "smooth" in smooth.name
    assert "rough" in rough.name


def test_other_setups_have_no_targets() -> None:
    run = run_of(BAD, GPU)
    assert report.targets(run) == []
    assert "missed" not in report.as_markdown(run)


def test_json_has_what_it_ran_on_targets_and_all_rows() -> None:
    run = replace(run_of(GOOD), dirty=True, machine=Machine("A CPU", 2, 16.0, "A GPU"))
    found = json.loads(json.dumps(report.as_json(run)))
    assert found["commit"] == run.commit
    assert found["dirty"] is True
    assert found["quick"] is False
    assert found["date"] == "2026-01-02"
    assert found["versions"] == {"python": "3.11.7", "torch": "2.13.0"}
    assert found["machine"] == {"cpu": "A CPU", "cores": 2, "memory_gib": 16.0, "gpu": "A GPU"}
    assert [target["met"] for target in found["targets"]] == [True] * len(BAD)
    assert {"name", "limit", "value", "unit", "at_least", "met"} == found["targets"][0].keys()
    (measured,) = found["measured"]
    assert measured["setup"] == {"device": "cpu", "model": "sam2.1-hiera-tiny", "dtype": "float32"}
    assert sum(len(rows) for kind, rows in measured.items() if kind != "setup") == len(GOOD)
    first = measured["clicks"][0]
    assert first["reference"] == {"p50": 0.1, "p99": 0.2, "min": 0.05, "n": 25}
    assert first["stages"] == {"queue": 0.0, "decode_mask": 0.02, "postprocess": 0.005, "rest": 0.001}
    assert first["ratios"] == {"unary": pytest.approx(0.9), "stream": pytest.approx(0.4)}
    assert measured["throughput"][1]["ratios"] == {"clicks_per_second": 3.0}
    assert measured["meanwhile"][0]["ratios"] == {"p50": 1.5, "p99": 1.5}


def test_markdown_shows_targets_and_each_setup() -> None:
    run = replace(run_of(GOOD), measured=(Measured(report.TARGET_SETUP, GOOD), Measured(GPU, GOOD)))
    text = report.as_markdown(run)
    assert "commit 0123456789ab;" in text
    assert "| clicks per second of 16 sessions / one loop in process | >= 1.80 | 3.00 | met |" in text
    assert "| memory per open session | <= 2.00 MiB | 1.50 MiB | met |" in text
    assert "### sam2.1-hiera-tiny, float32, CPU" in text
    assert "### sam2.1-hiera-large, bfloat16, CUDA" in text
    line = "| refinement, 1 mask, 1024 x 1024 | smooth | 100.0 / 200.0 | 90.0 / 180.0 | 40.0 / 80.0 | 0.90 | 0.40 |"
    assert text.count(line) == 2
    assert "| first click | smooth | 193 / 18,371 | 66 / 17,529 |" in text
    assert "| cold start, to the address / to the first mask | 3.0 / 6.0 s |" in text


def test_markdown_tells_quick_runs_and_missed_targets() -> None:
    text = report.as_markdown(replace(run_of(BAD), quick=True, dirty=True))
    assert "with changes" in text
    assert "A quick run" in text
    assert text.count("| **missed** |") == len(BAD)


def test_tables_are_as_wide_as_their_heads() -> None:
    for block in report.as_markdown(run_of(GOOD)).split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.strip().splitlines()}) == 1


def test_the_block_of_a_document_is_replaced_and_nothing_else() -> None:
    before = f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nMore.\n"
    after = report.replace_block(before, "new\n")
    assert after == f"# Title\n\n{report.BEGIN}\n\nnew\n\n{report.END}\n\nMore.\n"
    assert report.replace_block(after, "new\n") == after


@pytest.mark.parametrize("document", ["", report.BEGIN, report.END, f"{report.END} {report.BEGIN}"])
def test_a_document_without_the_marks_is_refused(document: str) -> None:
    with pytest.raises(ValueError, match="the document has no"):
        report.replace_block(document, "new")


def test_statistics_of_measurements() -> None:
    found = Stats.of([float(number) for number in range(101)])
    assert found == Stats(50.0, 99.0, 0.0, 101)
