"""Between the messages of Refine and the values of sessions: pure functions."""

from collections.abc import Sequence

from google.protobuf import timestamp_pb2

from segrpc.service.errors import CapabilityMissingError, InvalidFieldError, SegrpcError, Violation
from segrpc.service.rpc import convert
from segrpc.service.schemas import FloatType, ModelMetadata, NDArrayFloat
from segrpc.service.sessions.edits import (
    CORNERS,
    AddPoints,
    ClearBox,
    Click,
    Edit,
    HistoryAction,
    Malformed,
    MovePoint,
    PromptAction,
    Redo,
    RemovePoint,
    Reset,
    SelectMask,
    SetBox,
    SetMask,
    Undo,
)
from segrpc.service.sessions.history import Round
from segrpc.service.sessions.session import ObjectResult, RefineOptions, Rejection
from segrpc.service.sessions.store import Attachment
from segrpc.v1 import refine_pb2, types_pb2

# Configuration


def refine_options(config: refine_pb2.RefineConfig, model: str, metadata: ModelMetadata) -> RefineOptions:
    """Read the options of a session.

    Raises:
        InvalidFieldError: If one is unknown, or has no meaning here.
        CapabilityMissingError: If the model cannot do it.
    """
    output = config.output
    convert.check_mask_encoding(output, "config.output.mask_encoding")
    if output.return_image_embedding:
        text = "a session returns no embeddings; use EncodeImage"
        raise InvalidFieldError.of("config.output.return_image_embedding", text)
    if config.edit_policy not in refine_pb2.EditPolicy.values():
        raise InvalidFieldError.of("config.edit_policy", f"{config.edit_policy} is unknown")
    if config.mask_feedback not in refine_pb2.MaskFeedback.values():
        raise InvalidFieldError.of("config.mask_feedback", f"{config.mask_feedback} is unknown")
    if output.return_logits and not metadata.mask_size:
        raise CapabilityMissingError(f"model {model!r} does not support logits")
    multimask = output.multimask_output if output.HasField("multimask_output") else True
    count = convert.DEFAULT_MULTIMASK_OUTPUTS
    if output.HasField("num_multimask_outputs"):
        count = output.num_multimask_outputs
    if count < 1:
        raise InvalidFieldError.of("config.output.num_multimask_outputs", f"is {count}; must be at least 1")
    if multimask and metadata.mask_counts and count not in metadata.mask_counts:
        counts = " or ".join(map(str, metadata.mask_counts))
        raise CapabilityMissingError(f"model {model!r} gives {counts} masks for a prompt, not {count}")
    return RefineOptions(
        multimask_output=multimask,
        num_multimask_outputs=count,
        feed_back=config.mask_feedback != refine_pb2.MASK_FEEDBACK_NONE,
        every_edit=config.edit_policy == refine_pb2.EDIT_POLICY_EVERY_EDIT,
    )


def upload_terms(error: SegrpcError) -> SegrpcError:
    """Translate the paths of an error about an upload: the header is in the config, the chunk is an own message."""
    names = {"header.size": "config.upload.size", "header.digest": "config.upload.digest", "chunk.data": "image.data"}
    if isinstance(error, InvalidFieldError):
        return InvalidFieldError.of_all(Violation(names.get(v.field, v.field), v.description) for v in error.violations)
    return error


# Edits


def edit(request: refine_pb2.RefineRequest) -> Edit:
    """Read an edit. What is wrong with it is told when its turn comes; see `Malformed`."""
    message = request.edit
    try:
        if not message.object_id:
            raise InvalidFieldError.of("edit.object_id", "is required")
        convert.check_name("edit.object_id", message.object_id)
        return Edit(request.seq, message.object_id, _action(message))
    except InvalidFieldError as error:
        return Edit(request.seq, message.object_id, Malformed(error))


def _action(message: refine_pb2.Edit) -> PromptAction | HistoryAction:
    match message.WhichOneof("action"):
        case "add_points":
            return AddPoints(_clicks(message.add_points))
        case "move_point":
            move = message.move_point
            return MovePoint(move.point_id, move.x, move.y)
        case "remove_point":
            return RemovePoint(message.remove_point.point_id)
        case "set_box":
            box = message.set_box
            return SetBox((box.x_min, box.y_min, box.x_max, box.y_max))
        case "clear_box":
            return ClearBox()
        case "set_mask":
            return SetMask(convert.float_array(message.set_mask, "edit.set_mask"))
        case "select_mask":
            return SelectMask(message.select_mask.index)
        case "undo":
            return Undo(message.undo.steps or 1)
        case "redo":
            return Redo(message.redo.steps or 1)
        case "reset":
            return Reset()
        case _:
            raise InvalidFieldError.of("edit", "no action is set that this version knows")


