"""The trace that a caller is in: ``traceparent`` of W3C Trace Context."""

import re
from dataclasses import dataclass

_FORMAT = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})(?P<span>[0-9a-f]{16})"
    r"-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?"
)


@dataclass(frozen=True, slots=True)
class TraceParent:
    """The span that a call belongs to.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16 hexadecimal digits.
        sampled: Whether the caller records its part of the trace.
    """

    trace_id: str
    span_id: str
    sampled: bool


def parse_trace_parent(value: str) -> TraceParent | None:
    """Read a ``traceparent``; None if it is none, which callers are not told: it is not what the call is about."""
    found = _FORMAT.fullmatch(value)
    if found is None or (found["version"] == "00" and found["more"]):  # later versions may have more
        return None
    return TraceParent(found["trace"], found["span"], bool(int(found["flags"], 16) & 1))
