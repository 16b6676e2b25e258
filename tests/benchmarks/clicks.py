"""What a click costs over gRPC, beside the same click of the reference predictor in this process.

    python -m tests.benchmarks.clicks [--rounds 15]

Both have the same weights (SAM 2.1 tiny, random), threads and prompts, and take turns, so that what disturbs the
machine disturbs all. The reference's click is ``SAM2ImagePredictor.predict`` and ``pycocotools.mask.encode``; the
service's is one ``Segment`` call of the Python client, whose image is known by digest and encoded, or an edit on the
open stream of a session. Ratios are to be quoted, times are context.
"""

import argparse
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sam2.build_sam import build_sam2

from segrpc.client import SegmentationClient
from segrpc.service.models.sam2.catalog import VARIANTS
from tests.checkpoints import write_checkpoint
from tests.parity.reference import THREADS, Prompt, Reference
from tests.photos import load_image
from tests.server_process import ServerProcess

MODEL = "sam2.1-hiera-tiny"
SIZES = ((1024, 1024), (1920, 1080), (3840, 2160))


def main() -> None:
    """Run the benchmark and print a Markdown table."""
    parser = argparse.ArgumentParser(description="Compare clicks over gRPC with the in-process reference.")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each kind")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(MODEL, Path(folder))
        reference = Reference(build_sam2(VARIANTS[MODEL].config, str(checkpoint), device="cpu"))
        options = ["--checkpoint", str(checkpoint), "--threads", str(THREADS)]
        with (
            ServerProcess(*options, log=Path(folder) / "log") as server,
            SegmentationClient(server.target) as client,
        ):
            print("| workload | in process, ms | unary, ms | stream, ms | unary ratio | stream ratio |")
            print("|---|---|---|---|---|---|")
            for width, height in SIZES:
                compare(reference, client, width, height, rounds)


def compare(reference: Reference, client: SegmentationClient, width: int, height: int, rounds: int) -> None:
    """Measure encoding, a first click and a refinement on an image of one size."""
    image = load_image("chelsea").resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    data = file.getvalue()

    start = time.perf_counter()
    reference.set_image(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    encoded = time.perf_counter()
    client.encode(data)
    show(f"first encode, {width} x {height}", [encoded - start], [time.perf_counter() - encoded])

    point = (0.5 * width, 0.4 * height)
    prompt = Prompt(points=(point,), labels=(1,))
    logits = reference.predict(prompt, multimask=True).logits[:1]
    with client.refine(data) as session:
        objects = map(str, itertools.count())
        measure(
            f"first click, 3 masks, {width} x {height}",
            rounds,
            lambda: reference.predict(prompt, multimask=True),
            lambda: client.segment(data, points=[point]),
            lambda: session.click(*point, object_id=next(objects)),
        )
        session.click(*point, object_id="refined")
        refined = Prompt(points=(point, point), labels=(1, 1))
        measure(
            f"refinement, 1 mask, {width} x {height}",
            rounds,
            lambda: reference.predict(refined, multimask=False, mask_input=logits),
            lambda: client.segment(data, points=[point, point], mask_input=logits, multimask_output=False),
            lambda: session.click(*point, object_id="refined"),
            after=lambda: session.undo(object_id="refined"),
        )


def measure(
    name: str,
    rounds: int,
    *calls: Callable[[], object],
    after: Callable[[], object] = lambda: None,
) -> None:
    """Run the calls in turns and print a line; ``after`` undoes what a round did, and is not timed."""
    times: tuple[list[float], ...] = tuple([] for _ in calls)
    for i in range(rounds + 2):
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if i >= 2:  # the first two warm up
                found.append(time.perf_counter() - start)
        after()
    show(name, *times)


def show(name: str, in_process: list[float], *service: list[float]) -> None:
    """Print the medians and their ratios to the first."""
    reference, *medians = (statistics.median(times) for times in (in_process, *service))
    columns = [f"{reference * 1e3:.1f}", *(f"{median * 1e3:.1f}" for median in medians), *[""] * (2 - len(medians))]
    columns += [*(f"{median / reference:.2f}" for median in medians), *[""] * (2 - len(medians))]
    print(f"| {name} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
