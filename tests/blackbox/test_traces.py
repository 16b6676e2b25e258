"""Traces and metrics over OTLP, as a receiver gets them."""

import asyncio
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanContext

from segrpc.client import AsyncSegmentationClient, SegmentationClient
from segrpc.v1.refine_pb2 import RefineConfig
from segrpc.v1.segmentation_service_pb2 import SegmentRequest
from segrpc.v1.segmentation_service_pb2_grpc import SegmentationServiceStub
from segrpc.v1.types_pb2 import Image, Point, Prompt
from tests.blackbox.failure import failure_of
from tests.blackbox.refine_stream import RefineStream, points
from tests.otlp_receiver import OtlpReceiver, attributes, otlp_receiver
from tests.server_process import ServerProcess, connect, raw
from tests.third_party import config_of_gated

SERVICE = "segrpc.v1.SegmentationService"
MODEL = "gated"
CLICK = [Prompt(points=[Point(x=30, y=20)])]
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
# Batches leave soon.
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_METRIC_EXPORT_INTERVAL": "50", "OTEL_RESOURCE_ATTRIBUTES": "site=here"}


@dataclass
class Traced:
    server: ServerProcess
    receiver: OtlpReceiver


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, third_party: dict[str, str]) -> Iterator[Traced]:
    """A server with a cheap model that tells a receiver."""
    folder = tmp_path_factory.mktemp("traced")
    config = folder / "config.toml"
    config.write_text(config_of_gated(folder))
    options = ["--config", str(config), "--log-format", "json"]
    with otlp_receiver() as receiver:
        endpoint = ("--otlp-endpoint", f"http://{receiver.address}")
        with ServerProcess(*options, *endpoint, log=folder / "log", environment={**third_party, **SOON}) as server:
            yield Traced(server, receiver)


@pytest.fixture
def channel(traced: Traced) -> Iterator[grpc.Channel]:
    with connect(traced.server) as opened:
        yield opened


def seconds(span: Span) -> float:
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


def test_a_call_is_a_span_of_its_callers_trace_with_its_stages_below(
    traced: Traced, channel: grpc.Channel, photo: bytes
) -> None:
    request = SegmentRequest(request_id="whole", image=Image(data=photo), prompts=CLICK)
    metadata = (("traceparent", f"00-{TRACE}-{SPAN}-01"),)
    answer = SegmentationServiceStub(channel).Segment(request, metadata=metadata)
    span = traced.receiver.span(f"{SERVICE}/Segment", **{"segrpc.request_id": "whole"})
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.kind) == (TRACE, SPAN, Span.SPAN_KIND_SERVER)
    told = attributes(span.attributes)
    assert (told["rpc.system.name"], told["rpc.method"]) == ("grpc", f"{SERVICE}/Segment")
    assert (told["rpc.response.status_code"], told["segrpc.model"]) == ("OK", MODEL)
    assert told["segrpc.embedding_cached"] is False
    timing = answer.timing
    assert told["segrpc.queue_seconds"] == pytest.approx(timing.queue.ToNanoseconds() / 1e9, abs=1e-6)
    stages = traced.receiver.below(span)
    assert [stage.name for stage in stages] == ["decode_image", "encode_image", "decode_mask", "postprocess"]
    before = span.start_time_unix_nano
    for stage in stages:
        assert seconds(stage) == pytest.approx(getattr(timing, stage.name).ToNanoseconds() / 1e9, abs=1e-6)
        assert stage.start_time_unix_nano >= before
        assert attributes(stage.attributes) == {"segrpc.model": MODEL}
        before = stage.end_time_unix_nano
    assert before <= span.end_time_unix_nano
    assert seconds(span) >= timing.total.ToNanoseconds() / 1e9


