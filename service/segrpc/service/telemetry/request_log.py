"""The log of requests: a line for each call, and at the level ``debug`` one for each round of a stream."""

import logging
from typing import Any

from segrpc.service.engine.base import StageTimes
from segrpc.service.engine.logs import FIELDS
from segrpc.service.telemetry.call import STAGES, Call, Computation, Observer

log = logging.getLogger("segrpc.rpc")

STREAM = "/segrpc.v1.SegmentationService/Refine"


class RequestLog(Observer):
    """Logs the calls of this project's services when they have ended."""

    def computed(self, call: Call, computation: Computation) -> None:
        """Log a round of a stream, for those who look for something."""
        if computation.kind in ("round", "warm_up") and log.isEnabledFor(logging.DEBUG):
            fields = {**_of(call), "duration_ms": _ms(computation.seconds), **_stages(computation.times)}
            log.debug("%s %s", call.method, computation.kind, extra={FIELDS: fields})

    def ended(self, call: Call) -> None:
        """Log a call."""
        if call.own and log.isEnabledFor(logging.INFO):
            log.info("%s", call.method, extra={FIELDS: _fields(call)})


def _fields(call: Call) -> dict[str, Any]:
    fields = {**_of(call), "status": call.status, "duration_ms": _ms(call.seconds), **_stages(call.times)}
    if call.method == STREAM:
        fields |= {
            "finished": call.finished,
            "edits": call.edits,
            "rounds": call.rounds,
            **_stages(call.longest, "max_"),
        }
    elif any(getattr(call.times, stage) for stage in STAGES):
        fields["embedding_cached"] = call.times.embedding_cached
    fields |= {"received_bytes": call.received_bytes, "sent_bytes": call.sent_bytes}
    told = {"reason": call.reason, "error": call.error}
    return fields | {name: value for name, value in told.items() if value}


def _of(call: Call) -> dict[str, Any]:
    """Return whose call it is, and about what."""
    told = {"principal": call.principal, "request_id": call.request_id, "model": call.model, "trace_id": call.trace_id}
    return {name: value for name, value in told.items() if value}


def _stages(times: StageTimes, prefix: str = "") -> dict[str, float]:
    """Return the stages that ran, in milliseconds."""
    return {f"{prefix}{stage}_ms": _ms(seconds) for stage in STAGES if (seconds := getattr(times, stage))}


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
