"""The values that models take and give, checked when they are made.

`SegmentationInput` and `SegmentationOutput` are what a model of any kind sees. Prompts are columns: ``points[i]``,
``labels[i]``, ``boxes[i]`` and ``mask_input[i]`` belong to prompt ``i``. Coordinates are ``x, y`` in pixels of the
image as displayed; fractions are allowed.
"""

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    field_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from segrpc.service import rle
from segrpc.service.errors import Violation

FloatType = Literal["float32", "float16", "bfloat16"]

NUMPY_TYPES: dict[FloatType, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

MAX_DIMENSIONS = 8


class _Value(BaseModel):
    """An immutable value; bytes travel as base64 in JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")


class _CheckedOnce(_Value):
    """A value whose contents cost something to check: that is done when it is made, and not again as part of others."""

    @model_validator(mode="wrap")
    @classmethod
    def _check_once(cls, value: Any, make: ModelWrapValidatorHandler[Self]) -> Self:
        return value if isinstance(value, cls) else make(value)._checked()

    @abstractmethod
    def _checked(self) -> Self:
        """Return itself, or raise what is wrong with it."""


class NDArrayFloat(_CheckedOnce):
    """A dense array of finite floating-point numbers as raw bytes.

    Attributes:
        data: The elements: row-major, little-endian, unpadded.
        shape: The length of each axis, outermost first.
        dtype: The element type.
    """

    data: bytes = Field(repr=False)
    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(max_length=MAX_DIMENSIONS)
    dtype: FloatType = "float32"

    @model_validator(mode="before")
    @classmethod
    def _accept_numpy(cls, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            array = cls.from_numpy(value)
            return {"data": array.data, "shape": array.shape, "dtype": array.dtype}
        return value

    def _checked(self) -> Self:
        expected = NUMPY_TYPES[self.dtype].itemsize
        for length in self.shape:
            expected *= length
        if len(self.data) != expected:
            raise _wrong(
                "data", f"{len(self.data)} bytes; shape {list(self.shape)} of {self.dtype} takes {expected} bytes"
            )
        if not np.isfinite(self._view()).all():
            raise _wrong("data", "an element is NaN or infinite; all must be finite")
        return self

    def _view(self) -> npt.NDArray[Any]:
        return np.frombuffer(self.data, dtype=NUMPY_TYPES[self.dtype]).reshape(self.shape)

    @classmethod
    def from_numpy(cls, array: npt.NDArray[Any], dtype: FloatType = "float32") -> Self:
        """Make one of an array of any real type; values are rounded to nearest even.

        Raises:
            pydantic.ValidationError: If an element is not finite in ``dtype``, or an axis is empty.
        """
        with np.errstate(over="ignore"):  # reported as not finite
            converted = np.ascontiguousarray(array, dtype=NUMPY_TYPES[dtype])
        return cls(data=converted.tobytes(), shape=array.shape, dtype=dtype)

    def to_numpy(self) -> npt.NDArray[np.float32]:
        """Return the elements as float32 (exact from every type). Read-only if it shares memory with ``data``."""
        return self._view().astype(np.float32, copy=False)


class CompressedRLE(_CheckedOnce):
    """A binary mask as COCO run-length encoding.

    Attributes:
        size: ``(height, width)`` in pixels.
        counts: The compressed counts of pycocotools; their runs sum to ``height * width``.
        area: The number of object pixels.
        bounding_box: The smallest ``(x_min, y_min, x_max, y_max)`` that holds them, maxima excluded; None if there are
            none.
    """

    size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    counts: bytes
    # Found when it is made, where the runs are at hand, so that nobody has to decompress the counts for them.
    _area: int = PrivateAttr(0)
    _bounding_box: rle.Box | None = PrivateAttr(None)

    @property
    def area(self) -> int:  # noqa: D102 - see above
        return self._area

    @property
    def bounding_box(self) -> rle.Box | None:  # noqa: D102 - see above
        return self._bounding_box

    @model_validator(mode="before")
    @classmethod
    def _accept_text(cls, value: Any) -> Any:
        # In JSON, as in COCO files, counts are plain ASCII and not base64.
        if isinstance(value, dict) and isinstance(value.get("counts"), str):
            return {**value, "counts": value["counts"].encode("utf-8")}
        return value

    def _checked(self) -> Self:
        try:
            runs = rle.checked_runs(self.counts, *self.size)
        except ValueError as error:
            raise _wrong("counts", str(error)) from None
        return self._measured(runs)

    def _measured(self, runs: rle.Runs) -> Self:
        self._area = rle.area(runs)
        self._bounding_box = rle.bounding_box(runs, self.size[0])
        return self

    @field_serializer("counts", when_used="json")
    def _counts_as_text(self, counts: bytes) -> str:
        return counts.decode("ascii")

    @classmethod
    def from_mask(cls, mask: npt.NDArray[Any]) -> Self:
        """Encode a mask ``[height, width]``, non-zero where the object is."""
        return cls.from_runs(rle.runs_of_mask(mask), *mask.shape)

    @classmethod
    def from_runs(cls, runs: rle.Runs, height: int, width: int) -> Self:
        """Encode runs in column-major order, background first, that sum to ``height * width``."""
        # Not validated: the runs are our own.
        return cls.model_construct(size=(height, width), counts=rle.compress(runs))._measured(runs)

    def to_mask(self) -> rle.BoolMask:
        """Decode into ``[height, width]`` of bool."""
        return rle.decode(self.counts, *self.size)


def _in_order(box: list[float]) -> list[float]:
    x_min, y_min, x_max, y_max = box
    if x_max <= x_min or y_max <= y_min:
        raise PydanticCustomError(
            "box_order",
            "must have x_min < x_max and y_min < y_max, got [{x_min}, {y_min}, {x_max}, {y_max}]",
            {"x_min": x_min, "y_min": y_min, "x_max": x_max, "y_max": y_max},
        )
    return box


Coordinate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PointXY = Annotated[list[Coordinate], Field(min_length=2, max_length=2)]
BoxXYXY = Annotated[list[Coordinate], Field(min_length=4, max_length=4), AfterValidator(_in_order)]


class SegmentationInput(_Value):
    """What to segment in an image.

    Prompts may differ in kind: one without points has an empty list in ``points`` and ``labels``, one without a box has
    None in ``boxes``. A column that no prompt uses is None. ``mask_input`` comes with every prompt or with none.

    Attributes:
        image: The image: encoded bytes, a path, a URL, a ``data:`` URL or base64. None keeps the current image
            (``reset_predictor=False``).
        image_embedding: A pre-computed embedding, for SAM 2 ``[1, 256, 64, 64]``; with ``high_resolution_features``.
        high_resolution_features: Its finer levels, finest first: for SAM 2 ``[1, 32, 256, 256]`` and
            ``[1, 64, 128, 128]``.
        mask_input: Logits of an earlier mask of each prompt, ``[num_prompts, 1, 256, 256]``.
        reset_predictor: True for a new image; False keeps the image that the session used last.
        points: Clicks ``[num_prompts][num_points][2]`` as ``x, y`` in pixels, at least 0.
        labels: For each click 1 (object) or 0 (background), ``[num_prompts][num_points]``. None: all 1.
        boxes: ``[num_prompts][4]`` as ``x_min, y_min, x_max, y_max`` in pixels.
        num_multimask_outputs: How many candidates a prompt gets with ``multimask_output``.
        multimask_output: Whether a prompt gets several candidates or one.
        return_image_embedding: Whether to return the embedding.
        return_logits: Whether to return the low-resolution logits.
    """

    image: str | Path | bytes | None = Field(default=None, repr=False)
    image_embedding: NDArrayFloat | None = None
    high_resolution_features: list[NDArrayFloat] | None = None
    mask_input: NDArrayFloat | None = None
    reset_predictor: bool = True
    points: list[list[PointXY]] | None = None
    labels: list[list[Literal[0, 1]]] | None = None
    boxes: list[BoxXYXY | None] | None = None
    num_multimask_outputs: int = Field(default=3, ge=1)
    multimask_output: bool = True
    return_image_embedding: bool = False
    return_logits: bool = False

    @model_validator(mode="before")
    @classmethod
    def _label_points(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("labels") is None and isinstance(value.get("points"), list):
            return {**value, "labels": [[1] * len(points) for points in value["points"]]}
        return value

    @model_validator(mode="after")
    def _check_image(self) -> Self:
        if self.image is not None and not self.reset_predictor:
            raise _wrong("image", "must be unset when reset_predictor is false: the session's image is kept")
        if self.image is None and self.reset_predictor:
            raise _wrong("image", "is required unless reset_predictor is false")
        if (self.image_embedding is None) != (not self.high_resolution_features):
            missing = "image_embedding" if self.image_embedding is None else "high_resolution_features"
            raise _wrong(missing, "is required: image_embedding and high_resolution_features are given together")
        return self

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        if not self.num_prompts and not self.return_image_embedding:
            raise _wrong("points", "at least one prompt is required unless return_image_embedding is set")
        for name in ("points", "labels", "boxes"):
            column = getattr(self, name)
            if column is not None and len(column) != self.num_prompts:
                raise _wrong(name, f"has {len(column)} prompts; the other columns have {self.num_prompts}")
        if self.labels is not None and self.points is None:
            raise _wrong("labels", "must be unset without points")
        for i, (points, labels) in enumerate(zip(self.points or (), self.labels or (), strict=True)):
            if len(points) != len(labels):
                raise _wrong(f"labels[{i}]", f"has {len(labels)} labels for {len(points)} points; each point needs one")
        self._check_mask_input()
        for i in range(self.num_prompts if self.mask_input is None else 0):
            if not (self.points and self.points[i]) and not (self.boxes and self.boxes[i]):
                raise _wrong(f"points[{i}]", "the prompt is empty: give points, a box or a mask input")
        return self

    def _check_mask_input(self) -> None:
        if self.mask_input is None:
            return
        shape = self.mask_input.shape
        if len(shape) != 4 or shape[1] != 1 or shape[0] != self.num_prompts:
            raise _wrong(
                "mask_input",
                f"has shape {list(shape)}; it must be [num_prompts, 1, size, size] with one candidate for each of "
                f"{self.num_prompts} prompts",
            )

    @property
    def num_prompts(self) -> int:
        """The number of prompts."""
        for column in (self.points, self.boxes, self.labels):
            if column:
                return len(column)
        return self.mask_input.shape[0] if self.mask_input is not None else 0

    def violations_in(self, width: int, height: int) -> Iterator[Violation]:
        """Find the points and box corners that lie outside an image of ``width x height`` pixels."""
        sizes = (width, height)
        for i, points in enumerate(self.points or ()):
            for j, point in enumerate(points):
                for axis, value in enumerate(point):
                    if value > sizes[axis]:
                        yield _outside(f"points[{i}][{j}][{axis}]", value, width, height)
        for i, box in enumerate(self.boxes or ()):
            for corner, value in enumerate(box or ()):
                if value > sizes[corner % 2]:
                    yield _outside(f"boxes[{i}][{corner}]", value, width, height)


def _outside(field: str, value: float, width: int, height: int) -> Violation:
    return Violation(field, f"{value:g} lies outside the image of {width} x {height} pixels")


class SegmentationOutput(_Value):
    """The masks for each prompt.

    Attributes:
        masks: ``[num_predictions][num_masks]``, as large as the image.
        scores: The predicted IoU of each mask, ``[num_predictions, num_masks]``, 0 to 1.
        object_scores: For each prompt the logit of there being an object at all, ``[num_predictions]``; None if the
            model does not say.
        image_embedding: The embedding, if asked for.
        high_resolution_features: Its finer levels, if asked for.
        mask_logits: Low-resolution logits ``[num_predictions, num_masks, 256, 256]`` clamped to [-32, 32],
            if asked for.
    """

    masks: list[list[CompressedRLE]]
    scores: NDArrayFloat | None = None
    object_scores: NDArrayFloat | None = None
    image_embedding: NDArrayFloat | None = None
    high_resolution_features: list[NDArrayFloat] | None = None
    mask_logits: NDArrayFloat | None = None

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        if self.masks and self.scores is None:
            raise _wrong("scores", "is required for masks")
        shape = (len(self.masks), len(self.masks[0])) if self.masks else None
        if self.masks and any(len(row) != len(self.masks[0]) for row in self.masks):
            raise _wrong("masks", "must have as many candidates for each prompt")
        if self.scores is not None and self.scores.shape != shape:
            raise _wrong("scores", f"has shape {list(self.scores.shape)} for masks of {shape}")
        return self


class ModelDeploymentConfig(_Value):
    """Which model to serve, under which name, and how.

    Attributes:
        name: The name that clients use.
        model: The name that the model class is registered under. Empty: the same as ``name``.
        model_params: What the model class understands, such as ``checkpoint``, ``device`` and ``dtype``.
    """

    model_config = ConfigDict(protected_namespaces=())

    name: str = Field(min_length=1, max_length=128)
    model: str = ""
    model_params: dict[str, Any] = Field(default_factory=dict)

    @property
    def registered_name(self) -> str:
        """The name that the model class is registered under."""
        return self.model or self.name


class ModelMetadata(_Value):
    """What a model is and can do.

    Attributes:
        family: The kind of model.
        input_size: The side of the square that images are scaled to, in pixels; 0 if the model works at its own size.
        mask_size: The side of low-resolution logits; 0 if there are none.
        mask_counts: The numbers of candidates that it can give for a prompt; empty if it does not say.
        points: Whether it takes points.
        boxes: Whether it takes boxes.
        mask_input: Whether it takes the logits of an earlier mask.
        embeddings: Whether its embeddings can be returned and given back.
        device: Where it runs.
        compute_dtype: The precision that it computes in.
    """

    family: str = "custom"
    input_size: int = 0
    mask_size: int = 0
    mask_counts: tuple[int, ...] = ()
    points: bool = True
    boxes: bool = True
    mask_input: bool = False
    embeddings: bool = False
    device: str = "cpu"
    compute_dtype: FloatType = "float32"


def _wrong(field: str, description: str) -> PydanticCustomError:
    """Make an error about a field that pydantic would otherwise blame on the whole value."""
    # `field` and `description` come back out in violations_of; braces would be read as a template.
    return PydanticCustomError("segrpc", "{description}", {"field": field, "description": description})


def violations_of(error: ValidationError) -> list[Violation]:
    """Translate pydantic's errors into paths such as ``points[0][2][1]`` and what is wrong there."""
    violations = []
    for line in error.errors(include_url=False, include_input=False):
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in line["loc"])
        field = line.get("ctx", {}).get("field")
        path = f"{path}.{field}" if field else path
        violations.append(Violation(path.removeprefix("."), line["msg"]))
    return violations
