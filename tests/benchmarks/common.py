"""What the measurements share: a server and the reference with the same weights, images, taking turns."""

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sam2.build_sam import build_sam2

from segrpc.client import SegmentationClient
from segrpc.service.models.sam2.catalog import VARIANTS
from tests.benchmarks.values import Logits, Setup
from tests.checkpoints import SMOOTH_CONTRAST, write_checkpoint
from tests.parity.reference import THREADS, Answer, Prompt, Reference
from tests.photos import load_image
from tests.server_process import ServerProcess

# Before each measurement, so that threads which spin for more work sleep, and nobody pays for who came before.
SETTLE_SECONDS = 0.02


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        clicks: Rounds of each kind of click.
        images: Rounds of encoding and of a first mask.
        cold_starts: Servers that are started.
        counted: Clicks of each kind whose bytes are counted.
        series: Clicks whose distribution is looked at: overhead, and during encodes.
        sessions: Sessions whose memory is measured.
        blocks: Turns of each side where clicks per second are counted.
        block_seconds: How long a turn takes.
    """

    clicks: int
    images: int
    cold_starts: int
    counted: int
    series: int
    sessions: int
    blocks: int
    block_seconds: float


QUICK = Effort(clicks=3, images=1, cold_starts=1, counted=4, series=25, sessions=8, blocks=1, block_seconds=0.5)
FULL = Effort(clicks=25, images=7, cold_starts=3, counted=20, series=300, sessions=64, blocks=4, block_seconds=3.0)


class InProcess:
    """The reference predictor in this process, on the device and in the precision of a setup."""

    def __init__(self, setup: Setup, checkpoint: Path) -> None:
        self._setup = setup
        self._reference = Reference(build_sam2(VARIANTS[setup.model].config, str(checkpoint), device=setup.device))

    def set_image(self, file: bytes) -> None:
        """Decode and encode an image."""
        with self._precision():
            self._reference.set_image(np.array(Image.open(io.BytesIO(file)).convert("RGB")))
        if self._setup.device == "cuda":
            torch.cuda.synchronize()

    def predict(self, prompt: Prompt, multimask: bool, mask_input: npt.NDArray[np.float32] | None = None) -> Answer:
        """Ask about one object, masks as counts; waits for the device, since masks come to the host."""
        with self._precision():
            return self._reference.predict(prompt, multimask, mask_input)

    def _precision(self) -> AbstractContextManager[Any]:
        if self._setup.dtype == "float32":
            return nullcontext()
        return torch.autocast(self._setup.device, dtype=getattr(torch, self._setup.dtype))


@dataclass
class Bench:
    """A server, a client of it, and the reference, all with the same weights."""

    setup: Setup
    logits: Logits
    effort: Effort
    reference: InProcess
    server: ServerProcess
    client: SegmentationClient
    options: Sequence[str]
    log: Path
    _made: int = 0
    _encoded: dict[tuple[int, int], bytes] = field(default_factory=dict)
    _set: bytes | None = None

    def new_image(self, width: int = 1024, height: int = 1024) -> bytes:
        """Make a JPEG that nobody has seen yet."""
        self._made += 1
        pixels = _pixels(width, height).copy()
        # Noise survives the compression; a slightly different colour might not.
        pixels[:16, :16] = np.random.default_rng(self._made).integers(0, 256, (16, 16, 3))
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        return file.getvalue()

    def encoded_image(self, width: int = 1024, height: int = 1024) -> bytes:
        """Return an image that the service has encoded and the reference has set; one for each size."""
        size = width, height
        if size not in self._encoded:
            self._encoded[size] = self.new_image(width, height)
        image = self._encoded[size]
        self.client.encode(image)
        self.set_image(image)
        return image

    def set_image(self, image: bytes) -> None:
        """Set the reference's image, unless it is set."""
        if image is not self._set:
            self.reference.set_image(image)
            self._set = image


@contextmanager
def prepare(setup: Setup, logits: Logits, effort: Effort, folder: Path) -> Iterator[Bench]:
    """Start a server and build the reference."""
    torch.set_num_threads(THREADS)
    smooth = logits == "smooth"
    checkpoint = write_checkpoint(setup.model, folder, smooth=smooth, contrast=SMOOTH_CONTRAST if smooth else 1.0)
    options = ["--checkpoint", str(checkpoint), "--threads", str(THREADS), "--log-level", "warning"]
    options += ["--device", setup.device, "--dtype", setup.dtype]
    log = folder / "log"
    reference = InProcess(setup, checkpoint)
    with ServerProcess(*options, log=log) as server, SegmentationClient(server.target, timeout=240) as client:
        yield Bench(setup, logits, effort, reference, server, client, options, log)
    checkpoint.unlink()


def timed(call: Callable[[], object]) -> float:
    """Call, and return the seconds that it took."""
    time.sleep(SETTLE_SECONDS)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_turns(
    rounds: int, *calls: Callable[[], object], warm_up: int = 1, after: Callable[[], object] = lambda: None
) -> list[list[float]]:
    """Time calls in turns, so that what disturbs the machine disturbs all; ``after`` ends a round, and is not timed."""
    found: list[list[float]] = []
    for _ in range(warm_up + rounds):
        found.append([timed(call) for call in calls])
        after()
    return [list(times) for times in zip(*found[warm_up:], strict=True)]


@cache
def _pixels(width: int, height: int) -> npt.NDArray[np.uint8]:
    return np.array(load_image("chelsea").resize((width, height), Image.Resampling.BICUBIC))
