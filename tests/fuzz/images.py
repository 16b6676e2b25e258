"""Files that may be images: they give an image that is as its header said, or an error of ours."""

from collections.abc import Callable
from typing import TypeVar

from segrpc.service.images.decode import ImageLimits, decode_image, read_header
from tests.fuzz.refusals import refusals

T = TypeVar("T")

LIMITS = ImageLimits(max_bytes=2**20, max_pixels=300_000)


def run(data: bytes) -> None:
    """Read the header, then the pixels."""
    header = _outcome(read_header, data)
    image = _outcome(decode_image, data)
    if image is None:
        return
    assert header is not None
    assert (header.width, header.height, header.exif_orientation) == (image.width, image.height, image.exif_orientation)
    assert image.pixels.shape == (image.height, image.width, 3)
    assert 0 < image.width * image.height <= LIMITS.max_pixels
    assert image.pixels.flags.c_contiguous


def _outcome(read: Callable[[bytes, ImageLimits], T], data: bytes) -> T | None:
    with refusals():
        return read(data, LIMITS)
    return None
