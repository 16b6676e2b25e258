"""What was computed in a session, for export: enough to compute it again with `Segment`."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from segrpc.client.sessions.types import RefineOptions, RefineResult, Round
from segrpc.client.types import Float32Array, ImageInfo, Mask, Prediction

FORMAT = "segrpc-session"
VERSION = 1
_REPRODUCED = ("multimask_output", "num_multimask_outputs", "edit_policy", "mask_feedback")


class History:
    """The rounds of a session, with the masks of those whose results arrived."""

    def __init__(self) -> None:
        self.rounds: dict[int, Round] = {}
        self._objects: dict[int, str] = {}
        self._masks: dict[int, Prediction] = {}
        self._logits: dict[int, Float32Array] = {}

    def add(self, result: RefineResult) -> None:
        """Remember what a result tells; one that arrives again changes nothing."""
        for one in result.rounds:
            self.rounds[one.revision] = one
            self._objects[one.revision] = result.object_id
        if result.prediction.masks:
            self._masks[result.shown_revision] = result.prediction

    def add_logits(self, seq: int, logits: Float32Array) -> None:
        """Remember the logits that the `SetMask` edit ``seq`` sent, ``[1, 256, 256]``."""
        self._logits[seq] = logits

    def forget_logits(self, seq: int) -> None:
        """Forget what `add_logits` remembered: the edit was rejected."""
        self._logits.pop(seq, None)

    def export(
        self, image: ImageInfo, model: str, options: RefineOptions, latest: Mapping[str, RefineResult]
    ) -> dict[str, Any]:
        """Return everything as values of JSON; as `BaseSession.export` describes them."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "image": {"digest": image.digest, "width": image.width, "height": image.height},
            "model": model,
            "options": {name: value for name, value in options.items() if name in _REPRODUCED},
            "rounds": [self._round(self.rounds[revision]) for revision in sorted(self.rounds)],
            "objects": {
                object_id: {"shown_revision": result.shown_revision, "selected": result.selected}
                for object_id, result in latest.items()
            },
        }

    def _round(self, one: Round) -> dict[str, Any]:
        exported: dict[str, Any] = {
            "revision": one.revision,
            "object_id": self._objects[one.revision],
            "points": [list(point) for point in one.points],
            "labels": list(one.labels),
            "box": None if one.box is None else list(one.box),
            "mask": self._mask_input(one),
            "multimask_output": one.multimask_output,
        }
        if one.point_ids:
            exported["point_ids"] = list(one.point_ids)
        if one.revision in self._masks:
            exported["masks"] = [mask_as_json(mask) for mask in self._masks[one.revision].masks]
        return exported

    def _mask_input(self, one: Round) -> dict[str, Any] | None:
        if one.mask_revision:
            return {"revision": one.mask_revision, "index": one.mask_index}
        if not one.mask_seq:
            return None
        if one.mask_seq not in self._logits:  # another process sent them
            return {"seq": one.mask_seq}
        logits = np.ascontiguousarray(self._logits[one.mask_seq], "<f4")
        return {"logits": base64.b64encode(logits.tobytes()).decode("ascii"), "shape": list(logits.shape)}


def mask_as_json(mask: Mask) -> dict[str, Any]:
    """Return a mask as an export has it: ``{"counts": str, "size": [height, width], "score": float}``."""
    return {"counts": mask.rle["counts"].decode("ascii"), "size": [mask.height, mask.width], "score": mask.score}