def _clicks(message: refine_pb2.AddPoints) -> tuple[Click, ...]:
    ids: Sequence[str] = message.point_ids
    if ids and len(ids) != len(message.points):
        text = f"has {len(ids)} names for {len(message.points)} points; give none, or one for each"
        raise InvalidFieldError.of("edit.add_points.point_ids", text)
    clicks = []
    for i, point in enumerate(message.points):
        label = convert.label(point, f"edit.add_points.points[{i}].label")
        name = ids[i] if ids else ""
        convert.check_name(f"edit.add_points.point_ids[{i}]", name)
        clicks.append(Click(point.x, point.y, label, name))
    return tuple(clicks)


# Responses


def opened(attachment: Attachment, expires: float) -> refine_pb2.RefineResponse:
    """Tell that a session is open; ``expires`` is in seconds since the epoch."""
    session = attachment.session
    return refine_pb2.RefineResponse(
        revision=session.revision,
        applied_seq=session.applied_seq,
        opened=refine_pb2.SessionOpened(
            session_id=session.id,
            resume_token=attachment.token,
            image=convert.image_info(session.image.digest, session.image.header),
            expire_time=_timestamp(expires),
            resumed=attachment.resumed,
            last_seq=session.last_seq,
            model=session.scene.model,
        ),
    )


def upload_progress(received: int) -> refine_pb2.RefineResponse:
    """Tell how many bytes of an upload have arrived."""
    return refine_pb2.RefineResponse(upload=refine_pb2.UploadProgress(received_size=received))


def draining(revision: int, applied_seq: int, close: float) -> refine_pb2.RefineResponse:
    """Tell when the stream will be closed, in seconds since the epoch."""
    message = refine_pb2.Draining(close_time=_timestamp(close))
    return refine_pb2.RefineResponse(revision=revision, applied_seq=applied_seq, draining=message)


def rejected(event: Rejection) -> refine_pb2.RefineResponse:
    """Tell that an edit was not applied."""
    return refine_pb2.RefineResponse(
        revision=event.revision,
        applied_seq=event.applied_seq,
        rejected=refine_pb2.EditRejected(
            seq=event.seq,
            reason=event.reason,
            message=event.message,
            violations=[refine_pb2.FieldViolation(field=v.field, description=v.description) for v in event.violations],
        ),
    )


def result(event: ObjectResult, mask_encoding: int, logits_dtype: FloatType | None) -> refine_pb2.RefineResponse:
    """Tell what an object looks like.

    Args:
        event: The object's result.
        mask_encoding: How masks travel, a ``MaskEncoding``.
        logits_dtype: The element type of returned logits; None returns none.
    """
    step = event.step
    message = refine_pb2.MaskResult(
        object_id=event.object_id,
        selected_mask=step.selected,
        rounds=[_round(one) for one in event.rounds],
        shown_revision=step.round.revision if step.round else 0,
    )
    if step.output is not None:
        (prediction,) = convert.predictions(step.output, mask_encoding)
        message.prediction.CopyFrom(prediction)
        if logits_dtype is not None and step.output.mask_logits is not None:
            message.mask_logits.CopyFrom(_logits(step.output.mask_logits, logits_dtype))
    if event.times is not None:
        message.timing.CopyFrom(convert.timing(event.times, event.seconds))
    return refine_pb2.RefineResponse(revision=event.revision, applied_seq=event.applied_seq, result=message)


def _logits(logits: NDArrayFloat, dtype: FloatType) -> types_pb2.Tensor:
    if dtype == logits.dtype:
        return types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_FLOAT32, shape=logits.shape[1:], data=logits.data)
    return convert.tensor(NDArrayFloat.from_numpy(logits.to_numpy()[0], dtype))


def _round(one: Round) -> refine_pb2.Round:
    prompt = types_pb2.Prompt(
        points=[
            types_pb2.Point(
                x=click.x,
                y=click.y,
                label=types_pb2.POINT_LABEL_FOREGROUND if click.label else types_pb2.POINT_LABEL_BACKGROUND,
            )
            for click in one.prompts.points
        ]
    )
    if one.prompts.box is not None:
        prompt.box.CopyFrom(types_pb2.Box(**dict(zip(CORNERS, one.prompts.box, strict=True))))
    ids = [click.id for click in one.prompts.points]
    return refine_pb2.Round(
        revision=one.revision,
        prompt=prompt,
        point_ids=ids if any(ids) else [],
        mask_revision=one.mask.revision,
        mask_index=one.mask.index,
        mask_seq=one.mask.seq,
        multimask_output=one.multimask_output,
    )


def _timestamp(seconds: float) -> timestamp_pb2.Timestamp:
    stamp = timestamp_pb2.Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp
