"""Metrics for Prometheus, over HTTP."""

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from segrpc.service.telemetry.instruments import Distribution, Family

_UNITS = {"s": "_seconds", "By": "_bytes"}


class PrometheusEndpoint:
    """Answers ``GET /metrics``, from threads of its own.

    Args:
        address: Where to listen, HOST:PORT; port 0 takes a free one.
        collect: Tells everything; called in those threads.
    """

    def __init__(self, address: str, collect: Callable[[], Iterable[Family]]) -> None:
        self._address = address
        self._registry = CollectorRegistry()
        self._registry.register(_Families(collect))
        ProcessCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._serving: tuple[WSGIServer, threading.Thread] | None = None

    def start(self) -> str:
        """Listen.

        Raises:
            OSError: If the address cannot be listened on.
        """
        host, _, port = self._address.rpartition(":")
        try:
            server, thread = start_http_server(int(port), host.strip("[]"), self._registry)
        except OSError as error:
            raise OSError(
                f"cannot listen on {self._address} for metrics: is the address right, and free? ({error})"
            ) from error
        self._serving = server, thread
        return f"metrics are at http://{host}:{server.server_port}/metrics"

    def stop(self) -> None:
        """Close the port."""
        if self._serving is not None:
            server, thread = self._serving
            server.shutdown()
            server.server_close()
            thread.join()
            self._serving = None


class _Families(Collector):
    def __init__(self, collect: Callable[[], Iterable[Family]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        return map(as_prometheus, self._collect())


def prometheus_name(family: Family) -> str:
    """Write a name as OpenTelemetry prescribes it for Prometheus; counters get ``_total`` from the client library."""
    return re.sub(r"\W", "_", family.name) + _UNITS.get(family.unit, "")


def as_prometheus(family: Family) -> Metric:
    """Turn what an instrument has measured into Prometheus' terms."""
    name, labels = prometheus_name(family), [re.sub(r"\W", "_", label) for label in family.labels]
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(name, family.description, labels=labels)
        bounds = [*map(floatToGoString, family.bounds), "+Inf"]
        for values, seen in family.points:
            assert isinstance(seen, Distribution)
            buckets = list(zip(bounds, map(float, accumulate(seen.counts)), strict=True))
            histogram.add_metric(values, buckets, seen.total)
        return histogram
    make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    plain = make(name, family.description, labels=labels)
    for values, value in family.points:
        assert not isinstance(value, Distribution)
        plain.add_metric(values, value)
    return plain
