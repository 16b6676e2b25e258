"""Between messages and pydantic values: pure functions.

What pydantic finds wrong in its own terms (``points[0][2][0]``) is reported in the request's terms
(``prompts[0].points[2].x``).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
from google.protobuf import duration_pb2
from pydantic import ValidationError

from segrpc.service import rle
from segrpc.service.engine.base import EncodeResult, SegmentResult, ServedModel, StageTimes
from segrpc.service.errors import InvalidFieldError, ModelNotFoundError, SegrpcError, Violation
from segrpc.service.identity.principal import Principal
from segrpc.service.images.decode import ImageHeader
from segrpc.service.rpc.serialise import DATA_TYPES, serialise
from segrpc.service.schemas import (
    CompressedRLE,
    FloatType,
    NDArrayFloat,
    SegmentationInput,
    SegmentationOutput,
    violations_of,
)
from segrpc.v1 import model_service_pb2, segmentation_service_pb2, types_pb2

MAX_NAME = 128  # characters of request_id, session_id and model
DEFAULT_MULTIMASK_OUTPUTS = 3

_FLOAT_TYPES = {number: name for name, number in DATA_TYPES.items()}
_LABELS: dict[types_pb2.PointLabel.ValueType, Literal[0, 1]] = {
    types_pb2.POINT_LABEL_UNSPECIFIED: 1,
    types_pb2.POINT_LABEL_FOREGROUND: 1,
    types_pb2.POINT_LABEL_BACKGROUND: 0,
}
_CORNERS = ("x_min", "y_min", "x_max", "y_max")


# Requests


def check_name(field: str, value: str) -> None:
    """Raise InvalidFieldError if a client's name for something is too long."""
    if len(value) > MAX_NAME:
        raise InvalidFieldError.of(field, f"has {len(value)} characters; at most {MAX_NAME} are allowed")


def usable_models(models: Sequence[ServedModel], principal: Principal) -> list[ServedModel]:
    """Return the models that a caller may use; the first is its default."""
    return [model for model in models if principal.may_use(model.name)]


def find_model(models: Sequence[ServedModel], principal: Principal, name: str, field: str) -> ServedModel:
    """Return the model of a name, or for an empty one the caller's default.

    Raises:
        ModelNotFoundError: If it is not served.
        ModelNotAllowedError: If the caller may not use it.
    """
    usable = usable_models(models, principal)
    found = next((model for model in usable if name in ("", model.name)), None)
    if found is not None:
        return found
    check_name(field, name)
    if not name or any(model.name == name for model in models):
        principal.check_model(name or models[0].name)
    names = ", ".join(model.name for model in usable)
    raise ModelNotFoundError(f"{field}: no model {name!r} is served; served are: {names or 'none for this caller'}")


def check_prompt_limits(request: segmentation_service_pb2.SegmentRequest, max_prompts: int, max_points: int) -> None:
    """Raise InvalidFieldError if a request has too many prompts or points."""
    if len(request.prompts) > max_prompts:
        raise InvalidFieldError.of("prompts", f"has {len(request.prompts)} prompts; at most {max_prompts} are allowed")
    for i, prompt in enumerate(request.prompts):
        if len(prompt.points) > max_points:
            text = f"has {len(prompt.points)} points; at most {max_points} are allowed"
            raise InvalidFieldError.of(f"prompts[{i}].points", text)


def segmentation_input(request: segmentation_service_pb2.SegmentRequest, image: bytes) -> SegmentationInput:
    """Turn a request, whose image was resolved, into the model's input.

    Raises:
        InvalidFieldError: If a field is missing, out of range, not finite or of the wrong shape.
    """
    prompts, output = request.prompts, request.output
    check_mask_encoding(output, "output.mask_encoding")
    mask_input = _mask_input(prompts)
    embedding = float_array(request.image_embedding, "image_embedding") if request.HasField("image_embedding") else None
    features = [
        float_array(tensor, f"high_resolution_features[{i}]")
        for i, tensor in enumerate(request.high_resolution_features)
    ]
    try:
        return SegmentationInput(
            image=image,
            image_embedding=embedding,
            high_resolution_features=features or None,
            mask_input=mask_input,
            points=[[[p.x, p.y] for p in prompt.points] for prompt in prompts],
            labels=[
                [label(p, f"prompts[{i}].points[{j}].label") for j, p in enumerate(prompt.points)]
                for i, prompt in enumerate(prompts)
            ],
            boxes=[_box(prompt) for prompt in prompts],
            multimask_output=output.multimask_output if output.HasField("multimask_output") else True,
            num_multimask_outputs=(
                output.num_multimask_outputs if output.HasField("num_multimask_outputs") else DEFAULT_MULTIMASK_OUTPUTS
            ),
            return_image_embedding=output.return_image_embedding,
            return_logits=output.return_logits,
        )
    except ValidationError as error:
        raise in_request_terms(InvalidFieldError.of_all(violations_of(error))) from None


