"""A first image and a first prompt for each model: what is said to be ready has answered before."""

import io
import logging
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from PIL import Image

from segrpc.service.engine.base import CancelToken, ServedModel
from segrpc.service.engine.work import DecodeWork, EncodeWork, PredictWork, Work, WorkerBug, WorkerLost
from segrpc.service.errors import ModelLoadError, SegrpcError
from segrpc.service.images.decode import ImageHeader
from segrpc.service.models.base import check_capabilities
from segrpc.service.schemas import ModelMetadata, NDArrayFloat, SegmentationInput

log = logging.getLogger("segrpc.engine")

SIDE = 32  # pixels of the image: models scale it to their own size, so that a larger one would show no more
DIGEST = "warm-up"  # no client's image has it


class Runner(Protocol):
    """What does works: a `Backend`, or a worker process before it is one's."""

    async def run(self, work: Work, token: CancelToken) -> Any:
        """Do a work; see `Backend.run`."""

    def release(self, model: str, digest: str) -> None:
        """Let an embedding go; see `Backend.release`."""


async def warm_up(runner: Runner, models: Iterable[ServedModel]) -> None:
    """Have each model answer once, by the same way as clients' calls.

    The embedding stays in the cache as the one used least recently, which is the first to make room.

    Args:
        runner: What runs the models.
        models: The models.

    Raises:
        ModelLoadError: If one does not answer.
    """
    for model in models:
        try:
            await _answer(runner, model)
        except WorkerLost as error:
            raise ModelLoadError(
                f"model {model.name!r} ended its process at the first prompt; is there enough memory?"
            ) from error
        except Exception as error:
            log.exception("model %r cannot answer a first prompt", model.name)
            raise ModelLoadError(f"model {model.name!r} cannot answer a first prompt: {_text(error)}") from error


async def _answer(runner: Runner, model: ServedModel) -> None:
    image, token = _picture(), CancelToken()
    prompt = _prompt(model.metadata, image)
    if prompt is not None:
        check_capabilities(prompt, model.metadata, model.name)
        prompt = prompt.model_copy(update={"image": None})  # it travels by itself
    if not model.promptable:
        if prompt is not None:
            await runner.run(PredictWork(model.name, prompt, image, ImageHeader(SIDE, SIDE, 1)), token)
        return
    await runner.run(EncodeWork(model.name, DIGEST, image), token)
    try:
        if prompt is not None:
            await runner.run(DecodeWork(model.name, DIGEST, prompt, "float32"), token)
    finally:
        runner.release(model.name, DIGEST)


def _prompt(metadata: ModelMetadata, image: bytes) -> SegmentationInput | None:
    """Make a prompt that the model says it takes; None if it takes none."""
    given: dict[str, Any] = {"image": image, "multimask_output": False}
    counts, middle, size = metadata.mask_counts, SIDE / 2, metadata.mask_size
    if counts and 1 not in counts:
        given.update(multimask_output=True, num_multimask_outputs=counts[0])
    if metadata.points:
        given.update(points=[[[middle, middle]]])
    elif metadata.boxes:
        given.update(boxes=[[middle / 2, middle / 2, middle, middle]])
    elif metadata.mask_input and size:
        given.update(mask_input=NDArrayFloat.from_numpy(np.ones((1, 1, size, size), np.float32)))
    else:
        return None
    return SegmentationInput(**given)


def _picture() -> bytes:
    """Make a bright square on a dark ground."""
    picture, file = Image.new("RGB", (SIDE, SIDE), (40, 60, 80)), io.BytesIO()
    picture.paste((220, 200, 180), (SIDE // 4, SIDE // 4, 3 * SIDE // 4, 3 * SIDE // 4))
    picture.save(file, "PNG")
    return file.getvalue()


def _text(error: Exception) -> str:
    """Say in one line what went wrong; the log has the rest."""
    if isinstance(error, SegrpcError):
        return error.message
    if isinstance(error, WorkerBug):  # its message is the worker's traceback
        return str(error).strip().rpartition("\n")[2]
    return f"{type(error).__name__}: {error}"
