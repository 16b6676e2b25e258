"""What is measured: calls, as gRPC's own metrics do (gRFC A66), stages of the models, and what the server holds.

Labels have few values: methods, models, lanes, stages, statuses, devices. Never what a client chose.
"""

import asyncio
import time
from collections.abc import Callable, Mapping

from segrpc.service.telemetry.call import STAGES, Call, Computation, Observer
from segrpc.service.telemetry.instruments import Counter, Description, Family, Histogram
from segrpc.service.telemetry.statistics import Statistics

# The buckets that gRFC A66 prescribes, in seconds and bytes.
SECONDS = (
    *(0, 0.00001, 0.00005, 0.0001, 0.0003, 0.0006, 0.0008, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01),
    *(0.013, 0.016, 0.02, 0.025, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8),
    *(1, 2, 5, 10, 20, 50, 100),
)
BYTES = (0, 1024, 2048, 4096, 16384, 65536, 262144, *(2**power for power in range(20, 33, 2)))
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)

LAG_SECONDS = 0.25  # between two looks at the event loop


class Metrics(Observer):
    """All instruments of a server.

    Args:
        statistics: Tells what the server holds.
    """

    def __init__(self, statistics: Callable[[], Statistics]) -> None:
        by_method = ("grpc.method", "grpc.status")
        self._started = Counter(Description("grpc.server.call.started", "{call}", "Calls begun.", by_method[:1]))
        self._duration = Histogram(
            Description("grpc.server.call.duration", "s", "How long calls took, streams included.", by_method), SECONDS
        )
        self._sent = Histogram(
            Description(
                "grpc.server.call.sent_total_compressed_message_size",
                "By",
                "What was sent in a call; nothing is compressed.",
                by_method,
            ),
            BYTES,
        )
        self._received = Histogram(
            Description(
                "grpc.server.call.rcvd_total_compressed_message_size",
                "By",
                "What came in a call, measured after it was decompressed.",
                by_method,
            ),
            BYTES,
        )
        self._computations = Histogram(
            Description(
                "segrpc.computation.duration",
                "s",
                "How long the engine took: for a call (segment, encode), a round of a session, or its image (warm_up).",
                ("segrpc.kind", "segrpc.model"),
            ),
            SECONDS,
        )
        self._stages = Histogram(
            Description(
                "segrpc.stage.duration",
                "s",
                "Where the time went, by stage; stages that did not run do not count.",
                ("segrpc.stage", "segrpc.model"),
            ),
            SECONDS,
        )
        self._batches = Histogram(
            Description(
                "segrpc.decode.batch_size", "{job}", "With how many jobs each was decoded together.", ("segrpc.model",)
            ),
            BATCHES,
        )
        self._lag = Histogram(
            Description("segrpc.event_loop.lag", "s", "How much later than asked for the event loop woke up."), SECONDS
        )
        self._statistics = statistics

    def began(self, call: Call) -> None:
        """Count a call."""
        self._started.add(1, call.method[1:])

    def computed(self, call: Call, computation: Computation) -> None:
        """Measure what an engine did."""
        model, times = computation.model, computation.times
        self._computations.record(computation.seconds, computation.kind, model)
        for stage in STAGES:
            seconds = getattr(times, stage)
            if seconds:
                self._stages.record(seconds, stage, model)
        if times.batch:
            self._batches.record(times.batch, model)

    def ended(self, call: Call) -> None:
        """Measure a call."""
        labels = call.method[1:], call.status
        self._duration.record(call.seconds, *labels)
        self._sent.record(call.sent_bytes, *labels)
        self._received.record(call.received_bytes, *labels)

    async def watch_loop(self) -> None:
        """Measure how late the event loop is, until cancelled."""
        while True:
            due = time.perf_counter() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            self._lag.record(max(0.0, time.perf_counter() - due))

    def collect(self) -> list[Family]:
        """Tell everything; only on the event loop."""
        measured = (
            *(self._started, self._duration, self._sent, self._received),
            *(self._computations, self._stages, self._batches, self._lag),
        )
        return [*(one.family() for one in measured), *held(self._statistics())]


def held(now: Statistics) -> list[Family]:
    """Tell what a server holds."""
    engine = now.engine

    def one(name: str, unit: str, description: str, value: float) -> Family:
        return Family(name, "gauge", unit, description, (), (((), value),))

    def count(name: str, unit: str, description: str, value: float) -> Family:
        return Family(name, "counter", unit, description, (), (((), value),))

    def each(name: str, unit: str, description: str, label: str, values: Mapping[str, int]) -> Family:
        points = tuple(((key,), value) for key, value in values.items())
        return Family(name, "gauge", unit, description, (label,), points)

    lanes = {"encode": engine.encoding, "decode": engine.decoding}
    tiers = {"device": engine.cached_embeddings, "host": engine.host_embeddings}
    tier_bytes = {"device": engine.cached_bytes, "host": engine.host_bytes}
    states = {"attached": now.attached_sessions, "detached": now.sessions - now.attached_sessions}
    return [
        one("segrpc.calls.active", "{call}", "Calls in progress.", now.calls),
        each("segrpc.sessions", "{session}", "Sessions, with a stream or without.", "segrpc.state", states),
        one("segrpc.session.memory", "By", "What sessions take: logits, masks, prompts.", now.session_bytes),
        one("segrpc.image_store.entries", "{image}", "Images known by digest.", now.images),
        one("segrpc.image_store.memory", "By", "What they take.", now.image_bytes),
        each("segrpc.limit.taken", "1", "How much is taken of what is limited.", "segrpc.limit", now.taken),
        each("segrpc.limit.allowed", "1", "How much of it may be.", "segrpc.limit", now.limits),
        one("segrpc.jobs.pending", "{job}", "Jobs that run or wait.", engine.pending),
        each("segrpc.lane.depth", "{work}", "Works that run or wait, by lane.", "segrpc.lane", lanes),
        each("segrpc.embedding_cache.entries", "{image}", "Embeddings at hand.", "segrpc.tier", tiers),
        each("segrpc.embedding_cache.memory", "By", "What they take.", "segrpc.tier", tier_bytes),
        count("segrpc.embedding_cache.hits", "{job}", "Jobs whose embedding was there.", engine.cache_hits),
        count("segrpc.embedding_cache.misses", "{job}", "Jobs whose embedding was not.", engine.cache_misses),
        count("segrpc.encodes", "{image}", "Images encoded.", engine.encodes),
        one("segrpc.workers", "{process}", "Worker processes that are ready.", len(engine.worker_pids)),
        count("segrpc.worker.restarts", "{restart}", "Workers started again.", engine.worker_restarts),
        each("segrpc.device.memory", "By", "What workers hold of a GPU.", "segrpc.device", dict(engine.device_memory)),
    ]