def test_a_stream_has_a_span_for_each_round(traced: Traced, channel: grpc.Channel, photo: bytes) -> None:
    SegmentationServiceStub(channel).Segment(SegmentRequest(image=Image(data=photo), prompts=CLICK))
    timings = []
    with RefineStream(channel, RefineConfig(request_id="rounds", image=Image(data=photo))) as stream:
        stream.opened()
        for i in range(3):
            stream.edit(add_points=points((30 + i, 20)))
            timings.append(stream.result().timing)
        stream.finish()
        stream.rest()
    span = traced.receiver.span(f"{SERVICE}/Refine", **{"segrpc.request_id": "rounds"})
    assert not span.parent_span_id
    rounds = [one for one in traced.receiver.below(span) if one.name == "round"]
    assert len(rounds) == 3
    for one, timing in zip(rounds, timings, strict=True):
        assert one.trace_id == span.trace_id
        assert attributes(one.attributes)["segrpc.embedding_cached"] is True
        stages = traced.receiver.below(one)
        assert [stage.name for stage in stages] == ["decode_mask", "postprocess"]
        assert seconds(stages[0]) == pytest.approx(timing.decode_mask.ToNanoseconds() / 1e9, abs=1e-6)


def test_a_stream_whose_client_left_was_cancelled(traced: Traced, channel: grpc.Channel, photo: bytes) -> None:
    with RefineStream(channel, RefineConfig(request_id="left", image=Image(data=photo))) as stream:
        stream.opened()
    span = traced.receiver.span(f"{SERVICE}/Refine", **{"segrpc.request_id": "left"})
    assert attributes(span.attributes)["rpc.response.status_code"] == "CANCELLED"
    assert span.status.code == Status.STATUS_CODE_UNSET  # it is no failure of the server


def test_a_failure_is_told_and_only_the_servers_own_is_an_error(traced: Traced, channel: grpc.Channel) -> None:
    request = SegmentRequest(request_id="bad", model="sam9")
    assert failure_of(lambda: SegmentationServiceStub(channel).Segment(request)).reason == "MODEL_NOT_FOUND"
    span = traced.receiver.span(f"{SERVICE}/Segment", **{"segrpc.request_id": "bad"})
    told = attributes(span.attributes)
    assert (told["rpc.response.status_code"], told["error.type"]) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    assert span.status.code == Status.STATUS_CODE_UNSET


def test_who_does_not_record_its_trace_has_no_spans_here(traced: Traced, channel: grpc.Channel) -> None:
    stub = SegmentationServiceStub(channel)
    for request_id, flags in (("unsampled", "00"), ("sampled", "01")):
        request = SegmentRequest(request_id=request_id, model="sam9")
        metadata = (("traceparent", f"00-{TRACE}-{SPAN}-{flags}"),)
        failure_of(lambda request=request, metadata=metadata: stub.Segment(request, metadata=metadata))  # type: ignore[misc]
    traced.receiver.span(f"{SERVICE}/Segment", **{"segrpc.request_id": "sampled"})
    assert not traced.receiver.find(f"{SERVICE}/Segment", **{"segrpc.request_id": "unsampled"})


def test_a_traceparent_that_is_none_begins_a_trace(traced: Traced, channel: grpc.Channel) -> None:
    request, metadata = SegmentRequest(request_id="odd", model="sam9"), (("traceparent", "00-" + "f" * 4000),)
    failure_of(lambda: SegmentationServiceStub(channel).Segment(request, metadata=metadata))
    span = traced.receiver.span(f"{SERVICE}/Segment", **{"segrpc.request_id": "odd"})
    assert not span.parent_span_id
    records = [json.loads(line) for line in traced.server.log_text().splitlines()]
    (record,) = [record for record in records if record.get("request_id") == "odd"]
    assert record["trace_id"] == span.trace_id.hex()


def test_health_checks_make_no_spans(traced: Traced, channel: grpc.Channel) -> None:
    raw(channel, "/grpc.health.v1.Health/Check")(b"")
    request = SegmentRequest(request_id="after health", model="sam9")
    failure_of(lambda: SegmentationServiceStub(channel).Segment(request))
    traced.receiver.span(f"{SERVICE}/Segment", **{"segrpc.request_id": "after health"})
    assert not traced.receiver.find("grpc.health.v1.Health/Check")


