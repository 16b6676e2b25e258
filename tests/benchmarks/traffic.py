"""How many bytes does a click put on the connection? A proxy between client and server counts."""

import itertools
from collections.abc import Callable

from segrpc.client import SegmentationClient
from tests.benchmarks.common import Bench
from tests.benchmarks.values import Traffic
from tests.tcp_proxy import TcpProxy

POINT = (512.0, 410.0)


def measure(bench: Bench) -> list[Traffic]:
    """Count the bytes of first clicks and of refinements, as single calls and on a stream."""
    image = bench.encoded_image()
    with (
        TcpProxy(bench.server.target) as proxy,
        SegmentationClient(proxy.target, timeout=240) as client,
        client.refine(image) as session,
    ):
        client.encode(image)
        logits = client.segment(image, points=[POINT], return_logits=True).logits
        assert logits is not None
        mask_input = logits[0, :1]
        objects = map(str, itertools.count())
        session.click(*POINT)
        return [
            _row(
                bench,
                proxy,
                "first click",
                lambda: client.segment(image, points=[POINT]),
                lambda: session.click(*POINT, object_id=next(objects)),
            ),
            _row(
                bench,
                proxy,
                "refinement",
                lambda: client.segment(image, points=[POINT, POINT], mask_input=mask_input, multimask_output=False),
                lambda: session.click(*POINT),  # the points add up on the server
            ),
        ]


def _row(
    bench: Bench, proxy: TcpProxy, workload: str, unary: Callable[[], object], stream: Callable[[], object]
) -> Traffic:
    count = bench.effort.counted
    return Traffic(workload, bench.logits, *_bytes_of(proxy, unary, count), *_bytes_of(proxy, stream, count))


def _bytes_of(proxy: TcpProxy, call: Callable[[], object], count: int) -> tuple[float, float]:
    """Return how many bytes a call sends and gets; the first one, which introduces headers, does not count."""
    call()
    sent, got = proxy.bytes_to_server, proxy.bytes_to_client
    for _ in range(count):
        call()
    return (proxy.bytes_to_server - sent) / count, (proxy.bytes_to_client - got) / count
