"""Pictures for people: masks, points and boxes drawn over an image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError

from segrpc.client.codec import box_column, label_column, point_column
from segrpc.client.types import Mask

# Colours that stay apart from each other and from most photos.
_COLOURS = ((30, 144, 255), (255, 140, 0), (50, 205, 50), (220, 20, 160), (255, 215, 0), (0, 206, 209))
_ON_OBJECT = (40, 200, 80)
_OFF_OBJECT = (230, 50, 50)
_OPACITY = 0.45


def open_photo(image: str) -> Image.Image:
    """Read the image to draw on.

    Raises:
        ValueError: If it is no file here, or no image.
    """
    if not Path(image).is_file():
        raise ValueError(f"{image}: only over an image that is a file here can masks be drawn")
    try:
        with Image.open(image) as photo:
            photo.load()
            return photo
    except UnidentifiedImageError as error:
        raise ValueError(str(error)) from error


def overlay(
    image: Image.Image | npt.NDArray[np.uint8],
    masks: Sequence[Mask],
    *,
    points: Any = None,
    labels: Any = None,
    boxes: Any = None,
) -> Image.Image:
    """Draw masks, each in a colour of its own with an outline, and the prompts that led to them.

    Args:
        image: The image; the EXIF orientation of a PIL image is applied.
        masks: Masks as large as the image as displayed.
        points: As in `SegmentOptions`: green on the object, red off it.
        labels: As in `SegmentOptions`.
        boxes: As in `SegmentOptions`.

    Returns:
        A new image, RGB.

    Raises:
        ValueError: If a mask is not of the image's size.
    """
    upright = Image.fromarray(image) if isinstance(image, np.ndarray) else ImageOps.exif_transpose(image)
    canvas = upright.convert("RGB")
    line = max(1, round(min(canvas.size) / 200))
    for i, mask in enumerate(masks):
        if (mask.width, mask.height) != canvas.size:
            size = f"{canvas.width} x {canvas.height}"
            raise ValueError(f"masks[{i}] is of {mask.width} x {mask.height} pixels, the image of {size}")
        canvas = _with_mask(canvas, mask, _COLOURS[i % len(_COLOURS)], line)
    draw = ImageDraw.Draw(canvas)
    for box in box_column(boxes) or ():
        if box is not None:
            draw.rectangle(box, outline=(0, 0, 0), width=3 * line)
            draw.rectangle(_shrunk(box, line), outline=(255, 255, 255), width=line)
    given_points = point_column(points)
    given_labels = label_column(labels, given_points)
    for prompt, prompt_labels in zip(given_points or (), given_labels or (), strict=True):
        for (x, y), label in zip(prompt, prompt_labels, strict=True):
            _draw_point(draw, x, y, _ON_OBJECT if label == 1 else _OFF_OBJECT, 3 * line)
    return canvas


def _with_mask(canvas: Image.Image, mask: Mask, colour: tuple[int, int, int], line: int) -> Image.Image:
    inside = Image.fromarray(np.where(mask.array, np.uint8(255), np.uint8(0)))
    grown = inside.filter(ImageFilter.MaxFilter(2 * line + 1))
    outline = Image.fromarray(np.asarray(grown) - np.asarray(inside))
    tint = Image.new("RGB", canvas.size, colour)
    tinted = Image.composite(Image.blend(canvas, tint, _OPACITY), canvas, inside)
    return Image.composite(tint, tinted, outline)


def _draw_point(draw: ImageDraw.ImageDraw, x: float, y: float, colour: tuple[int, int, int], radius: float) -> None:
    for size, fill in ((radius * 1.5, (0, 0, 0)), (radius * 1.3, (255, 255, 255)), (radius, colour)):
        draw.ellipse((x - size, y - size, x + size, y + size), fill=fill)


def _shrunk(box: tuple[float, float, float, float], by: int) -> tuple[float, float, float, float]:
    """Return the middle of a line that is three times as thick, for boxes that are large enough."""
    x_min, y_min, x_max, y_max = box
    if x_max - x_min <= 2 * by or y_max - y_min <= 2 * by:
        return box
    return (x_min + by, y_min + by, x_max - by, y_max - by)
