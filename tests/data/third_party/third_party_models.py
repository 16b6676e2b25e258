"""Models of a third party: each only subclasses `SegmentationModel`."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from segrpc.service.images.decode import RGBImage, decode_image
from segrpc.service.models.base import Decoded, DecodeRequest, Embedding, PromptableModel, SegmentationModel
from segrpc.service.models.registry import register_model
from segrpc.service.schemas import CompressedRLE, ModelMetadata, NDArrayFloat, SegmentationInput, SegmentationOutput


@register_model("brightness")
class Brightness(SegmentationModel):
    """Answers each prompt with the pixels above a threshold; takes ``ballast`` bytes of memory besides."""

    def load_model(self) -> None:
        self.threshold = self.config.model_params.get("threshold", 128)
        self.ballast = b"x" * self.config.model_params.get("ballast", 0)

    def predict(self, input: SegmentationInput) -> SegmentationOutput:  # noqa: A002
        assert isinstance(input.image, bytes)
        grey = decode_image(input.image).pixels.mean(axis=2)
        mask = CompressedRLE.from_mask(grey > self.threshold)
        scores = NDArrayFloat.from_numpy(np.ones((input.num_prompts, 1)))
        return SegmentationOutput(masks=[[mask]] * input.num_prompts, scores=scores)


class Later(Brightness):
    """Is like any other at the first prompt, which is the server's own at its start."""

    def load_model(self) -> None:
        super().load_model()
        self.asked = False

    def predict(self, input: SegmentationInput) -> SegmentationOutput:  # noqa: A002
        if not self.asked:
            self.asked = True
            return super().predict(input)
        return self.predict_later(input)

    def predict_later(self, input: SegmentationInput) -> SegmentationOutput:  # noqa: A002
        """Answer all others."""
        raise NotImplementedError


class Broken(Later):
    """Has a bug."""

    def predict_later(self, input: SegmentationInput) -> SegmentationOutput:  # noqa: A002
        raise KeyError("a secret that clients must not see")


class Unready(Brightness):
    """Has a bug that the first prompt shows."""

    def predict(self, input: SegmentationInput) -> SegmentationOutput:  # noqa: A002
        raise KeyError("the first prompt")


class Hungry(Later):
    """Needs more memory than there is."""

    def predict_later(self, input: SegmentationInput) -> SegmentationOutput:  # noqa: A002
        raise MemoryError


class Patient(Later):
    """Writes a line into the named pipe ``started``, then waits for a line in the named pipe ``proceed``."""

    def predict_later(self, input: SegmentationInput) -> SegmentationOutput:  # noqa: A002
        with Path(self.config.model_params["started"]).open("w") as started:
            started.write("started\n")
        with Path(self.config.model_params["proceed"]).open() as proceed:
            proceed.readline()
        return Brightness.predict(self, input)


@register_model("gated")
class Gated(PromptableModel):
    """A cheap model with logits, whose stages a test can hold with named pipes: see `tests.blackbox.gate`.

    Model parameters:
        gates: A folder. If it has ``embed.started``, an embedding writes a line there and waits for one in
            ``embed.proceed``; the same with ``decode``. The file ``decodes`` there grows by a byte for each decoded
            prompt.
        noisy: Whether masks are noise, so that their encodings are large. Default: false.
        deadly: Whether a background point ends the process. Default: false.

    If the folder has a file ``exit.load``, ``exit.embed`` or ``exit.decode``, that stage ends the process.
    """

    SIDE = 128

    @property
    def metadata(self) -> ModelMetadata:
        return ModelMetadata(mask_size=self.SIDE, mask_counts=(1, 3), mask_input=True)

    def load_model(self) -> None:
        self.gates = Path(self.config.model_params["gates"])
        self.deadly = bool(self.config.model_params.get("deadly", False))
        self.noisy = bool(self.config.model_params.get("noisy", False))
        self._pass("load")

    def _pass(self, stage: str) -> None:
        if (self.gates / f"exit.{stage}").exists():
            os._exit(4)
        started, proceed = self.gates / f"{stage}.started", self.gates / f"{stage}.proceed"
        if started.exists():
            started.write_text("started\n")
            proceed.read_text()

    def embed(self, image: RGBImage) -> Embedding:
        self._pass("embed")
        height, width, _ = image.shape
        cells = image[self._cells(height)][:, self._cells(width)].mean(axis=2) / 255 - 0.5
        return Embedding(width, height, cells, cells.nbytes)

    def _cells(self, size: int) -> npt.NDArray[np.int64]:
        return np.arange(self.SIDE) * size // self.SIDE

    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        decoded = []
        for request in requests:
            self._pass("decode")
            decoded.append(self._decode(request))
            with (self.gates / "decodes").open("a") as log:
                log.write(".")
        return decoded

    def _decode(self, request: DecodeRequest) -> Decoded:
        if self.deadly and 0 in request.labels:
            os._exit(3)
        width, height = request.embedding.width, request.embedding.height
        y, x = np.mgrid[: self.SIDE, : self.SIDE] + 0.5
        x, y = x * width / self.SIDE, y * height / self.SIDE
        logits = request.embedding.features.copy()
        for (px, py), label in zip(request.points, request.labels, strict=True):
            near = 1 / (1 + 64 * (((x - px) / width) ** 2 + ((y - py) / height) ** 2))
            logits += 4 * near if label else -4 * near
        if request.box is not None:
            x_min, y_min, x_max, y_max = request.box
            logits += np.where((x_min <= x) & (x < x_max) & (y_min <= y) & (y < y_max), 1.0, -1.0)
        if request.mask_input is not None:
            logits += request.mask_input[0] / 4
        count = request.num_masks
        candidates = np.stack([logits + 0.25 * i - 1 for i in range(count)])
        scores = np.array([0.5 + (i + len(request.points)) % 3 / 10 for i in range(count)])
        return Decoded(candidates.astype(np.float32), scores.astype(np.float32), float(logits.max()))

    def to_masks(self, decoded: Decoded, width: int, height: int) -> list[CompressedRLE]:
        masks = decoded.logits[:, self._rows(height)][:, :, self._rows(width)] > 0
        if self.noisy:
            masks = masks ^ (np.random.default_rng(0).integers(0, 2, (height, width), np.uint8) > 0)
        return [CompressedRLE.from_mask(mask) for mask in masks]

    def _rows(self, size: int) -> npt.NDArray[np.int64]:
        return np.arange(size) * self.SIDE // size
