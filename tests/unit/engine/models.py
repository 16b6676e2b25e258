"""Models for the tests of engines: cheap, and a test can hold and count what they do."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from segrpc.service.errors import ModelLoadError, OverloadedError
from segrpc.service.images.decode import RGBImage, decode_image
from segrpc.service.models.base import Decoded, DecodeRequest, Embedding, PromptableModel, SegmentationModel
from segrpc.service.schemas import CompressedRLE, ModelMetadata, NDArrayFloat, SegmentationInput, SegmentationOutput

ENTRY_POINTS = ("bright", "broken", "exiting", "held", "own-error", "together", "unloadable")


class Held(PromptableModel):
    """Object is what is brighter than the first click's ``x``; so each prompt and each image has a mask of its own.

    Model parameters:
        folder: Where its pipes and its log are: see `tests.unit.engine.gates`.
    """

    SIDE = 16

    @property
    def metadata(self) -> ModelMetadata:
        return ModelMetadata(family="held", mask_size=self.SIDE, mask_counts=(1, 3), boxes=False)

    def load_model(self) -> None:
        self.folder = Path(self.config.model_params["folder"])
        if (self.folder / "unloadable").exists():
            raise ModelLoadError("the file unloadable is there")

    def embed(self, image: RGBImage) -> Embedding:
        self.log(f"embed {os.getpid()}")
        self.hold("embed")
        return Embedding(image.shape[1], image.shape[0], image.mean(axis=2), image.nbytes)

    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        self.log(f"decode {len(requests)}")
        self.hold("decode")
        return [self._decode(request) for request in requests]

    def _decode(self, request: DecodeRequest) -> Decoded:
        brightness = request.embedding.features
        rows, columns = (np.arange(self.SIDE) * size // self.SIDE for size in brightness.shape)
        logits = brightness[rows][:, columns].astype(np.float32) - request.points[0, 0]
        return Decoded(np.stack([logits] * request.num_masks), np.full(request.num_masks, 0.5, np.float32), 0.0)

    def to_masks(self, decoded: Decoded, width: int, height: int) -> list[CompressedRLE]:
        rows, columns = (np.arange(size) * self.SIDE // size for size in (height, width))
        return [CompressedRLE.from_mask(one[rows][:, columns] > 0) for one in decoded.logits]

    def log(self, line: str) -> None:
        with (self.folder / "log").open("a") as log:
            log.write(line + "\n")

    def hold(self, stage: str) -> None:
        """Wait for the test, if it asked for that."""
        started, proceed = self.folder / f"{stage}.started", self.folder / f"{stage}.proceed"
        if started.exists():
            started.write_text("started\n")
            proceed.read_text()


class Together(Held):
    """Takes prompts of several callers together; a negative-sided prompt breaks the whole call."""

    @property
    def batches(self) -> bool:
        return True

    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        decoded = super().decode(requests)
        if any(request.labels[0] == 0 for request in requests):
            raise ValueError("a background click")
        return decoded


class Bright(SegmentationModel):
    """A model that only predicts."""

    def load_model(self) -> None:
        pass

    def predict(self, input: SegmentationInput) -> SegmentationOutput:  # noqa: A002
        assert isinstance(input.image, bytes)
        mask = CompressedRLE.from_mask(decode_image(input.image).pixels.mean(axis=2) > 100)
        scores = NDArrayFloat.from_numpy(np.ones((input.num_prompts, 1)))
        return SegmentationOutput(masks=[[mask]] * input.num_prompts, scores=scores)


class Broken(Bright):
    """Has a bug."""

    def predict(self, input: SegmentationInput) -> NoReturn:  # noqa: A002
        raise KeyError("the bug's own words")


class OwnError(Bright):
    """Raises an error of a class that only its package knows."""

    class Error(OverloadedError):
        def __init__(self, *reasons: Any) -> None:
            super().__init__(" and ".join(reasons), 7.0)

    def predict(self, input: SegmentationInput) -> NoReturn:  # noqa: A002
        raise self.Error("too much", "too soon")


class Exiting(Bright):
    """Ends its process while it is loaded, as the system does when memory runs out."""

    def load_model(self) -> None:
        os._exit(5)


class Unloadable(Bright):
    """Cannot be loaded."""

    def load_model(self) -> None:
        raise ModelLoadError("the weights of unloadable are missing; fetch them")
