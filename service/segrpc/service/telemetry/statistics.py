"""What a server holds at the moment."""

from collections.abc import Mapping
from dataclasses import dataclass

from segrpc.service.engine.base import EngineStats


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a server holds at the moment, and what it did so far.

    Attributes:
        calls: Calls of the segmentation and model services in progress.
        sessions: Interactive sessions, attached to a stream or not.
        attached_sessions: Those that are attached.
        session_bytes: About how much memory they take.
        images: Images that are known by their digest.
        image_bytes: Their size in bytes.
        tasks: Tasks of the event loop.
        taken: How much is taken of what is limited, by the names of the limits.
        limits: How much of it may be.
        engine: What the engine holds.
    """

    calls: int
    sessions: int
    attached_sessions: int
    session_bytes: int
    images: int
    image_bytes: int
    tasks: int
    taken: Mapping[str, int]
    limits: Mapping[str, int]
    engine: EngineStats
