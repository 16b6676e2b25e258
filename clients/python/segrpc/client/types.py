"""What calls return: plain values of numpy and the standard library."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage
from pycocotools import mask as coco

BoolMask = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the server found out about an image.

    Attributes:
        digest: ``sha256:`` and 64 hexadecimal digits of the encoded file.
        width: Width in pixels as displayed.
        height: Height in pixels as displayed.
        exif_orientation: The EXIF orientation that was applied, 1 to 8.
    """

    digest: str
    width: int
    height: int
    exif_orientation: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of a call went on the server, in seconds. Stages that did not run are 0.

    Attributes:
        queue: Waiting for the model.
        decode_image: From file to pixels.
        encode_image: From pixels to embedding.
        decode_mask: From embedding and prompts to logits.
        postprocess: From logits to masks.
        total: From arrival to answer.
        embedding_cached: Whether the embedding was at hand.
    """

    queue: float
    decode_image: float
    encode_image: float
    decode_mask: float
    postprocess: float
    total: float
    embedding_cached: bool


@dataclass(frozen=True)
class Mask:
    """A binary mask as large as the image. The pixels are decoded when they are first asked for.

    Attributes:
        height: Height in pixels.
        width: Width in pixels.
        score: The model's estimate of the intersection over union with the object, 0 to 1.
        area: The number of object pixels.
        box: ``(x_min, y_min, x_max, y_max)`` around all object pixels, maxima excluded; None for an empty mask.
        counts: Compressed COCO counts, a list of run lengths, or a PNG file, as `encoding` says.
        encoding: ``coco_rle``, ``run_lengths`` or ``png``.
    """

    height: int
    width: int
    score: float
    area: int
    box: tuple[float, float, float, float] | None
    encoding: str
    counts: bytes | npt.NDArray[np.uint32] = field(repr=False)

    @cached_property
    def array(self) -> BoolMask:
        """The pixels, ``[height, width]`` of bool; read-only."""
        if self.encoding == "png":
            assert isinstance(self.counts, bytes)
            pixels = np.array(PILImage.open(io.BytesIO(self.counts), formats=["PNG"]), dtype=np.bool_)
        elif self.encoding == "run_lengths":
            assert isinstance(self.counts, np.ndarray)
            values = np.arange(len(self.counts)) % 2 == 1
            pixels = np.repeat(values, self.counts).reshape(self.height, self.width, order="F")
        else:
            pixels = coco.decode({"size": [self.height, self.width], "counts": self.counts}).view(np.bool_)
        pixels.flags.writeable = False
        return pixels

    @cached_property
    def rle(self) -> Mapping[str, Any]:
        """The mask as pycocotools takes it: ``{"size": [height, width], "counts": bytes}``."""
        counts = self.counts
        if self.encoding != "coco_rle":
            counts = coco.encode(np.asfortranarray(self.array, dtype=np.uint8))["counts"]
        return {"size": [self.height, self.width], "counts": counts}

    def to_coco(self, image_id: int = 0, category_id: int = 1) -> dict[str, Any]:
        """Return a COCO segmentation result, fit for JSON; pycocotools finds area and box from the mask itself."""
        return {
            "image_id": image_id,
            "category_id": category_id,
            "segmentation": {"size": [self.height, self.width], "counts": self.rle["counts"].decode("ascii")},
            "score": self.score,
        }


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one prompt.

    Attributes:
        masks: The candidates, not sorted.
        object_score: The logit of there being an object at all; 0 if the model does not say.
    """

    masks: tuple[Mask, ...]
    object_score: float

    @property
    def scores(self) -> list[float]:
        """The candidates' scores."""
        return [mask.score for mask in self.masks]

    @property
    def best_index(self) -> int:
        """The position of the candidate with the highest score."""
        return int(np.argmax(self.scores))

    @property
    def best(self) -> Mask:
        """The candidate with the highest score."""
        return self.masks[self.best_index]


@dataclass(frozen=True, slots=True)
class Embedding:
    """An encoded image; give it back as ``embedding=`` to the model that made it.

    Attributes:
        image_embedding: The coarse level: for SAM 2 ``[1, 256, 64, 64]``.
        high_resolution_features: The finer levels, finest first: ``[1, 32, 256, 256]`` and ``[1, 64, 128, 128]``.

    Arrays are of float32, float16 or bfloat16 (``ml_dtypes``), as they were asked for.
    """

    image_embedding: npt.NDArray[Any]
    high_resolution_features: tuple[npt.NDArray[Any], ...]


@dataclass(frozen=True, slots=True)
class SegmentationResult:
    """The answer to `segment`.

    Attributes:
        model: The name of the model that answered.
        image: The image.
        predictions: One for each prompt, in order.
        logits: Low-resolution logits ``[num_prompts, num_masks, 256, 256]`` of float32, if they were asked for.
        embedding: The encoded image, if it was asked for.
        timing: Where the time went.
        request_id: The id of the request in the server's log.
    """

    model: str
    image: ImageInfo
    predictions: tuple[Prediction, ...]
    logits: Float32Array | None
    embedding: Embedding | None
    timing: Timing
    request_id: str


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """The answer to `encode`.

    Attributes:
        model: The name of the model that answered.
        image: The image.
        embedding: The encoded image, if it was asked for.
        timing: Where the time went.
        request_id: The id of the request in the server's log.
    """

    model: str
    image: ImageInfo
    embedding: Embedding | None
    timing: Timing
    request_id: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests must keep to: bytes, pixels and numbers at most."""

    max_image_bytes: int
    max_image_pixels: int
    max_prompts: int
    max_points: int
    max_chunk_bytes: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that is served.

    Attributes:
        name: The name for `model=`.
        family: The kind of model.
        is_default: Whether it answers requests that name none.
        input_size: The side of the square that images are scaled to; 0 if the model works at its own size.
        mask_size: The side of logits; 0 if there are none.
        mask_counts: The numbers of candidates that it can give; empty if it does not say.
        points: Whether it takes points.
        boxes: Whether it takes boxes.
        mask_input: Whether it takes the logits of an earlier mask.
        embeddings: Whether its embeddings can be returned and given back.
        device: Where it runs.
        compute_dtype: The precision it computes in.
        limits: What requests must keep to.
    """

    name: str
    family: str
    is_default: bool
    input_size: int
    mask_size: int
    mask_counts: tuple[int, ...]
    points: bool
    boxes: bool
    mask_input: bool
    embeddings: bool
    device: str
    compute_dtype: str
    limits: Limits
