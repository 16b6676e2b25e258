"""Between the values of sessions and messages: pure functions."""

import uuid
from typing import Any

import numpy as np

from segrpc.client.codec import (
    label_column,
    output_options,
    point_column,
    prediction,
    tensor_array,
    tensor_message,
    timing,
)
from segrpc.client.errors import EditRejectedError, FieldViolation
from segrpc.client.flow import refuse_unknown
from segrpc.client.sessions import edits
from segrpc.client.sessions.types import EditPolicy, MaskFeedback, RefineOptions, RefineResult, Round
from segrpc.v1 import refine_pb2, types_pb2

_POLICIES: dict[EditPolicy, refine_pb2.EditPolicy.ValueType] = {
    "latest_wins": refine_pb2.EDIT_POLICY_LATEST_WINS,
    "every_edit": refine_pb2.EDIT_POLICY_EVERY_EDIT,
}
_FEEDBACKS: dict[MaskFeedback, refine_pb2.MaskFeedback.ValueType] = {
    "logits": refine_pb2.MASK_FEEDBACK_LOGITS,
    "none": refine_pb2.MASK_FEEDBACK_NONE,
}


def config_message(options: RefineOptions) -> refine_pb2.RefineConfig:
    """Put the options of a session into the message that opens it; the source is left to the caller.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If an option's value is unknown.
    """
    refuse_unknown(options, RefineOptions)
    policy, feedback = options.get("edit_policy", "latest_wins"), options.get("mask_feedback", "logits")
    if policy not in _POLICIES:
        raise ValueError(f"edit_policy {policy!r} is unknown; give {', '.join(_POLICIES)}")
    if feedback not in _FEEDBACKS:
        raise ValueError(f"mask_feedback {feedback!r} is unknown; give {', '.join(_FEEDBACKS)}")
    return refine_pb2.RefineConfig(
        request_id=options.get("request_id") or uuid.uuid4().hex,
        model=options.get("model", ""),
        output=output_options(options),
        edit_policy=_POLICIES[policy],
        mask_feedback=_FEEDBACKS[feedback],
    )


def edit_message(edit: edits.Edit) -> refine_pb2.Edit:
    """Put an edit into a message.

    Raises:
        TypeError: If it is no edit.
        ValueError: If shapes or lengths do not fit.
    """
    action = _action(edit)
    return refine_pb2.Edit(object_id=edit.object_id, **action)


def _action(edit: edits.Edit) -> dict[str, Any]:
    match edit:
        case edits.AddPoints():
            return {"add_points": _add_points(edit)}
        case edits.MovePoint(point_id=point_id, x=x, y=y):
            return {"move_point": refine_pb2.MovePoint(point_id=point_id, x=x, y=y)}
        case edits.RemovePoint(point_id=point_id):
            return {"remove_point": refine_pb2.RemovePoint(point_id=point_id)}
        case edits.SetBox():
            box = types_pb2.Box(x_min=edit.x_min, y_min=edit.y_min, x_max=edit.x_max, y_max=edit.y_max)
            return {"set_box": box}
        case edits.ClearBox():
            return {"clear_box": refine_pb2.ClearBox()}
        case edits.SetMask(logits=logits):
            return {"set_mask": _mask_logits(logits)}
        case edits.SelectMask(index=index):
            return {"select_mask": refine_pb2.SelectMask(index=index)}
        case edits.Undo(steps=steps):
            return {"undo": refine_pb2.Undo(steps=_steps(steps))}
        case edits.Redo(steps=steps):
            return {"redo": refine_pb2.Redo(steps=_steps(steps))}
        case edits.Reset():
            return {"reset": refine_pb2.Reset()}
    raise TypeError(f"{type(edit).__name__} is no edit")


def _add_points(edit: edits.AddPoints) -> refine_pb2.AddPoints:
    column = point_column(edit.points)
    labels = label_column(edit.labels, column)
    if column is None or labels is None or len(column) != 1:
        raise ValueError("points must be those of one object, [num_points, 2]")
    points = [types_pb2.Point(x=x, y=y, label=label) for (x, y), label in zip(column[0], labels[0], strict=True)]
    return refine_pb2.AddPoints(points=points, point_ids=edit.point_ids)


def _mask_logits(logits: Any) -> types_pb2.Tensor:
    array = np.asarray(logits)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.shape[0] != 1:
        raise ValueError(f"logits has shape {np.shape(logits)}; give one candidate, [256, 256] or [1, 256, 256]")
    return tensor_message(array)


def _steps(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"steps is {steps}; give 1 or more")  # 0 would mean 1 on the wire
    return steps


def refine_result(response: refine_pb2.RefineResponse) -> RefineResult:
    """Take the masks of an object out of their message."""
    message = response.result
    logits = tensor_array(message.mask_logits) if message.HasField("mask_logits") else None
    return RefineResult(
        object_id=message.object_id,
        revision=response.revision,
        applied_seq=response.applied_seq,
        shown_revision=message.shown_revision,
        prediction=prediction(message.prediction),
        selected=message.selected_mask,
        logits=None if logits is None else logits.astype(np.float32, copy=False),
        timing=timing(message.timing) if message.HasField("timing") else None,
        rounds=tuple(map(_round, message.rounds)),
    )


def _round(message: refine_pb2.Round) -> Round:
    prompt = message.prompt
    box = prompt.box if prompt.HasField("box") else None
    return Round(
        revision=message.revision,
        points=tuple((point.x, point.y) for point in prompt.points),
        labels=tuple(0 if point.label == types_pb2.POINT_LABEL_BACKGROUND else 1 for point in prompt.points),
        point_ids=tuple(message.point_ids),
        box=None if box is None else (box.x_min, box.y_min, box.x_max, box.y_max),
        mask_revision=message.mask_revision,
        mask_index=message.mask_index,
        mask_seq=message.mask_seq,
        multimask_output=message.multimask_output,
    )


def rejection(message: refine_pb2.EditRejected) -> EditRejectedError:
    """Take what was wrong with an edit out of its message."""
    violations = [FieldViolation(violation.field, violation.description) for violation in message.violations]
    return EditRejectedError(message.seq, message.reason, message.message, violations)