def check_mask_encoding(output: types_pb2.OutputOptions, field: str) -> None:
    """Raise InvalidFieldError if the encoding is none that this version knows."""
    if output.mask_encoding not in types_pb2.MaskEncoding.values():
        raise InvalidFieldError.of(field, f"{output.mask_encoding} is unknown")


def tensor_dtype(value: types_pb2.DataType.ValueType, field: str) -> FloatType:
    """Translate the option for the element type of returned tensors; unspecified is float32.

    Raises:
        InvalidFieldError: If it is no floating-point type.
    """
    if value == types_pb2.DATA_TYPE_UNSPECIFIED:
        return "float32"
    if value not in _FLOAT_TYPES:
        raise InvalidFieldError.of(field, "must be DATA_TYPE_FLOAT32, DATA_TYPE_FLOAT16 or DATA_TYPE_BFLOAT16")
    return _FLOAT_TYPES[value]


def label(point: types_pb2.Point, field: str) -> Literal[0, 1]:
    """Return a point's label: 1 for object, 0 for background.

    Raises:
        InvalidFieldError: If it is unknown.
    """
    if point.label not in _LABELS:
        text = f"{point.label} is unknown; must be POINT_LABEL_FOREGROUND or POINT_LABEL_BACKGROUND"
        raise InvalidFieldError.of(field, text)
    return _LABELS[point.label]


def _box(prompt: types_pb2.Prompt) -> list[float] | None:
    return [getattr(prompt.box, corner) for corner in _CORNERS] if prompt.HasField("box") else None


def _mask_input(prompts: Sequence[types_pb2.Prompt]) -> NDArrayFloat | None:
    """Stack the mask inputs of all prompts into ``[num_prompts, 1, size, size]``."""
    given = [prompt.HasField("mask_input") for prompt in prompts]
    if not any(given):
        return None
    if not all(given):
        missing = given.index(False)
        raise InvalidFieldError.of(
            f"prompts[{missing}].mask_input", "is required: another prompt of the request has one"
        )
    arrays = [float_array(p.mask_input, f"prompts[{i}].mask_input") for i, p in enumerate(prompts)]
    for i, array in enumerate(arrays):
        if len(array.shape) != 3 or array.shape[0] != 1 or array.shape != arrays[0].shape:
            raise InvalidFieldError.of(
                f"prompts[{i}].mask_input", f"has shape {list(array.shape)}; it must be one candidate, [1, size, size]"
            )
    if len(arrays) == 1:
        only = arrays[0]
        return NDArrayFloat.model_construct(data=only.data, shape=(1, *only.shape), dtype=only.dtype)
    return NDArrayFloat.from_numpy(np.stack([array.to_numpy() for array in arrays]))


def float_array(tensor: types_pb2.Tensor, field: str) -> NDArrayFloat:
    """Take an array out of its message.

    Raises:
        InvalidFieldError: If it is not floating-point, not finite, or its data do not fit its shape.
    """
    if tensor.dtype not in _FLOAT_TYPES:
        name = types_pb2.DataType.Name(tensor.dtype) if tensor.dtype in types_pb2.DataType.values() else tensor.dtype
        raise InvalidFieldError.of(f"{field}.dtype", f"{name} is no floating-point type")
    try:
        return NDArrayFloat(data=tensor.data, shape=tuple(tensor.shape), dtype=_FLOAT_TYPES[tensor.dtype])
    except ValidationError as error:
        found = violations_of(error)
        raise InvalidFieldError.of_all(Violation(f"{field}.{v.field}", v.description) for v in found) from None


# Field paths

_PATHS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"points\[(\d+)\]\[(\d+)\]\[(\d)\]"), lambda m: f"prompts[{m[1]}].points[{m[2]}].{'xy'[int(m[3])]}"),
    (re.compile(r"points\[(\d+)\]\[(\d+)\]"), lambda m: f"prompts[{m[1]}].points[{m[2]}]"),
    (re.compile(r"labels\[(\d+)\]\[(\d+)\]"), lambda m: f"prompts[{m[1]}].points[{m[2]}].label"),
    (re.compile(r"boxes\[(\d+)\]\[(\d)\]"), lambda m: f"prompts[{m[1]}].box.{_CORNERS[int(m[2])]}"),
    (re.compile(r"boxes\[(\d+)\]"), lambda m: f"prompts[{m[1]}].box"),
    # A prompt's own path ends here: an empty prompt is blamed on its points by the columns.
    (re.compile(r"(?:points|labels)\[(\d+)\]"), lambda m: f"prompts[{m[1]}]"),
    (re.compile(r"points|labels|boxes"), lambda m: "prompts"),
    (re.compile(r"mask_input"), lambda m: "prompts[0].mask_input"),
    (
        re.compile(r"(?:num_multimask_outputs|multimask_output|return_image_embedding|return_logits)"),
        lambda m: f"output.{m[0]}",
    ),
)


def request_path(path: str) -> str:
    """Translate a path in a `SegmentationInput` into one in a request; other paths stay."""
    for pattern, translate in _PATHS:
        if found := pattern.match(path):
            return translate(found) + path[found.end() :]
    return path


