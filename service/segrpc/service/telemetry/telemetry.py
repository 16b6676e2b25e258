"""All that tells of a server, put together as the operator wants it."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from segrpc.service.errors import ConfigurationError
from segrpc.service.telemetry.call import Observer
from segrpc.service.telemetry.instruments import Family
from segrpc.service.telemetry.metrics import Metrics
from segrpc.service.telemetry.request_log import RequestLog
from segrpc.service.telemetry.statistics import Statistics

log = logging.getLogger("segrpc.telemetry")

T = TypeVar("T")

COLLECT_SECONDS = 5.0  # that a busy event loop has to tell its numbers to an exporter's thread


@dataclass(frozen=True, slots=True)
class TelemetryOptions:
    """What is told, and to whom.

    Attributes:
        metrics_listen: Where Prometheus may ask for metrics, as HOST:PORT; empty: nowhere.
        otlp_endpoint: The URL that metrics and traces are sent to, such as ``http://localhost:4318``; empty: nowhere.
    """

    metrics_listen: str = ""
    otlp_endpoint: str = ""


class Exporter(Protocol):
    """Has metrics or traces leave the process. Its methods block."""

    def start(self) -> str:
        """Begin; return what the operator may want to know.

        Raises:
            OSError: If an address cannot be listened on.
        """

    def stop(self) -> None:
        """Send what is left, as far as that takes seconds at most, and end."""


class Telemetry:
    """Tells of a server.

    Args:
        options: What, and to whom.
        statistics: Tells what the server holds; called on the event loop.

    Attributes:
        observers: Are to be told of each call.

    Raises:
        ConfigurationError: If packages are not installed that the options need.
    """

    def __init__(self, options: TelemetryOptions, statistics: Callable[[], Statistics]) -> None:
        self.observers: tuple[Observer, ...] = (RequestLog(),)
        self._metrics = Metrics(statistics)
        self._exporters: list[Exporter] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watch: asyncio.Task[None] | None = None
        if options.metrics_listen:
            self._exporters.append(_installed("metrics_listen", lambda: self._prometheus(options.metrics_listen)))
        if options.otlp_endpoint:
            self._exporters += _installed("otlp_endpoint", lambda: self._otlp(options.otlp_endpoint))
        if self._exporters:
            self.observers += (self._metrics,)

    def _prometheus(self, address: str) -> Exporter:
        from segrpc.service.telemetry.prometheus import PrometheusEndpoint  # from an extra

        return PrometheusEndpoint(address, self._collect)

    def _otlp(self, endpoint: str) -> list[Exporter]:
        from segrpc.service.telemetry.otlp import MetricExporter, resource
        from segrpc.service.telemetry.tracing import Tracing

        server = resource()
        tracing = Tracing(endpoint, server)
        self.observers = (tracing, *self.observers)  # first, so that the log has the trace
        return [MetricExporter(endpoint, server, self._collect), tracing]

    async def start(self) -> None:
        """Begin to tell.

        Raises:
            OSError: If an address cannot be listened on.
        """
        self._loop = asyncio.get_running_loop()
        for exporter in self._exporters:
            log.info("%s", await asyncio.to_thread(exporter.start))
        if self._exporters:
            self._watch = asyncio.create_task(self._metrics.watch_loop())

    async def stop(self) -> None:
        """Send what is left, and end."""
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.gather(*(asyncio.to_thread(exporter.stop) for exporter in self._exporters))

    def _collect(self) -> list[Family]:
        """Have the event loop tell everything; called in other threads."""

        async def collected() -> list[Family]:
            return self._metrics.collect()

        assert self._loop is not None  # exporters collect after they are started
        return asyncio.run_coroutine_threadsafe(collected(), self._loop).result(COLLECT_SECONDS)


def _installed(setting: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"{setting} needs the package {error.name}, which is not installed: pip install 'segrpc[telemetry]'"
        ) from error
