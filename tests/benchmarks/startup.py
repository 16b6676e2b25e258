"""How long does it take until there is a first mask: of a new image, and of a server that has to be started?"""

import time

from segrpc.client import SegmentationClient
from tests.benchmarks.common import Bench, take_turns
from tests.benchmarks.values import ColdStart, Start, Stats
from tests.parity.reference import Prompt
from tests.server_process import ServerProcess

SIDE = 1024
POINT = (512.0, 410.0)


def encode(bench: Bench) -> list[Start]:
    """Measure from the bytes of a new image to its embedding."""
    images = [bench.new_image(SIDE, SIDE) for _ in range(bench.effort.images)]
    unseen = iter(images)
    again = iter(images)
    reference, service = take_turns(
        bench.effort.images,
        lambda: bench.set_image(next(again)),
        lambda: bench.client.encode(next(unseen)),
        warm_up=0,  # both have encoded images before
    )
    return [Start("encode", SIDE, SIDE, Stats.of(reference), Stats.of(service))]


def first_mask(bench: Bench) -> list[Start]:
    """Measure from opening a connection, with a new image, to the first masks."""
    images = [bench.new_image(SIDE, SIDE) for _ in range(bench.effort.images)]
    unseen = iter(images)
    again = iter(images)

    def in_process() -> None:
        bench.set_image(next(again))
        bench.reference.predict(Prompt(points=(POINT,), labels=(1,)), multimask=True)

    reference, service = take_turns(
        bench.effort.images, in_process, lambda: _open_and_click(bench, next(unseen)), warm_up=0
    )
    return [Start("first mask", SIDE, SIDE, Stats.of(reference), Stats.of(service))]


def cold_start(bench: Bench) -> list[ColdStart]:
    """Measure from starting another server to its address and to the first masks."""
    image = bench.new_image(SIDE, SIDE)
    addresses, masks = [], []
    for _ in range(bench.effort.cold_starts):
        start = time.perf_counter()
        with ServerProcess(*bench.options, log=bench.log) as server:
            addresses.append(time.perf_counter() - start)
            with SegmentationClient(server.target, timeout=240) as client:
                client.segment(image, points=[POINT])
                masks.append(time.perf_counter() - start)
    return [ColdStart(Stats.of(addresses), Stats.of(masks))]


def _open_and_click(bench: Bench, image: bytes) -> None:
    with SegmentationClient(bench.server.target, timeout=240) as client, client.refine(image) as session:
        session.click(*POINT)
