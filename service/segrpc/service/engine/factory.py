"""Making the engine that the operator chose."""

from typing import Literal

from segrpc.service.engine.base import Engine, EngineOptions
from segrpc.service.engine.inline import InlineEngine
from segrpc.service.engine.process import ProcessEngine

EngineKind = Literal["process", "inline"]


def create_engine(kind: EngineKind, options: EngineOptions) -> Engine:
    """Make an engine; it still has to be started.

    Args:
        kind: ``process`` for worker processes, one for each device; ``inline`` for threads of this process.
        options: What to run.
    """
    return ProcessEngine(options) if kind == "process" else InlineEngine(options)
