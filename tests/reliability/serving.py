"""The models that are served, with caches so small that they are always full, and the images to work on."""

import io
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

from segrpc.client import AsyncSegmentationClient
from tests.checkpoints import SMOOTH_CONTRAST, write_checkpoint
from tests.photos import NAMES, load_image
from tests.server_process import ServerProcess
from tests.third_party import config_of_gated, install

MODELS = ("grabcut", "light", "sam2")
KiB = 2**10
CALL_SECONDS = 300.0


@dataclass(frozen=True)
class Scale:
    """What fits a model.

    Attributes:
        width: Of the images, in pixels.
        height: Of the images, in pixels.
        embedding_bytes: What one embedding takes, about.
        embeddings: How many the cache has room for.
        file_bytes: What an image's file has, about.
        files: How many of them the server has room for.
    """

    width: int
    height: int
    embedding_bytes: int
    file_bytes: int
    embeddings: int = 4
    files: int = 4


SCALES = {
    "grabcut": Scale(150, 100, 640 * KiB, 6 * KiB),
    "light": Scale(150, 100, 128 * KiB, 6 * KiB),
    "sam2": Scale(640, 480, 23_000 * KiB, 64 * KiB),
}


def image(number: int, scale: Scale) -> bytes:
    """Make an image; each number is another one."""
    pixels = np.array(load_image(NAMES[number % len(NAMES)]).resize((scale.width, scale.height)))
    # Noise survives the compression; a slightly different colour might not.
    pixels[:16, :16] = np.random.default_rng(number).integers(0, 256, (16, 16, 3))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()


@asynccontextmanager
async def connected(count: int, *targets: str) -> AsyncIterator[list[AsyncSegmentationClient]]:
    """Open so many connections, to the targets in turn."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(AsyncSegmentationClient(target, timeout=CALL_SECONDS))
            for target in islice(cycle(targets), count)
        ]


@contextmanager
def serve(model: str, folder: Path, *options: str) -> Iterator[ServerProcess]:
    """Start a server.

    Args:
        model: One of `MODELS`: GrabCut with one iteration, the cheap model of the third party, or SAM 2.1 tiny with
            random weights.
        folder: Where its files go.
        *options: More options of ``serve``.
    """
    scale = SCALES[model]
    config, environment = folder / "config.toml", {}
    match model:
        case "grabcut":
            config.write_text('[[models]]\nname = "grabcut"\nmodel_params = { iterations = 1 }\n')
        case "light":
            config.write_text(config_of_gated(folder))
            environment = install(folder / "third-party")
        case _:
            weights = write_checkpoint("sam2.1-hiera-tiny", folder, smooth=True, contrast=SMOOTH_CONTRAST)
            config.write_text(f'checkpoint = "{weights}"\nthreads = 2\n')
    budgets = [
        *("--embedding-cache-bytes", str(scale.embeddings * scale.embedding_bytes)),
        *("--image-store-bytes", str(scale.files * scale.file_bytes)),
    ]
    arguments = ["--config", str(config), *budgets, "--log-level", "warning", *options]
    with ServerProcess(*arguments, log=folder / "log", environment=environment) as server:
        yield server
