"""Models of a third party: each only subclasses `SegmentationModel`."""

from pathlib import Path

import numpy as np

from segrpc.service.images.decode import decode_image
from segrpc.service.models.base import SegmentationModel
from segrpc.service.models.registry import register_model
from segrpc.service.schemas import CompressedRLE, NDArrayFloat, SegmentationInput, SegmentationOutput


@register_model("brightness")
class Brightness(SegmentationModel):
    """Answers each prompt with the pixels above a threshold."""

    def load_model(self) -> None:
        self.threshold = self.config.model_params.get("threshold", 128)

    def predict(self, input: SegmentationInput) -> SegmentationOutput:  # noqa: A002
        assert isinstance(input.image, bytes)
        grey = decode_image(input.image).pixels.mean(axis=2)
        mask = CompressedRLE.from_mask(grey > self.threshold)
        scores = NDArrayFloat.from_numpy(np.ones((input.num_prompts, 1)))
        return SegmentationOutput(masks=[[mask]] * input.num_prompts, scores=scores)


class Broken(Brightness):
    """Has a bug."""

    def predict(self, input: SegmentationInput) -> SegmentationOutput:  # noqa: A002
        raise KeyError("a secret that clients must not see")


class Hungry(Brightness):
    """Needs more memory than there is."""

    def predict(self, input: SegmentationInput) -> SegmentationOutput:  # noqa: A002
        raise MemoryError


class Patient(Brightness):
    """Writes a line into the named pipe ``started``, then waits for a line in the named pipe ``proceed``."""

    def predict(self, input: SegmentationInput) -> SegmentationOutput:  # noqa: A002
        with Path(self.config.model_params["started"]).open("w") as started:
            started.write("started\n")
        with Path(self.config.model_params["proceed"]).open() as proceed:
            proceed.readline()
        return super().predict(input)