def test_the_clients_pass_on_the_active_span(traced: Traced, photo: bytes) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")

    async def ask() -> None:
        async with AsyncSegmentationClient(traced.server.target) as client:
            await client.segment(photo, points=[(30, 20)], request_id="async client")

    def check(request_id: str, caller: SpanContext) -> None:
        span = traced.receiver.span(f"{SERVICE}/Segment", **{"segrpc.request_id": request_id})
        assert (int(span.trace_id.hex(), 16), int(span.parent_span_id.hex(), 16)) == (caller.trace_id, caller.span_id)

    with SegmentationClient(traced.server.target) as client:
        client.segment(photo, points=[(30, 20)], request_id="no span")
        with tracer.start_as_current_span("work") as work:
            client.segment(photo, points=[(30, 20)], request_id="client")
            asyncio.run(ask())
    for request_id in ("client", "async client"):
        check(request_id, work.get_span_context())
    span = traced.receiver.span(f"{SERVICE}/Segment", **{"segrpc.request_id": "no span"})
    assert not span.parent_span_id


def test_a_client_may_be_told_its_span(traced: Traced, photo: bytes) -> None:
    with SegmentationClient(traced.server.target, traceparent=lambda: f"00-{TRACE}-{SPAN}-01") as client:
        client.segment(photo, points=[(30, 20)], request_id="told")
    span = traced.receiver.span(f"{SERVICE}/Segment", **{"segrpc.request_id": "told"})
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN)


def test_metrics_are_told_too(traced: Traced, channel: grpc.Channel, photo: bytes) -> None:
    receiver, method = traced.receiver, f"{SERVICE}/Segment"

    told = {"grpc.method": method, "grpc.status": "OK"}

    def counted() -> int:
        metric = receiver.metrics.get("grpc.server.call.duration")
        points = metric.histogram.data_points if metric is not None else ()
        return sum(point.count for point in points if attributes(point.attributes) == told)

    receiver.metrics = {}
    while not receiver.metrics:
        receiver.next()
    before = counted()
    SegmentationServiceStub(channel).Segment(SegmentRequest(image=Image(data=photo), prompts=CLICK))
    while counted() == before:
        receiver.next()
    assert counted() == before + 1
    duration = receiver.metrics["grpc.server.call.duration"]
    (point,) = [one for one in duration.histogram.data_points if attributes(one.attributes) == told]
    assert (duration.unit, sum(point.bucket_counts)) == ("s", point.count)
    assert len(point.bucket_counts) == len(point.explicit_bounds) + 1
    started = receiver.metrics["grpc.server.call.started"]
    assert started.sum.is_monotonic
    tiers = receiver.metrics["segrpc.embedding_cache.entries"].gauge.data_points
    assert {attributes(one.attributes)["segrpc.tier"]: one.as_double or one.as_int for one in tiers}["device"] >= 1
    assert (receiver.resource["service.name"], receiver.resource["site"]) == ("segrpc", "here")


def test_what_is_left_is_sent_at_the_end(tmp_path: Path) -> None:
    with otlp_receiver() as receiver:
        endpoint = ("--otlp-endpoint", f"http://{receiver.address}/")
        with ServerProcess(*endpoint, log=tmp_path / "log") as server, connect(server) as opened:
            request = SegmentRequest(request_id="last", model="sam9")
            failure_of(lambda: SegmentationServiceStub(opened).Segment(request))
            server.terminate()
            assert server.wait() == 0
        receiver.span(f"{SERVICE}/Segment", **{"segrpc.request_id": "last"})
        while "grpc.server.call.started" not in receiver.metrics:
            receiver.next()


def test_a_receiver_that_is_not_there_keeps_nothing_from_working(tmp_path: Path, photo: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        endpoint = ("--otlp-endpoint", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with ServerProcess(*endpoint, log=tmp_path / "log", environment=SOON) as server, connect(server) as opened:
            answer = SegmentationServiceStub(opened).Segment(SegmentRequest(image=Image(data=photo), prompts=CLICK))
            assert len(answer.predictions) == 1
            server.terminate()
            assert server.wait() == 0
        assert "Traceback" not in server.log_text()
