"""What a session adds to the computation of a click, and what it takes.

    python -m tests.benchmarks.sessions [--rounds 100] [--sessions 64]

SAM 2.1 tiny with random weights, a photo of 1024 x 1024, clicks over an open stream. Three questions:

- *Overhead.* The client's latency of a click, less the time that the worker spent on the same click's decoding and
  masks, which the result tells: what streams, sessions and the worker process cost together.
- *Encoding meanwhile.* The latency of clicks while another client has new images encoded all the time, against the
  latency of clicks on an idle server, in turns.
- *Memory.* How much the server's process grows per open session, each with a first click and three refinements, on one
  image, whose file and embedding they share.
"""

import argparse
import io
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image

from segrpc.client import RefineSession, SegmentationClient
from tests.benchmarks.clicks import MODEL
from tests.checkpoints import write_checkpoint
from tests.parity.reference import THREADS
from tests.photos import load_image
from tests.server_process import ServerProcess

SIDE = 1024
BLOCK = 10  # clicks before it is the other's turn


def main() -> None:
    """Run the benchmark and print a Markdown table."""
    parser = argparse.ArgumentParser(description="Measure what sessions add to clicks.")
    parser.add_argument("--rounds", type=int, default=100, help="clicks of each kind")
    parser.add_argument("--sessions", type=int, default=64, help="open sessions whose memory is measured")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(MODEL, Path(folder))
        options = ["--checkpoint", str(checkpoint), "--threads", str(THREADS), "--log-level", "warning"]
        with (
            ServerProcess(*options, log=Path(folder) / "log") as server,
            SegmentationClient(server.target) as client,
        ):
            print("| sessions | measured |\n|---|---|")
            overhead(client, args.rounds)
            encoding_meanwhile(client, server, args.rounds)
            memory(client, server, args.sessions)


def photo(shade: int = 0) -> bytes:
    """A JPEG of 1024 x 1024; another shade is another image."""
    pixels = np.array(load_image("chelsea").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    pixels[:16, :16] = shade % 256, shade // 256 % 256, 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def click(session: RefineSession, number: int) -> tuple[float, float]:
    """Refine an object by a click, then go back, so that each click does the same work.

    Returns:
        Seconds of the click as the client sees it, and of the worker's decoding and masks in it.
    """
    start = time.perf_counter()
    result = session.click(300 + number % 400, 500)
    seconds = time.perf_counter() - start
    session.undo()
    assert result.timing is not None
    return seconds, result.timing.decode_mask + result.timing.postprocess


def overhead(client: SegmentationClient, rounds: int) -> None:
    """Measure the difference between what the client waits and what the worker computes."""
    with client.refine(photo()) as session:
        session.click(500, 400)
        for number in range(5):
            click(session, number)
        measured = [click(session, number) for number in range(rounds)]
    added = [seconds - computed for seconds, computed in measured]
    show("click, computing in the worker, p50", statistics.median(computed for _, computed in measured))
    show("click, at the client, p50", statistics.median(seconds for seconds, _ in measured))
    show("added by stream, session and worker process, p50", statistics.median(added))
    show("added by stream, session and worker process, p99", percentile(added, 0.99))


def encoding_meanwhile(client: SegmentationClient, server: ServerProcess, rounds: int) -> None:
    """Measure clicks on an idle server and during encodes, in turns."""
    idle: list[float] = []
    busy: list[float] = []
    encoded = 0
    with client.refine(photo()) as session, SegmentationClient(server.target) as other:
        session.click(500, 400)
        while len(idle) < rounds:
            idle += [click(session, number)[0] for number in range(BLOCK)]
            stop, begun = threading.Event(), threading.Event()
            counted: list[int] = []

            def encode_on(first: int, stop: threading.Event, begun: threading.Event, counted: list[int]) -> None:
                while not stop.is_set():
                    picture = photo(first + len(counted) + 1)
                    begun.set()
                    other.encode(picture)
                    counted.append(1)

            thread = threading.Thread(target=encode_on, args=(encoded, stop, begun, counted))
            thread.start()
            begun.wait()
            busy += [click(session, number)[0] for number in range(BLOCK)]
            stop.set()
            thread.join()
            encoded += len(counted)
    show("click on an idle server, p50", statistics.median(idle))
    show("click on an idle server, p99", percentile(idle, 0.99))
    show(f"click while another client encodes ({encoded} images), p50", statistics.median(busy))
    show(f"click while another client encodes ({encoded} images), p99", percentile(busy, 0.99))
    ratio = percentile(busy, 0.99) / percentile(idle, 0.99)
    print(f"| p99 while another client encodes / idle p99 | {ratio:.2f} |", flush=True)


def memory(client: SegmentationClient, server: ServerProcess, count: int) -> None:
    """Measure how the server grows with sessions that are held open."""
    data = photo()
    with client.refine(data) as warm:
        refine(warm)
    before = server.resident_bytes()
    with ExitStack() as stack:
        for _ in range(count):
            refine(stack.enter_context(client.refine(data)))
        grown = (server.resident_bytes() - before) / count
    print(f"| memory of the server's process per open session ({count} open) | {grown / 2**20:.2f} MiB |", flush=True)


def refine(session: RefineSession) -> None:
    """Do what a person does with an easy object."""
    for x in (500, 400, 600, 450):
        session.click(x, 400)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of the values lies."""
    return float(np.quantile(values, share))


def show(name: str, seconds: float) -> None:
    """Print a line."""
    print(f"| {name} | {seconds * 1e3:.1f} ms |", flush=True)


if __name__ == "__main__":
    main()
