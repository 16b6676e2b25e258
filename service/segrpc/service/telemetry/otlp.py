"""Metrics over OTLP (HTTP, protobuf)."""

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from segrpc.service.telemetry.instruments import Distribution, Family, Labels

log = logging.getLogger("segrpc.telemetry")

EXPORT_SECONDS = 5.0  # that an export may take, tries included
STOP_SECONDS = 3.0  # for sending what is left; then an export that is under way is the last, and is not repeated
_INTERVAL = "OTEL_METRIC_EXPORT_INTERVAL"  # milliseconds, as OpenTelemetry defines it
_DEFAULT_INTERVAL = "60000"


def resource() -> Resource:
    """Say who tells: ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES``, and what they leave open."""
    given = Resource.create()
    # The SDK's word for a name that nobody has given.
    unnamed = str(given.attributes.get("service.name", "")).startswith("unknown_service")
    own = {"service.name": "segrpc"} if unnamed else {}
    defaults = Resource({"service.version": version("segrpc"), "service.instance.id": str(uuid.uuid4())})
    return defaults.merge(given).merge(Resource(own))


@contextmanager
def hurried(give_up: Callable[[], object]) -> Iterator[None]:
    """Do something that may wait for a receiver, and have it give up when that takes too long."""
    timer = threading.Timer(STOP_SECONDS, give_up)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class MetricExporter:
    """Sends metrics every ``OTEL_METRIC_EXPORT_INTERVAL`` milliseconds, 60,000 by default, and at the end.

    Args:
        endpoint: The receiver's URL, without a path.
        server: Says who tells.
        collect: Tells everything; called in a thread of the exporter's.
    """

    def __init__(self, endpoint: str, server: Resource, collect: Callable[[], Iterable[Family]]) -> None:
        self._endpoint = endpoint
        self._server = server
        self._collect = collect
        self._seconds = float(os.environ.get(_INTERVAL) or _DEFAULT_INTERVAL) / 1e3
        self._began = time.time_ns()
        self._exporter = OTLPMetricExporter(f"{endpoint}/v1/metrics", timeout=EXPORT_SECONDS)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="otlp-metrics", daemon=True)

    def start(self) -> str:
        """Begin to send."""
        self._thread.start()
        return f"metrics are sent to {self._endpoint} every {self._seconds:g} s"

    def stop(self) -> None:
        """Send once more, and end."""
        self._stopping.set()
        if self._thread.is_alive():
            with hurried(self._exporter.shutdown):
                self._thread.join()
        self._exporter.shutdown()

    def _work(self) -> None:
        while not self._stopping.wait(self._seconds):
            self._export()
        self._export()

    def _export(self) -> None:
        try:
            self._exporter.export(self._data())
        except Exception:  # it must go on, whatever goes wrong
            log.exception("metrics cannot be sent")

    def _data(self) -> MetricsData:
        now = time.time_ns()
        metrics = [as_otlp(family, self._began, now) for family in self._collect() if family.points]
        scope = ScopeMetrics(InstrumentationScope("segrpc", version("segrpc")), metrics, "")
        return MetricsData([ResourceMetrics(self._server, [scope], "")])


def as_otlp(family: Family, began: int, now: int) -> Metric:
    """Turn what an instrument has measured into OpenTelemetry's terms.

    Args:
        family: What was measured.
        began: Since when, in nanoseconds since the epoch.
        now: Until when.
    """

    def attributes(values: Labels) -> dict[str, str]:
        return dict(zip(family.labels, values, strict=True))

    def histogram(values: Labels, seen: Distribution) -> HistogramDataPoint:
        # The least and the largest value since the start say nothing: they are left out.
        return HistogramDataPoint(
            attributes(values),
            *(began, now, sum(seen.counts), seen.total, seen.counts, family.bounds),
            min=None,  # type: ignore[arg-type]
            max=None,  # type: ignore[arg-type]
        )

    data: Sum | Gauge | Histogram
    if family.kind == "histogram":
        seen = [histogram(values, value) for values, value in family.points if isinstance(value, Distribution)]
        data = Histogram(seen, AggregationTemporality.CUMULATIVE)
    else:
        numbers = [
            NumberDataPoint(attributes(values), began, now, value)
            for values, value in family.points
            if not isinstance(value, Distribution)
        ]
        counts = family.kind == "counter"
        data = Sum(numbers, AggregationTemporality.CUMULATIVE, is_monotonic=True) if counts else Gauge(numbers)
    return Metric(family.name, family.description, family.unit, data)
