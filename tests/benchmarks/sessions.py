"""What do sessions add to the computation of a click, what do encodes do to clicks, and what does a session take?

Clicks on the open stream of a session, on an image of 1024 x 1024.
"""

import threading
import time
from contextlib import ExitStack

from segrpc.client import RefineSession, SegmentationClient
from tests.benchmarks import bare
from tests.benchmarks.common import Bench
from tests.benchmarks.values import Added, Meanwhile, Memory, Stats

BLOCK = 25  # clicks before it is the other's turn
PAUSE_SECONDS = 0.03  # between clicks, as a drag makes them


def added(bench: Bench) -> list[Added]:
    """Measure the difference between what the client waits and what the worker computes in the same click."""
    with bench.client.refine(bench.encoded_image()) as session:
        session.click(500, 400)
        for number in range(5):
            _click(session, number)
        measured = [_click(session, number) for number in range(min(bench.effort.series, 100))]
    computing = Stats.of([computed for _, computed in measured])
    return [
        Added(
            click=Stats.of([seconds for seconds, _ in measured]),
            computing=computing,
            added=Stats.of([seconds - computed for seconds, computed in measured]),
            bare=Stats.of(bare.added(computing.p50, len(measured))),
        )
    ]


def meanwhile(bench: Bench) -> list[Meanwhile]:
    """Measure clicks on an idle server and while another client has images encoded, in turns."""
    idle: list[float] = []
    busy: list[float] = []
    encoded = 0
    with (
        bench.client.refine(bench.encoded_image()) as session,
        SegmentationClient(bench.server.target, timeout=240) as other,
    ):
        session.click(500, 400)
        _clicks(session, 5)
        while len(idle) < bench.effort.series:
            idle += _clicks(session, BLOCK)
            with _Encoding(other, bench.new_image()) as encoding:
                busy += _clicks(session, BLOCK)
            encoded += encoding.count
    return [Meanwhile(Stats.of(idle), Stats.of(busy), encoded)]


def memory(bench: Bench) -> list[Memory]:
    """Measure how the server grows with sessions on one image that are held open, each with a refined object."""
    image = bench.encoded_image()
    count = bench.effort.sessions
    with ExitStack() as warm:
        for _ in range(4):
            _refine(warm.enter_context(bench.client.refine(image)))
    before = _resident(bench)
    with ExitStack() as stack:
        for _ in range(count):
            _refine(stack.enter_context(bench.client.refine(image)))
        after = _resident(bench)
    server, worker = ((grown - had) / count for grown, had in zip(after, before, strict=True))
    return [Memory(count, server, worker)]


class _Encoding:
    """A client that has one image after the other encoded, in a thread; for ``with``.

    Args:
        client: The client.
        image: A file that readers end before its end, so that bytes after it make another image of the same pixels.
    """

    def __init__(self, client: SegmentationClient, image: bytes) -> None:
        self.count = 0
        self._client = client
        self._image = image
        self._stop, self._begun = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._begun.set()
            self._client.encode(self._image + self.count.to_bytes(4, "big"))
            self.count += 1

    def __enter__(self) -> "_Encoding":
        self._thread.start()
        self._begun.wait()
        time.sleep(0.2)  # until the image has arrived and its encoding runs
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _click(session: RefineSession, number: int) -> tuple[float, float]:
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


def _clicks(session: RefineSession, count: int) -> list[float]:
    found = []
    for number in range(count):
        time.sleep(PAUSE_SECONDS)
        found.append(_click(session, number)[0])
    return found


def _refine(session: RefineSession) -> None:
    """Do what a person does with an easy object."""
    for x in (500, 400, 600, 450):
        session.click(x, 400)


def _resident(bench: Bench) -> tuple[int, int]:
    """The memory that the server's process holds, and its workers."""
    return bench.server.resident_bytes(), bench.server.worker_resident_bytes()
