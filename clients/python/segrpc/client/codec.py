"""Between Python values and messages: pure functions, shared by both clients.

Mistakes that can be seen without a server raise ValueError or TypeError here; the server checks the rest.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from segrpc.client.types import (
    Embedding,
    EncodedImage,
    ImageInfo,
    Limits,
    Mask,
    ModelInfo,
    Prediction,
    SegmentationResult,
    Timing,
)
from segrpc.v1 import model_service_pb2, segmentation_service_pb2, types_pb2

ImageLike: TypeAlias = str | Path | bytes | npt.NDArray[np.uint8] | PILImage.Image
TensorType = Literal["float32", "float16", "bfloat16"]
MaskEncoding = Literal["coco_rle", "run_lengths", "png"]

URI_SCHEMES = ("file:", "http:", "https:", "data:")
DIGEST_SCHEME = "sha256:"

_DATA_TYPES: dict[TensorType, tuple[types_pb2.DataType.ValueType, npt.DTypeLike]] = {
    "float32": (types_pb2.DATA_TYPE_FLOAT32, np.dtype("<f4")),
    "float16": (types_pb2.DATA_TYPE_FLOAT16, np.dtype("<f2")),
    "bfloat16": (types_pb2.DATA_TYPE_BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
_NUMPY_TYPES = {number: (name, dtype) for name, (number, dtype) in _DATA_TYPES.items()}
_ENCODINGS: dict[MaskEncoding, types_pb2.MaskEncoding.ValueType] = {
    "coco_rle": types_pb2.MASK_ENCODING_COCO_RLE,
    "run_lengths": types_pb2.MASK_ENCODING_RUN_LENGTHS,
    "png": types_pb2.MASK_ENCODING_PNG,
}
_LABELS = {1: types_pb2.POINT_LABEL_FOREGROUND, 0: types_pb2.POINT_LABEL_BACKGROUND}


# Images


@dataclass(frozen=True, slots=True)
class EncodedFile:
    """An image as it travels: a file with its digest, or a name that the server resolves.

    Attributes:
        data: The encoded file; empty for a name.
        digest: ``sha256:`` and 64 hexadecimal digits; empty for a URI.
        uri: A URI; empty otherwise.
    """

    data: bytes = field(default=b"", repr=False)
    digest: str = ""
    uri: str = ""


def load_image(image: ImageLike) -> EncodedFile:
    """Turn an image of any kind into what travels.

    Args:
        image: A path, a ``file:``, ``http(s):`` or ``data:`` URI, a ``sha256:`` digest, the bytes of an encoded file,
            an array of uint8 (``[height, width]``, ``[height, width, 3]`` RGB or ``[height, width, 4]``), or a PIL
            image. Arrays and PIL images are sent as PNG, so that the server sees the very same pixels.

    Raises:
        OSError: If the file cannot be read.
        TypeError: If it is none of these.
        ValueError: If the array has another shape.
    """
    if isinstance(image, str) and image.startswith(DIGEST_SCHEME):
        return EncodedFile(digest=image)
    if isinstance(image, str) and image.lower().startswith(URI_SCHEMES):
        return EncodedFile(uri=image)
    if isinstance(image, str | Path):
        data = Path(image).read_bytes()
    elif isinstance(image, bytes | bytearray | memoryview):
        data = bytes(image)
    elif isinstance(image, np.ndarray):
        data = _png(_from_array(image))
    elif isinstance(image, PILImage.Image):
        data = _png(image)
    else:
        raise TypeError(f"image is a {type(image).__name__}; give a path, bytes, a numpy array or a PIL image")
    return EncodedFile(data=data, digest=f"{DIGEST_SCHEME}{hashlib.sha256(data).hexdigest()}")


def _from_array(array: npt.NDArray[Any]) -> PILImage.Image:
    if array.dtype != np.uint8:
        raise TypeError(f"image is an array of {array.dtype}; give uint8, 0 to 255")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise ValueError(
            f"image has shape {array.shape}; give [height, width], [height, width, 3] or [height, width, 4]"
        )
    return PILImage.fromarray(array)


def _png(image: PILImage.Image) -> bytes:
    # EXIF orientation is a property of files: a PIL image is sent as its pixels stand.
    plain = image if image.mode in ("1", "L", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")
    file = io.BytesIO()
    plain.save(file, "PNG", compress_level=1, exif=b"")
    return file.getvalue()


def image_message(image: EncodedFile, *, by_digest: bool = False) -> types_pb2.Image:
    """Put an image into a message, as the file or by its digest only."""
    if image.uri:
        return types_pb2.Image(uri=image.uri)
    if by_digest or not image.data:
        return types_pb2.Image(digest=image.digest)
    return types_pb2.Image(data=image.data)


# Prompts


def prompt_messages(points: Any, labels: Any, boxes: Any, mask_input: Any) -> list[types_pb2.Prompt]:
    """Put prompts into messages.

    One prompt may be given without the outer level: points ``[num_points, 2]``, labels ``[num_points]``, a box ``[4]``,
    a mask input ``[256, 256]`` or ``[1, 256, 256]``. Several are given as columns: points
    ``[num_prompts][num_points][2]``, labels ``[num_prompts][num_points]``, boxes ``[num_prompts][4]`` (None where
    there is none), a mask input ``[num_prompts, 1, 256, 256]``.

    Raises:
        ValueError: If shapes or lengths do not fit.
    """
    point_rows = point_column(points)
    label_rows = label_column(labels, point_rows)
    box_rows = box_column(boxes)
    mask_rows = _mask_column(mask_input)
    columns = {"points": point_rows, "boxes": box_rows, "mask_input": mask_rows}
    counts = {name: len(column) for name, column in columns.items() if column is not None}
    if len(set(counts.values())) > 1:
        described = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ValueError(f"the number of prompts differs: {described}")
    prompts = []
    for i in range(next(iter(counts.values()), 0)):
        prompt = types_pb2.Prompt()
        if point_rows is not None and label_rows is not None:
            for (x, y), label in zip(point_rows[i], label_rows[i], strict=True):
                prompt.points.add(x=x, y=y, label=label)
        box = box_rows[i] if box_rows is not None else None
        if box is not None:
            prompt.box.CopyFrom(types_pb2.Box(x_min=box[0], y_min=box[1], x_max=box[2], y_max=box[3]))
        if mask_rows is not None:
            prompt.mask_input.CopyFrom(tensor_message(mask_rows[i]))
        prompts.append(prompt)
    return prompts


def _depth(value: Any) -> int:
    """Return how deeply lists are nested, looking at the first element that is not empty or None."""
    if isinstance(value, np.ndarray):
        return value.ndim
    if not isinstance(value, Sequence):
        return 0
    return 1 + max((_depth(element) for element in value if element is not None), default=0)


def point_column(points: Any) -> list[list[tuple[float, float]]] | None:
    """Return points as ``[num_prompts][num_points]``; one prompt's may come without the outer level."""
    if points is None:
        return None
    column = [points] if _depth(points) <= 2 and not _is_column_of_empty(points) else points
    found = []
    for i, prompt in enumerate(column):
        if any(len(point) != 2 for point in prompt):
            raise ValueError(f"points[{i}] must be pairs x, y")
        found.append([(float(x), float(y)) for x, y in prompt])
    return found


