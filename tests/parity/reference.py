"""The reference: ``SAM2ImagePredictor`` and pycocotools, asked for one prompt at a time."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco

try:
    import torchvision  # noqa: F401 - only whether it can be
except RuntimeError:
    # Some CPU builds lack two operators that torchvision describes when it is imported.
    _LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for _name in ("nms", "qnms"):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]

from sam2.sam2_image_predictor import SAM2ImagePredictor

# The same in both processes: the number of threads decides the order of summation, and so the last bits.
THREADS = 2


@dataclass(frozen=True)
class Prompt:
    """What is asked about one object; the fields are those of ``SAM2ImagePredictor.predict``."""

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Answer:
    """What the reference says: counts of each mask, scores ``[C]``, clamped logits ``[C, 256, 256]``."""

    counts: list[bytes]
    scores: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]


class Reference:
    """The reference predictor with an image set."""

    def __init__(self, model: Any) -> None:
        self._predictor = SAM2ImagePredictor(model)

    def set_image(self, pixels: npt.NDArray[np.uint8]) -> None:
        """Encode an image ``[height, width, 3]``, RGB."""
        self._predictor.set_image(pixels)

    def predict(self, prompt: Prompt, multimask: bool, mask_input: npt.NDArray[np.float32] | None = None) -> Answer:
        """Ask about one object. ``mask_input`` is ``[1, 256, 256]``."""
        masks, scores, logits = self._predictor.predict(
            point_coords=np.array(prompt.points, dtype=np.float32) if prompt.points else None,
            point_labels=np.array(prompt.labels, dtype=np.int32) if prompt.points else None,
            box=None if prompt.box is None else np.array(prompt.box, dtype=np.float32),
            mask_input=mask_input,
            multimask_output=multimask,
        )
        counts = [coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"] for mask in masks]
        return Answer(counts, scores, logits)


class PatientReference(Reference):
    """A reference that is asked the same about an image again and again, and computes each answer once."""

    _answers: dict[tuple[Prompt, bool, bytes | None], Answer]

    def set_image(self, pixels: npt.NDArray[np.uint8]) -> None:
        """See `Reference`."""
        super().set_image(pixels)
        self._answers = {}

    def predict(self, prompt: Prompt, multimask: bool, mask_input: npt.NDArray[np.float32] | None = None) -> Answer:
        """See `Reference`."""
        question = prompt, multimask, None if mask_input is None else mask_input.tobytes()
        if question not in self._answers:
            self._answers[question] = super().predict(prompt, multimask, mask_input)
        return self._answers[question]


@dataclass
class Memory:
    """Has networks with the same weights encode an image once: that takes most of the reference's time.

    What they do after the encoding may differ, as it does with the contrast of `tests.checkpoints`.
    """

    _encoded: dict[tuple[str, str], Any] = field(default_factory=dict)

    def share(self, network: Any) -> None:
        """Have a network look up what it, or another one, made of an image."""
        compute, weights = network.forward_image, _digest_of_encoder(network)

        def recall(image: torch.Tensor) -> Any:
            key = weights, hashlib.sha256(image.numpy().tobytes()).hexdigest()
            if key not in self._encoded:
                self._encoded[key] = compute(image)
            return self._encoded[key]

        network.forward_image = recall


def _digest_of_encoder(network: Any) -> str:
    """Tell networks apart by all weights but those that only have to do with the logits' size."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        if "output_hypernetworks_mlps" not in name:
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
