"""What is known of a call, and who is told of it."""

import time
from dataclasses import dataclass, field
from typing import Literal

from segrpc.service.engine.base import StageTimes
from segrpc.service.telemetry.trace_parent import TraceParent

STAGES = ("queue", "decode_image", "encode_image", "decode_mask", "postprocess")
"""The names of `StageTimes`, in the order in which the stages of a job run."""

Kind = Literal["segment", "encode", "round", "warm_up"]


@dataclass(frozen=True, slots=True)
class Computation:
    """What an engine did for a call. A stream has many of them.

    Attributes:
        kind: ``segment`` and ``encode`` for the method's own, ``round`` for one of a stream's, ``warm_up`` for the
            image that a stream encodes ahead.
        model: The model's name.
        times: Where the time went, as the worker tells it.
        start: When the engine was asked, by `time.perf_counter`.
        seconds: How long it took.
    """

    kind: Kind
    model: str
    times: StageTimes
    start: float
    seconds: float


class Observer:
    """Is told of calls, on the event loop; this one does nothing. Its methods are quick and raise nothing."""

    def began(self, call: "Call") -> None:
        """Note that a call began."""

    def computed(self, call: "Call", computation: Computation) -> None:
        """Note that an engine did something for a call."""

    def ended(self, call: "Call") -> None:
        """Note that a call ended; all is known of it now."""


@dataclass(eq=False, slots=True)
class Call:
    """What is known of a call: the boundary and the handlers fill it in, `Observer`s read it.

    Attributes:
        method: Its method, such as ``/segrpc.v1.SegmentationService/Segment``; ``/other`` for all that there are not.
        own: Whether that is a method of this project's services, not of health or reflection.
        observers: Are told of it.
        trace_parent: The caller's span, if it told one.
        principal: Who calls; empty where callers are not identified.
        request_id: The request's id.
        model: The model that it is about; empty if there is none, or it was not found.
        received_bytes: The size of the messages that came.
        sent_bytes: The size of the messages that went.
        edits: The edits that came over a stream.
        rounds: What was computed for them.
        finished: Whether a stream's session came to its end; otherwise it waits to be resumed.
        times: What all computations took together. ``embedding_cached`` is that of the last.
        longest: The longest that each stage took in one computation.
        status: The name of the status code. Until the call has ended: what it is if it is cut off.
        reason: The word of the table of errors.
        error: What was wrong, for people.
        trace_id: The trace that it is part of, 32 hexadecimal digits; empty without one.
        start: When it began, by `time.perf_counter`.
        seconds: How long it took, once it has ended.
    """

    method: str
    own: bool = True
    observers: tuple[Observer, ...] = ()
    trace_parent: TraceParent | None = None
    principal: str = ""
    request_id: str = ""
    model: str = ""
    received_bytes: int = 0
    sent_bytes: int = 0
    edits: int = 0
    rounds: int = 0
    finished: bool = False
    times: StageTimes = field(default_factory=StageTimes)
    longest: StageTimes = field(default_factory=StageTimes)
    status: str = "CANCELLED"
    reason: str = ""
    error: str = ""
    trace_id: str = ""
    start: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0

    def begin(self) -> None:
        """Tell the observers that it begins."""
        if self.trace_parent is not None:
            self.trace_id = self.trace_parent.trace_id
        for observer in self.observers:
            observer.began(self)

    def computed(self, kind: Kind, model: str, times: StageTimes, start: float) -> None:
        """Note what an engine did.

        Args:
            kind: See `Computation`.
            model: The model's name.
            times: Where the time went.
            start: When the engine was asked, by `time.perf_counter`.
        """
        self.rounds += kind == "round"
        self.times.add(times)
        self.times.embedding_cached = times.embedding_cached
        for stage in STAGES:
            seconds = getattr(times, stage)
            if seconds > getattr(self.longest, stage):
                setattr(self.longest, stage, seconds)
        computation = Computation(kind, model, times, start, time.perf_counter() - start)
        for observer in self.observers:
            observer.computed(self, computation)

    def end(self) -> None:
        """Tell the observers that it has ended."""
        self.seconds = time.perf_counter() - self.start
        for observer in self.observers:
            observer.ended(self)