def _is_column_of_empty(points: Any) -> bool:
    """Tell ``[[], []]``, prompts without points, from ``[]``."""
    return len(points) > 0 and all(len(prompt) == 0 for prompt in points)


def label_column(
    labels: Any, points: list[list[tuple[float, float]]] | None
) -> list[list[types_pb2.PointLabel.ValueType]] | None:
    """Return labels for the points of `point_column`; foreground where none are given."""
    if points is None:
        if labels is not None:
            raise ValueError("labels are given without points")
        return None
    if labels is None:
        return [[types_pb2.POINT_LABEL_FOREGROUND] * len(prompt) for prompt in points]
    column = [labels] if _depth(labels) <= 1 and not (len(points) != 1 and len(labels) == 0) else labels
    if [len(row) for row in column] != [len(prompt) for prompt in points]:
        have, want = [len(row) for row in column], [len(prompt) for prompt in points]
        raise ValueError(f"labels has {have} labels for {want} points in the prompts; each point needs one")
    if any(label not in _LABELS for row in column for label in row):
        raise ValueError("a label is neither 1 (on the object) nor 0 (off it)")
    return [[_LABELS[int(label)] for label in row] for row in column]


def box_column(boxes: Any) -> list[tuple[float, float, float, float] | None] | None:
    """Return boxes as ``[num_prompts]``; one prompt's may come without the outer level."""
    if boxes is None:
        return None
    column = [boxes] if _depth(boxes) == 1 and any(element is not None for element in boxes) else boxes
    found: list[tuple[float, float, float, float] | None] = []
    for i, box in enumerate(column):
        if box is not None and len(box) != 4:
            raise ValueError(f"boxes[{i}] must be x_min, y_min, x_max, y_max")
        found.append(None if box is None else (float(box[0]), float(box[1]), float(box[2]), float(box[3])))
    return found


def _mask_column(mask_input: Any) -> list[npt.NDArray[np.float32]] | None:
    if mask_input is None:
        return None
    array = np.asarray(mask_input, dtype=np.float32)
    if array.ndim == 2:
        array = array[None]
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[1] != 1:
        raise ValueError(
            f"mask_input has shape {np.shape(mask_input)}; give one candidate for each prompt: [256, 256], "
            "[1, 256, 256] or [num_prompts, 1, 256, 256]"
        )
    return list(array)


# Tensors


def tensor_message(array: npt.NDArray[Any]) -> types_pb2.Tensor:
    """Put an array into a message in its own type: float32, float16 or bfloat16; others become float32."""
    name = array.dtype.name
    number, dtype = _DATA_TYPES[name] if name in _DATA_TYPES else _DATA_TYPES["float32"]
    return types_pb2.Tensor(dtype=number, shape=array.shape, data=np.ascontiguousarray(array, dtype=dtype).tobytes())


