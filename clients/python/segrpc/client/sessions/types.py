"""What sessions are told and what they return: plain values."""

from dataclasses import dataclass
from typing import Literal, TypedDict

from segrpc.client.codec import MaskEncoding, TensorType
from segrpc.client.types import Float32Array, Mask, Prediction, Timing

EditPolicy = Literal["latest_wins", "every_edit"]
MaskFeedback = Literal["logits", "none"]


class RefineOptions(TypedDict, total=False):
    """The options of `refine`, besides the image.

    Attributes:
        model: The name of the model. Default: the server's default.
        multimask_output: Whether the first round of an object gives several candidates (the default) or one.
        num_multimask_outputs: How many candidates. Default: 3.
        return_logits: Whether results have logits.
        tensor_dtype: The type in which logits travel: ``float32`` (the default), ``float16`` or ``bfloat16``.
        mask_encoding: How masks travel: ``coco_rle`` (the default), ``run_lengths`` or ``png``.
        edit_policy: ``latest_wins`` (the default): edits that arrive during a computation are folded into the next one,
            and stale masks are not sent. ``every_edit``: each is computed and answered, in order.
        mask_feedback: ``logits`` (the default): later rounds see the logits of the selected candidate. ``none``: each
            round sees only points and box.
        request_id: A name for the server's log. Default: a random one.
    """

    model: str
    multimask_output: bool
    num_multimask_outputs: int
    return_logits: bool
    tensor_dtype: TensorType
    mask_encoding: MaskEncoding
    edit_policy: EditPolicy
    mask_feedback: MaskFeedback
    request_id: str


@dataclass(frozen=True, slots=True)
class Round:
    """One computation of masks, as the server understood it.

    Attributes:
        revision: The revision that it became.
        points: ``x, y`` in pixels.
        labels: 1 (on the object) or 0 (off it) for each point.
        point_ids: The points' names, empty for a point without one; empty when none has one.
        box: ``(x_min, y_min, x_max, y_max)`` in pixels, or None.
        mask_revision: The revision whose logits were the mask input; 0 if there were none or `mask_seq` tells.
        mask_index: Which of its candidates.
        mask_seq: The number of the `SetMask` edit whose logits were the mask input; 0 otherwise.
        multimask_output: Whether it gave several candidates.
    """

    revision: int
    points: tuple[tuple[float, float], ...]
    labels: tuple[int, ...]
    point_ids: tuple[str, ...]
    box: tuple[float, float, float, float] | None
    mask_revision: int
    mask_index: int
    mask_seq: int
    multimask_output: bool


@dataclass(frozen=True, slots=True)
class RefineResult:
    """The masks of one object.

    Attributes:
        object_id: The object.
        revision: The number of the session's change that this is; rises with each result.
        applied_seq: The last edit that it takes into account.
        shown_revision: The revision of the round whose masks these are; an earlier one after undo, 0 without masks.
        prediction: The candidates; none when the object has no prompts.
        selected: The position of the candidate that the next round starts from.
        logits: ``[num_masks, 256, 256]`` of float32, if they were asked for.
        timing: Where the time went; None when nothing was computed.
        rounds: What was computed for this object since its last result.
    """

    object_id: str
    revision: int
    applied_seq: int
    shown_revision: int
    prediction: Prediction
    selected: int
    logits: Float32Array | None
    timing: Timing | None
    rounds: tuple[Round, ...]

    @property
    def mask(self) -> Mask | None:
        """The selected candidate; None when the object has no prompts."""
        return self.prediction.masks[self.selected] if self.prediction.masks else None