def in_request_terms(error: SegrpcError) -> SegrpcError:
    """Translate the paths of an error that came from below; returns an error of the same class."""
    violations = [Violation(request_path(v.field), v.description) for v in error.violations]
    if isinstance(error, InvalidFieldError) and violations:
        return type(error).of_all(violations)
    error.violations = tuple(violations)
    return error


# Responses


def segment_response(
    request_id: str, model: str, digest: str, result: SegmentResult, mask_encoding: int, total: float
) -> bytes:
    """Turn an engine's result into a serialised SegmentResponse."""
    output = result.output
    response = segmentation_service_pb2.SegmentResponse(
        request_id=request_id,
        model=model,
        image=image_info(digest, result.header),
        predictions=predictions(output, mask_encoding),
        timing=timing(result.times, total),
    )
    return serialise(
        response,
        {
            "mask_logits": [output.mask_logits],
            "image_embedding": [output.image_embedding],
            "high_resolution_features": output.high_resolution_features or (),
        },
    )


def copied_bytes(output: SegmentationOutput, mask_encoding: int) -> int | None:
    """Tell how many bytes are copied to make a response; None if masks have to be made anew for it."""
    if mask_encoding in (types_pb2.MASK_ENCODING_RUN_LENGTHS, types_pb2.MASK_ENCODING_PNG):
        return None
    tensors = (output.mask_logits, output.image_embedding, *(output.high_resolution_features or ()))
    counts = sum(len(mask.counts) for row in output.masks for mask in row)
    return counts + sum(len(tensor.data) for tensor in tensors if tensor is not None)


def encode_image_response(request_id: str, model: str, digest: str, result: EncodeResult, total: float) -> bytes:
    """Turn an engine's result into a serialised EncodeImageResponse."""
    response = segmentation_service_pb2.EncodeImageResponse(
        request_id=request_id,
        model=model,
        image=image_info(digest, result.header),
        timing=timing(result.times, total),
    )
    return serialise(
        response,
        {
            "image_embedding": [result.image_embedding],
            "high_resolution_features": result.high_resolution_features,
        },
    )


def predictions(output: SegmentationOutput, mask_encoding: int) -> Iterable[types_pb2.Prediction]:
    """Put the masks of each prompt into a message."""
    if output.scores is None:
        return
    scores = output.scores.to_numpy()
    objects = output.object_scores.to_numpy() if output.object_scores is not None else np.zeros(len(scores), np.float32)
    for masks, row, object_score in zip(output.masks, scores, objects, strict=True):
        messages = [mask_message(mask, float(score), mask_encoding) for mask, score in zip(masks, row, strict=True)]
        yield types_pb2.Prediction(masks=messages, object_score=float(object_score))


def mask_message(mask: CompressedRLE, score: float, mask_encoding: int) -> types_pb2.Mask:
    """Put a mask into a message, encoded as asked."""
    height, width = mask.size
    message = types_pb2.Mask(height=height, width=width, score=score, area=mask.area)
    if mask_encoding == types_pb2.MASK_ENCODING_RUN_LENGTHS:
        message.run_lengths.lengths.extend(rle.run_lengths(mask.counts).tolist())
    elif mask_encoding == types_pb2.MASK_ENCODING_PNG:
        message.png = rle.to_png(mask.counts, height, width)
    else:
        message.coco_rle = mask.counts
    if mask.bounding_box is not None:
        message.bounding_box.CopyFrom(types_pb2.Box(**dict(zip(_CORNERS, mask.bounding_box, strict=True))))
    return message


def tensor(array: NDArrayFloat) -> types_pb2.Tensor:
    """Put an array into a message."""
    return types_pb2.Tensor(dtype=DATA_TYPES[array.dtype], shape=array.shape, data=array.data)


def image_info(digest: str, header: ImageHeader) -> types_pb2.ImageInfo:
    """Put what is known of an image into a message."""
    return types_pb2.ImageInfo(
        digest=digest, width=header.width, height=header.height, exif_orientation=header.exif_orientation
    )


def timing(times: StageTimes, total: float) -> types_pb2.Timing:
    """Put stage times, in seconds, into a message."""
    return types_pb2.Timing(
        queue=_duration(times.queue),
        decode_image=_duration(times.decode_image),
        encode_image=_duration(times.encode_image),
        decode_mask=_duration(times.decode_mask),
        postprocess=_duration(times.postprocess),
        total=_duration(total),
        embedding_cached=times.embedding_cached,
    )


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def model_message(model: ServedModel, is_default: bool, limits: model_service_pb2.Limits) -> model_service_pb2.Model:
    """Put the description of a model into a message."""
    about = model.metadata
    return model_service_pb2.Model(
        name=model.name,
        family=about.family,
        is_default=is_default,
        input_size=about.input_size,
        mask_size=about.mask_size,
        mask_counts=about.mask_counts,
        points=about.points,
        boxes=about.boxes,
        mask_input=about.mask_input,
        embeddings=about.embeddings,
        device=about.device,
        compute_dtype=DATA_TYPES[about.compute_dtype],
        limits=limits,
    )