def tensor_array(tensor: types_pb2.Tensor) -> npt.NDArray[Any]:
    """Return a message's array in its own type."""
    return np.frombuffer(tensor.data, dtype=_NUMPY_TYPES[tensor.dtype][1]).reshape(tuple(tensor.shape)).copy()


def data_type(name: TensorType) -> types_pb2.DataType.ValueType:
    """Return the number of a tensor type.

    Raises:
        ValueError: If there is no such type.
    """
    if name not in _DATA_TYPES:
        raise ValueError(f"tensor_dtype {name!r} is unknown; give {', '.join(_DATA_TYPES)}")
    return _DATA_TYPES[name][0]


def mask_encoding(name: MaskEncoding) -> types_pb2.MaskEncoding.ValueType:
    """Return the number of a mask encoding.

    Raises:
        ValueError: If there is no such encoding.
    """
    if name not in _ENCODINGS:
        raise ValueError(f"mask_encoding {name!r} is unknown; give {', '.join(_ENCODINGS)}")
    return _ENCODINGS[name]


def output_options(options: Mapping[str, Any]) -> types_pb2.OutputOptions:
    """Put the options that say what to return into a message; those that are not given stay unset.

    Raises:
        ValueError: If there is no such tensor type or mask encoding.
    """
    return types_pb2.OutputOptions(
        multimask_output=options.get("multimask_output"),
        num_multimask_outputs=options.get("num_multimask_outputs"),
        return_image_embedding=options.get("return_image_embedding", False),
        return_logits=options.get("return_logits", False),
        tensor_dtype=data_type(options.get("tensor_dtype", "float32")),
        mask_encoding=mask_encoding(options.get("mask_encoding", "coco_rle")),
    )


# Answers


def segmentation_result(response: segmentation_service_pb2.SegmentResponse) -> SegmentationResult:
    """Take an answer out of its message."""
    logits = tensor_array(response.mask_logits) if response.HasField("mask_logits") else None
    return SegmentationResult(
        model=response.model,
        image=image_info(response.image),
        predictions=tuple(map(prediction, response.predictions)),
        logits=None if logits is None else logits.astype(np.float32, copy=False),
        embedding=_embedding(response),
        timing=timing(response.timing),
        request_id=response.request_id,
    )


def encoded_image(response: segmentation_service_pb2.EncodeImageResponse) -> EncodedImage:
    """Take an answer out of its message."""
    return EncodedImage(
        model=response.model,
        image=image_info(response.image),
        embedding=_embedding(response),
        timing=timing(response.timing),
        request_id=response.request_id,
    )


def image_info(message: types_pb2.ImageInfo) -> ImageInfo:
    """Take the description of an image out of its message."""
    return ImageInfo(message.digest, message.width, message.height, message.exif_orientation)


def prediction(message: types_pb2.Prediction) -> Prediction:
    """Take the answer to one prompt out of its message."""
    return Prediction(tuple(map(_mask, message.masks)), message.object_score)


def model_info(message: model_service_pb2.Model) -> ModelInfo:
    """Take the description of a model out of its message."""
    limits = message.limits
    return ModelInfo(
        name=message.name,
        family=message.family,
        is_default=message.is_default,
        input_size=message.input_size,
        mask_size=message.mask_size,
        mask_counts=tuple(message.mask_counts),
        points=message.points,
        boxes=message.boxes,
        mask_input=message.mask_input,
        embeddings=message.embeddings,
        device=message.device,
        compute_dtype=_NUMPY_TYPES[message.compute_dtype][0] if message.compute_dtype in _NUMPY_TYPES else "",
        limits=Limits(
            max_image_bytes=limits.max_image_bytes,
            max_image_pixels=limits.max_image_pixels,
            max_prompts=limits.max_prompts,
            max_points=limits.max_points,
            max_chunk_bytes=limits.max_chunk_bytes,
        ),
    )


def _mask(message: types_pb2.Mask) -> Mask:
    encoding = message.WhichOneof("encoding") or "coco_rle"
    counts: bytes | npt.NDArray[np.uint32] = (
        np.array(message.run_lengths.lengths, dtype=np.uint32)
        if encoding == "run_lengths"
        else getattr(message, encoding)
    )
    box = message.bounding_box if message.HasField("bounding_box") else None
    return Mask(
        height=message.height,
        width=message.width,
        score=message.score,
        area=message.area,
        box=None if box is None else (box.x_min, box.y_min, box.x_max, box.y_max),
        encoding=encoding,
        counts=counts,
    )


def _embedding(
    response: segmentation_service_pb2.SegmentResponse | segmentation_service_pb2.EncodeImageResponse,
) -> Embedding | None:
    if not response.HasField("image_embedding"):
        return None
    features = tuple(tensor_array(tensor) for tensor in response.high_resolution_features)
    return Embedding(tensor_array(response.image_embedding), features)


def timing(message: types_pb2.Timing) -> Timing:
    """Take the times of a call out of their message."""
    stages = ("queue", "decode_image", "encode_image", "decode_mask", "postprocess", "total")
    seconds = {stage: getattr(message, stage).ToNanoseconds() / 1e9 for stage in stages}
    return Timing(**seconds, embedding_cached=message.embedding_cached)
