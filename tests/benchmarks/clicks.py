"""What does a click cost over gRPC, beside the same click of the reference predictor in this process?

The reference's click is ``SAM2ImagePredictor.predict`` and ``pycocotools.mask.encode``; the service's is one
``Segment`` call of the Python client, whose image is known by digest and encoded, or an edit on the open stream of a
session.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator

from segrpc.client import RefineResult, RefineSession
from tests.benchmarks.common import Bench, take_turns
from tests.benchmarks.values import Click, Stages, Stats
from tests.parity.reference import Prompt

SIZES = ((1024, 1024), (1920, 1080), (3840, 2160))
WARM_UP = 1  # rounds


def measure(bench: Bench, width: int, height: int) -> list[Click]:
    """Measure a first click, a refinement and a box on an image of one size."""
    image = bench.encoded_image(width, height)
    with bench.client.refine(image) as session:
        return list(_measure(bench, session, image, width, height))


def _measure(bench: Bench, session: RefineSession, image: bytes, width: int, height: int) -> Iterator[Click]:
    reference, client = bench.reference, bench.client
    point = (0.5 * width, 0.4 * height)
    objects = map(str, itertools.count())

    def compare(
        workload: str,
        masks: int,
        in_process: Callable[[], object],
        unary: Callable[[], object],
        stream: Callable[[], RefineResult],
        after: Callable[[], object] = lambda: None,
    ) -> Click:
        results: list[RefineResult] = []
        turns = take_turns(
            bench.effort.clicks, in_process, unary, lambda: results.append(stream()), warm_up=WARM_UP, after=after
        )
        in_process_times, unary_times, stream_times = map(Stats.of, turns)
        stages = _stages(turns[2], results[WARM_UP:])
        return Click(workload, masks, width, height, bench.logits, in_process_times, unary_times, stream_times, stages)

    prompt = Prompt(points=(point,), labels=(1,))
    yield compare(
        "first click",
        3,
        lambda: reference.predict(prompt, multimask=True),
        lambda: client.segment(image, points=[point]),
        lambda: session.click(*point, object_id=next(objects)),
    )
    refined = Prompt(points=(point, point), labels=(1, 1))
    logits = reference.predict(prompt, multimask=True).logits[:1]
    session.click(*point, object_id="refined")
    yield compare(
        "refinement",
        1,
        lambda: reference.predict(refined, multimask=False, mask_input=logits),
        lambda: client.segment(image, points=[point, point], mask_input=logits, multimask_output=False),
        lambda: session.click(*point, object_id="refined"),
        after=lambda: session.undo(object_id="refined"),
    )
    box = (0.2 * width, 0.1 * height, 0.8 * width, 0.9 * height)
    boxed = Prompt(box=box)
    yield compare(
        "box",
        3,
        lambda: reference.predict(boxed, multimask=True),
        lambda: client.segment(image, boxes=[box]),
        lambda: session.box(*box, object_id=next(objects)),
    )


def _stages(latencies: list[float], results: list[RefineResult]) -> Stages:
    """Take the medians of the stages."""
    timings = [result.timing for result in results if result.timing is not None]
    rest = [
        latency - timing.queue - timing.decode_mask - timing.postprocess
        for latency, timing in zip(latencies, timings, strict=True)
    ]
    return Stages(
        queue=statistics.median(timing.queue for timing in timings),
        decode_mask=statistics.median(timing.decode_mask for timing in timings),
        postprocess=statistics.median(timing.postprocess for timing in timings),
        rest=statistics.median(rest),
    )
