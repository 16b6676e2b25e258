"""What a model is: the classes that models of any origin subclass."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from segrpc.service.errors import CapabilityMissingError, InvalidFieldError, NoPredictorStateError
from segrpc.service.images.decode import ImageLimits, RGBImage, decode_image
from segrpc.service.images.sources import SourcePolicy, read_source
from segrpc.service.schemas import (
    CompressedRLE,
    FloatType,
    ModelDeploymentConfig,
    ModelMetadata,
    NDArrayFloat,
    SegmentationInput,
    SegmentationOutput,
)

Float32Array = npt.NDArray[np.float32]

LOGIT_LIMIT = 32.0  # returned logits are clamped to [-32, 32], as the reference predictor does


class InferenceModel(ABC):
    """A model that is loaded once and then asked many times, from one thread at a time (but see `PromptableModel`).

    The thread that loads it need not be the one that asks it.

    Args:
        config: How it was configured to be served.
    """

    # Whether model_params may have a `device`, which the service then sets to run the model on several devices.
    takes_device: ClassVar[bool] = False

    def __init__(self, config: ModelDeploymentConfig) -> None:
        self._config = config

    @property
    def config(self) -> ModelDeploymentConfig:
        """How it was configured to be served."""
        return self._config

    @property
    def metadata(self) -> ModelMetadata:
        """What it is and can do. The default promises points and boxes."""
        return ModelMetadata()

    @abstractmethod
    def load_model(self) -> None:
        """Get ready to predict.

        Raises:
            ModelLoadError: If that is not possible; the message tells the operator what to do.
        """

    @abstractmethod
    def predict(self, input: Any) -> Any:  # noqa: A002 - the name is part of the interface
        """Answer one input."""

    def predict_batch(self, inputs: Sequence[Any]) -> list[Any]:
        """Answer several inputs, in order. The default asks for one after the other."""
        return [self.predict(one) for one in inputs]

    def unload(self) -> None:  # noqa: B027 - most models have nothing to free
        """Free what `load_model` took. It is not used again afterwards."""

    def device_memory(self) -> int | None:
        """Return the bytes that this process holds of the memory of the model's device; None if that is the host's."""
        return None


class SegmentationModel(InferenceModel):
    """A model that segments images. To be served, a subclass needs no more than `load_model` and `predict`.

    Example::

        @register_model("brightness")
        class Brightness(SegmentationModel):
            def load_model(self) -> None:
                self.threshold = self.config.model_params.get("threshold", 128)

            def predict(self, input: SegmentationInput) -> SegmentationOutput:
                grey = decode_image(input.image).pixels.mean(axis=2)
                mask = CompressedRLE.from_mask(grey > self.threshold)
                return SegmentationOutput(
                    masks=[[mask]] * input.num_prompts,
                    scores=np.ones((input.num_prompts, 1)),
                )
    """

    @abstractmethod
    def predict(self, input: SegmentationInput) -> SegmentationOutput:  # noqa: A002
        """Segment one image.

        Args:
            input: The image and the prompts. In the service ``image`` is always the encoded file as bytes, checked
                against the limits, and all coordinates lie in the image.

        Returns:
            Masks as large as the image, one row for each prompt.
        """


@dataclass(frozen=True, slots=True)
class Embedding:
    """An encoded image: all that decoding needs to know of it.

    Attributes:
        width: The image's width in pixels.
        height: The image's height in pixels.
        features: What the model made of it; only the model that made it looks inside, and never writes.
        nbytes: How much memory that takes.
    """

    width: int
    height: int
    features: Any
    nbytes: int


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """One prompt on one encoded image.

    Attributes:
        embedding: The image.
        points: ``[num_points, 2]``, ``x, y`` in pixels of the image; may be empty.
        labels: ``[num_points]``, 1 for object and 0 for background.
        box: ``[4]`` as ``x_min, y_min, x_max, y_max`` in pixels, or None.
        mask_input: Logits of an earlier mask ``[1, mask_size, mask_size]``, or None.
        num_masks: How many candidates to give.
    """

    embedding: Embedding
    points: Float32Array
    labels: npt.NDArray[np.int32]
    box: Float32Array | None
    mask_input: Float32Array | None
    num_masks: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """The candidates for one prompt.

    Attributes:
        logits: ``[num_masks, mask_size, mask_size]``, float32, not clamped; positive where the object is.
        scores: ``[num_masks]``, the predicted IoU, 0 to 1.
        object_score: The logit of there being an object at all; 0 if the model does not say.
    """

    logits: Float32Array
    scores: Float32Array
    object_score: float


class PromptableModel(SegmentationModel):
    """A segmentation model in two steps: encode an image once, decode prompts on it many times.

    No state is shared between calls: an `Embedding` is a value that the caller keeps.

    The service calls it from two threads, so that a click never waits for somebody's encoding: `embed` runs in one,
    `decode`, `to_masks` and the import and export of embeddings in the other, at the same time; `offload` and `restore`
    run in either. What they share must not be written after `load_model`.
    """

    # What paths and URLs a direct call of `predict` may read. The service resolves them before it calls the model.
    source_policy = SourcePolicy()
    image_limits = ImageLimits()

    @property
    def batches(self) -> bool:
        """Whether it gains from many requests at once: then `decode` gets those of several callers together."""
        return False

    @abstractmethod
    def embed(self, image: RGBImage) -> Embedding:
        """Encode an image.

        Args:
            image: ``[height, width, 3]`` of uint8, RGB.
        """

    @abstractmethod
    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        """Find the objects that prompts describe. The prompts never influence each other."""

    @abstractmethod
    def to_masks(self, decoded: Decoded, width: int, height: int) -> list[CompressedRLE]:
        """Make masks of ``height x width`` pixels, one for each candidate."""

    def to_masks_of_all(
        self, decoded: Sequence[Decoded], sizes: Sequence[tuple[int, int]]
    ) -> list[list[CompressedRLE]]:
        """Make the masks of several answers, each of a width and a height: as `to_masks`, which a model may better."""
        return [self.to_masks(one, width, height) for one, (width, height) in zip(decoded, sizes, strict=True)]

    def export_embedding(self, embedding: Embedding, dtype: FloatType) -> tuple[NDArrayFloat, list[NDArrayFloat]]:
        """Turn an embedding into ``image_embedding`` and ``high_resolution_features``.

        Raises:
            CapabilityMissingError: If the model's embeddings cannot leave it.
        """
        raise CapabilityMissingError(f"model {self.config.name!r} cannot return embeddings")

    def import_embedding(
        self, image_embedding: NDArrayFloat, high_resolution_features: list[NDArrayFloat], width: int, height: int
    ) -> Embedding:
        """Turn what `export_embedding` gave back into an embedding of an image of ``height x width`` pixels.

        Raises:
            CapabilityMissingError: If the model's embeddings cannot leave it.
            EmbeddingMismatchError: If they are not of this model.
        """
        raise CapabilityMissingError(f"model {self.config.name!r} does not take embeddings")

    def offload(self, embedding: Embedding) -> Embedding | None:
        """Copy an embedding from a device to the host's memory, to make room for others.

        Returns:
            What only `restore` understands; None, the default, if embeddings are in the host's memory anyway.
        """
        return None

    def restore(self, embedding: Embedding) -> Embedding:
        """Bring an embedding back that `offload` copied."""
        return embedding

    def predict(self, input: SegmentationInput) -> SegmentationOutput:  # noqa: A002
        """Encode and decode in one go. See `SegmentationModel.predict`; ``image`` may also be a path, URL or base64."""
        if input.image is None:
            raise NoPredictorStateError("the model keeps no image between calls: give one, with reset_predictor=True")
        image = decode_image(read_source(input.image, self.source_policy, self.image_limits), self.image_limits)
        if input.image_embedding is not None and input.high_resolution_features is not None:
            embedding = self.import_embedding(
                input.image_embedding, input.high_resolution_features, image.width, image.height
            )
        else:
            embedding = self.embed(image.pixels)
        requests = decode_requests(input, embedding, self.metadata, self.config.name)
        decoded = self.decode(requests)
        masks = self.to_masks_of_all(decoded, [(image.width, image.height)] * len(decoded))
        return assemble_output(self, input, embedding, decoded, masks, "float32")


def decode_requests(
    input: SegmentationInput,  # noqa: A002
    embedding: Embedding,
    metadata: ModelMetadata,
    model: str,
) -> list[DecodeRequest]:
    """Split an input into one request for each prompt, and check that the model can answer them.

    Raises:
        InvalidFieldError: If a coordinate lies outside the image, or the mask input has the wrong size.
        CapabilityMissingError: If the model lacks an ability that the prompts or the options need.
    """
    violations = tuple(input.violations_in(embedding.width, embedding.height))
    if violations:
        raise InvalidFieldError.of_all(violations)
    check_capabilities(input, metadata, model)
    masks = None if input.mask_input is None else input.mask_input.to_numpy()
    num_masks = input.num_multimask_outputs if input.multimask_output else 1
    requests = []
    for i in range(input.num_prompts):
        box = input.boxes[i] if input.boxes else None
        requests.append(
            DecodeRequest(
                embedding=embedding,
                points=np.array(input.points[i] if input.points else [], dtype=np.float32).reshape(-1, 2),
                labels=np.array(input.labels[i] if input.labels else [], dtype=np.int32),
                box=None if box is None else np.array(box, dtype=np.float32),
                mask_input=None if masks is None else masks[i],
                num_masks=num_masks,
            )
        )
    return requests


def check_capabilities(input: SegmentationInput, metadata: ModelMetadata, model: str) -> None:  # noqa: A002
    """Check what can be known before the image is looked at.

    Raises:
        InvalidFieldError: If the mask input has the wrong size.
        CapabilityMissingError: If the model lacks an ability that the prompts or the options need.
    """
    wants_embeddings = input.return_image_embedding or input.image_embedding is not None
    missing = [
        name
        for name, wanted, able in (
            ("points", any(input.points or ()), metadata.points),
            ("boxes", any(input.boxes or ()), metadata.boxes),
            ("mask_input", input.mask_input is not None, metadata.mask_input),
            ("embeddings", wants_embeddings, metadata.embeddings),
            ("logits", input.return_logits, metadata.mask_size > 0),
        )
        if wanted and not able
    ]
    if missing:
        raise CapabilityMissingError(f"model {model!r} does not support {', '.join(missing)}")
    counts = metadata.mask_counts
    wanted = input.num_multimask_outputs if input.multimask_output else 1
    if input.num_prompts and counts and wanted not in counts:
        raise CapabilityMissingError(
            f"model {model!r} gives {' or '.join(map(str, counts))} masks for a prompt, not {wanted}"
        )
    size = metadata.mask_size
    if input.mask_input is not None and input.mask_input.shape[2:] != (size, size):
        shape = list(input.mask_input.shape[1:])
        raise InvalidFieldError.of(
            "mask_input", f"has shape {shape} for a prompt; model {model!r} takes [1, {size}, {size}]"
        )


def assemble_output(
    model: PromptableModel,
    input: SegmentationInput,  # noqa: A002
    embedding: Embedding,
    decoded: Sequence[Decoded],
    masks: list[list[CompressedRLE]],
    tensor_dtype: FloatType,
) -> SegmentationOutput:
    """Put together what the input asked for; returned tensors are of ``tensor_dtype``."""
    image_embedding, features = None, None
    if input.return_image_embedding:
        image_embedding, features = model.export_embedding(embedding, tensor_dtype)
    logits = None
    if input.return_logits and decoded:
        clamped = np.clip(np.stack([one.logits for one in decoded]), -LOGIT_LIMIT, LOGIT_LIMIT)
        logits = NDArrayFloat.from_numpy(clamped, tensor_dtype)
    return SegmentationOutput(
        masks=masks,
        scores=NDArrayFloat.from_numpy(np.stack([one.scores for one in decoded])) if decoded else None,
        object_scores=NDArrayFloat.from_numpy(np.array([one.object_score for one in decoded])) if decoded else None,
        image_embedding=image_embedding,
        high_resolution_features=features,
        mask_logits=logits,
    )
