"""Computing an exported session again, and comparing."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from segrpc.client import codec
from segrpc.client.codec import ImageLike
from segrpc.client.flow import Flow, SegmentOptions, SentImages, segment_file
from segrpc.client.sessions.history import FORMAT, VERSION, mask_as_json
from segrpc.client.types import Float32Array, ImageInfo, Prediction


@dataclass(frozen=True, slots=True)
class ReplayedRound:
    """A round that was computed again.

    Attributes:
        revision: Its revision in the session.
        object_id: Its object.
        points: ``x, y`` in pixels.
        labels: 1 (on the object) or 0 (off it) for each point.
        box: ``(x_min, y_min, x_max, y_max)`` in pixels, or None.
        prediction: The masks.
        identical: Whether they are those of the session, byte for byte; None if the session has none to compare with.
    """

    revision: int
    object_id: str
    points: tuple[tuple[float, float], ...]
    labels: tuple[int, ...]
    box: tuple[float, float, float, float] | None
    prediction: Prediction
    identical: bool | None


@dataclass(frozen=True, slots=True)
class Replay:
    """A session that was computed again.

    Attributes:
        image: The image, as the server saw it; None if there are no rounds.
        same_image: Whether it is the very file of the session; None if there are no rounds, and the image is a URI, so
            that nobody looked.
        rounds: All rounds, in order.
    """

    image: ImageInfo | None
    same_image: bool | None
    rounds: tuple[ReplayedRound, ...]

    @property
    def different(self) -> tuple[ReplayedRound, ...]:
        """The rounds whose masks are not those of the session."""
        return tuple(one for one in self.rounds if one.identical is False)

    @property
    def identical(self) -> bool:
        """Whether all masks that can be compared are those of the session."""
        return not self.different


def replay(export: Mapping[str, Any], image: ImageLike, sent: SentImages) -> Flow[Replay]:
    """Compute the rounds of an exported session again.

    Each round is a `Segment` call with the points, the box and, as mask input, the logits of the earlier round as they
    came out this time.

    Raises:
        ValueError: If it is no export, or the image is of another size.
    """
    about, recorded = _parts(export)
    file = codec.load_image(image)
    wanted = {one["mask"]["revision"] for one in recorded if one["mask"] and "revision" in one["mask"]}
    logits: dict[int, Float32Array] = {}
    found: ImageInfo | None = None
    rounds = []
    for one in recorded:
        options = _options(export, one, _mask_input(one, logits))
        options["return_logits"] = one["revision"] in wanted
        result = yield from segment_file(file, sent, options)
        found = result.image
        if (found.width, found.height) != (about["width"], about["height"]):
            raise ValueError(
                f"the image has {found.width} x {found.height} pixels, that of the session "
                f"{about['width']} x {about['height']}"
            )
        if result.logits is not None:
            logits[one["revision"]] = result.logits[0]
        rounds.append(_compared(one, result.predictions[0]))
    digest = file.digest if found is None else found.digest
    return Replay(found, digest == about["digest"] if digest else None, tuple(rounds))


def _parts(export: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the image's description and the rounds in order, after looking whether everything needed is there."""
    if export.get("format") != FORMAT or export.get("version") != VERSION:
        raise ValueError(f"not an exported session: format must be {FORMAT!r} and version {VERSION}")
    try:
        about = {name: export["image"][name] for name in ("digest", "width", "height")}
        needed = ("revision", "object_id", "points", "labels", "box", "mask", "multimask_output")
        rounds = [{**{name: one[name] for name in needed}, "masks": one.get("masks")} for one in export["rounds"]]
        return about, sorted(rounds, key=lambda one: int(one["revision"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"not an exported session: {error} is missing or of another type") from error


def _mask_input(one: dict[str, Any], logits: Mapping[int, Float32Array]) -> npt.NDArray[Any] | None:
    mask = one["mask"]
    try:
        if mask is None:
            return None
        if "logits" in mask:
            return np.frombuffer(base64.b64decode(mask["logits"]), "<f4").reshape(mask["shape"])
        chosen: Float32Array = logits[mask["revision"]][mask["index"]]
        return chosen
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"the mask input of revision {one['revision']} is not in the export") from error


def _options(export: Mapping[str, Any], one: dict[str, Any], mask_input: npt.NDArray[Any] | None) -> SegmentOptions:
    options: SegmentOptions = {"model": export.get("model", ""), "multimask_output": bool(one["multimask_output"])}
    if one["points"]:
        options["points"], options["labels"] = [one["points"]], [one["labels"]]
    if one["box"] is not None:
        options["boxes"] = [one["box"]]
    if mask_input is not None:
        options["mask_input"] = mask_input
    if one["multimask_output"]:
        count = len(one["masks"]) if one["masks"] else export.get("options", {}).get("num_multimask_outputs")
        if count is not None:
            options["num_multimask_outputs"] = count
    return options


def _compared(one: dict[str, Any], prediction: Prediction) -> ReplayedRound:
    identical = None
    if one["masks"] is not None:
        identical = [mask_as_json(mask) for mask in prediction.masks] == one["masks"]
    return ReplayedRound(
        revision=one["revision"],
        object_id=one["object_id"],
        points=tuple((x, y) for x, y in one["points"]),
        labels=tuple(one["labels"]),
        box=None if one["box"] is None else tuple(one["box"]),
        prediction=prediction,
        identical=identical,
    )
