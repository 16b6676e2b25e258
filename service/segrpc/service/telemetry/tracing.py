"""Traces over OTLP: a span for each call, below it one for each round of a stream, and below those the stages.

Workers tell how long stages took, not when they began; so a worker needs no SDK. Stages run one after the other and end
when the answer comes: that is where their spans are put, and what is left before them is waiting and the way.
"""

import time

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)
from opentelemetry.util.types import AttributeValue

from segrpc.service.telemetry.call import STAGES, Call, Computation, Observer
from segrpc.service.telemetry.otlp import EXPORT_SECONDS, hurried
from segrpc.service.telemetry.trace_parent import TraceParent

# Of servers, as OpenTelemetry defines it: the others are the callers' own.
_SERVER_ERRORS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")


class Tracing(Observer):
    """Makes spans of calls and sends them, in batches, from a thread.

    What is sampled is the caller's decision, if it told its span, else that of ``OTEL_TRACES_SAMPLER``: by default all.

    Args:
        endpoint: The receiver's URL, without a path.
        server: Says who tells.
    """

    def __init__(self, endpoint: str, server: Resource) -> None:
        self._endpoint = endpoint
        self._exporter = OTLPSpanExporter(f"{endpoint}/v1/traces", timeout=EXPORT_SECONDS)
        self._provider = TracerProvider(resource=server, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("segrpc")
        self._spans: dict[Call, Span] = {}

    def start(self) -> str:
        """Spans are sent from the beginning."""
        return f"traces are sent to {self._endpoint}"

    def stop(self) -> None:
        """Send what is left."""
        with hurried(self._exporter.shutdown):
            self._provider.shutdown()

    def began(self, call: Call) -> None:
        """Begin the span of a call."""
        if not call.own:
            return
        name, parent = call.method[1:], call.trace_parent
        span = self._tracer.start_span(
            name,
            None if parent is None else set_span_in_context(_remote(parent)),
            SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": name},
            start_time=_wall(call.start),
        )
        self._spans[call] = span
        call.trace_id = f"{span.get_span_context().trace_id:032x}"

    def computed(self, call: Call, computation: Computation) -> None:
        """Make the spans of what an engine did."""
        span = self._spans.get(call)
        if span is None or not span.is_recording():
            return
        told: dict[str, AttributeValue] = {
            "segrpc.model": computation.model,
            "segrpc.queue_seconds": computation.times.queue,
            "segrpc.embedding_cached": computation.times.embedding_cached,
        }
        end = _wall(computation.start + computation.seconds)
        if computation.kind in ("segment", "encode"):  # all that the call is about
            span.set_attributes(told)
            self._stages(span, computation, end)
            return
        start = _wall(computation.start)
        below = self._tracer.start_span(computation.kind, set_span_in_context(span), attributes=told, start_time=start)
        self._stages(below, computation, end)
        below.end(end)

    def _stages(self, span: Span, computation: Computation, end: int) -> None:
        ran = [(stage, int(getattr(computation.times, stage) * 1e9)) for stage in STAGES[1:]]
        begins = end - sum(nanoseconds for _, nanoseconds in ran)
        context = set_span_in_context(span)
        for stage, nanoseconds in ran:
            if nanoseconds:
                attributes = {"segrpc.model": computation.model}
                below = self._tracer.start_span(stage, context, attributes=attributes, start_time=begins)
                begins += nanoseconds
                below.end(begins)

    def ended(self, call: Call) -> None:
        """End the span of a call."""
        span = self._spans.pop(call, None)
        if span is None:
            return
        told = {"segrpc.model": call.model, "segrpc.request_id": call.request_id, "enduser.id": call.principal}
        span.set_attributes({name: value for name, value in told.items() if value})
        span.set_attribute("rpc.response.status_code", call.status)
        if call.status != "OK":
            span.set_attribute("error.type", call.reason or call.status)
        if call.status in _SERVER_ERRORS:
            span.set_status(Status(StatusCode.ERROR, call.error))
        span.end(_wall(call.start + call.seconds))


def _remote(parent: TraceParent) -> Span:
    flags = TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT)
    return NonRecordingSpan(SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), True, flags))


def _wall(moment: float) -> int:
    """Turn a moment of `time.perf_counter` into nanoseconds since the epoch."""
    return time.time_ns() + int((moment - time.perf_counter()) * 1e9)
