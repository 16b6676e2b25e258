"""The demo photos, their hand-drawn masks and the prompts that a person would give."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

BoolMask = npt.NDArray[np.bool_]

_DATA = Path(__file__).parent / "data"

NAMES = tuple(sorted(file.stem for file in (_DATA / "masks").glob("*.json")))


@dataclass(frozen=True)
class Prompts:
    """What a person would click and draw to get the object.

    Attributes:
        points: Clicks as ``x, y`` in pixels.
        labels: For each click 1 (object) or 0 (background).
        box: ``x_min, y_min, x_max, y_max`` in pixels, or None.
    """

    points: tuple[tuple[float, float], ...]
    labels: tuple[int, ...]
    box: tuple[float, float, float, float] | None

    def points_only(self) -> "Prompts":
        """Leave out the box."""
        return replace(self, box=None)

    def box_only(self) -> "Prompts":
        """Leave out the points."""
        return replace(self, points=(), labels=())

    def and_point(self, x: float, y: float, label: int) -> "Prompts":
        """Add a click."""
        return replace(self, points=(*self.points, (x, y)), labels=(*self.labels, label))

    def arguments(self) -> dict[str, Any]:
        """Return it as the arguments of `segrpc.client.SegmentationClient.segment` for a single prompt."""
        arguments: dict[str, Any] = {}
        if self.points:
            arguments |= {"points": list(self.points), "labels": list(self.labels)}
        if self.box:
            arguments |= {"boxes": [self.box]}
        return arguments


def photo_path(name: str) -> Path:
    """Return the path of a photo."""
    return _DATA / "photos" / f"{name}.jpg"


def photo_bytes(name: str) -> bytes:
    """Return the encoded file of a photo."""
    return photo_path(name).read_bytes()


def load_image(name: str) -> Image.Image:
    """Decode a photo as RGB."""
    with Image.open(photo_path(name)) as image:
        return image.convert("RGB")


def load_array(name: str) -> npt.NDArray[np.uint8]:
    """Decode a photo as ``[height, width, 3]`` of uint8."""
    return np.array(load_image(name))


def object_of(name: str) -> str:
    """Say in words what the mask and the prompts of a photo mean."""
    return str(_drawing(name)["object"])


def drawn_mask(name: str) -> BoolMask:
    """Rasterise the hand-drawn mask, ``[height, width]``."""
    drawing = _drawing(name)
    mask = Image.new("1", load_image(name).size)
    canvas = ImageDraw.Draw(mask)
    for key, value in (("polygons", 1), ("holes", 0)):
        for polygon in drawing[key]:
            canvas.polygon([(x, y) for x, y in polygon], fill=value)
    return np.array(mask)


def prompts_of(name: str) -> Prompts:
    """Return all prompts of a photo."""
    prompts = _drawing(name)["prompts"]
    foreground, background = (_points(prompts[key]) for key in ("foreground", "background"))
    x_min, y_min, x_max, y_max = prompts["box"]
    labels = (1,) * len(foreground) + (0,) * len(background)
    return Prompts(foreground + background, labels, (x_min, y_min, x_max, y_max))


def iou(one: BoolMask, other: BoolMask) -> float:
    """Compute intersection over union; 1 if both masks are empty."""
    union = int((one | other).sum())
    return float((one & other).sum() / union) if union else 1.0


def _points(pairs: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    return tuple((x, y) for x, y in pairs)


def _drawing(name: str) -> dict[str, Any]:
    drawing: dict[str, Any] = json.loads((_DATA / "masks" / f"{name}.json").read_text())
    return drawing
