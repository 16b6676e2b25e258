"""Writing down what came of a run: its figures as JSON, with what it ran on, and a picture."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import commit, machine, versions
from tests.reliability.record import Outcome


def write(name: str, settings: dict[str, Any], outcome: Outcome, folder: Path) -> Path:
    """Write ``NAME.json`` into a folder, which is made; return the file.

    Args:
        name: Of the run.
        settings: What it was told.
        outcome: What came of it.
        folder: Where.
    """
    revision, changed = commit()
    on = machine(gpu=False)
    about = {
        "run": name,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": revision + (" with changes" if changed else ""),
        "machine": {"cpu": on.cpu, "cores": on.cores, "memory_gib": on.memory_gib},
        "versions": versions(),
        "settings": settings,
        "claims": outcome.claims,
        "figures": outcome.figures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    return file
