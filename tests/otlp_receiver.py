"""A receiver of OTLP over HTTP, in the test's process."""

import http.server
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.web_server import web_server

SECONDS = 60.0  # to wait for what must come


class OtlpReceiver:
    """What a server has sent.

    Attributes:
        address: Its ``HOST:PORT``.
        spans: All spans so far.
        metrics: The newest metrics, by name.
        resource: The attributes of whoever sent last.
    """

    def __init__(self) -> None:
        self.address = ""
        self.spans: list[Span] = []
        self.metrics: dict[str, Metric] = {}
        self.resource: dict[str, Any] = {}
        self._requests: queue.SimpleQueue[ExportTraceServiceRequest | ExportMetricsServiceRequest] = queue.SimpleQueue()

    def take(self, path: str, body: bytes) -> bool:
        """Take a request; return whether it is for a path that OTLP has."""
        if path == "/v1/traces":
            self._requests.put(ExportTraceServiceRequest.FromString(body))
        elif path == "/v1/metrics":
            self._requests.put(ExportMetricsServiceRequest.FromString(body))
        return path in ("/v1/traces", "/v1/metrics")

    def next(self, seconds: float = SECONDS) -> None:
        """Wait for the next request, and look at it."""
        request = self._requests.get(timeout=seconds)
        if isinstance(request, ExportTraceServiceRequest):
            for group in request.resource_spans:
                self.resource = attributes(group.resource.attributes)
                self.spans += [span for scope in group.scope_spans for span in scope.spans]
        else:
            for measured in request.resource_metrics:
                self.resource = attributes(measured.resource.attributes)
                self.metrics = {metric.name: metric for scope in measured.scope_metrics for metric in scope.metrics}

    def span(self, name: str, **told: Any) -> Span:
        """Wait for the span with a name and attributes, of which there must be one."""
        deadline = time.monotonic() + SECONDS
        while not (found := self.find(name, **told)):
            self.next(max(0.0, deadline - time.monotonic()))
        (span,) = found
        return span

    def find(self, name: str, **told: Any) -> list[Span]:
        """The spans so far with a name and attributes."""
        return [one for one in self.spans if one.name == name and attributes(one.attributes).items() >= told.items()]

    def below(self, parent: Span) -> list[Span]:
        """The spans so far that belong to another directly, by their beginning."""
        found = [span for span in self.spans if span.parent_span_id == parent.span_id]
        return sorted(found, key=lambda span: span.start_time_unix_nano)


def attributes(given: Any) -> dict[str, Any]:
    """Attributes by name."""

    def value(one: KeyValue) -> Any:
        return getattr(one.value, one.value.WhichOneof("value") or "string_value")

    return {one.key: value(one) for one in given}


@contextmanager
def otlp_receiver() -> Iterator[OtlpReceiver]:
    """Receive until the context ends."""
    receiver = OtlpReceiver()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken = receiver.take(self.path, self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200 if taken else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with web_server(Handler) as address:
        receiver.address = address
        yield receiver
