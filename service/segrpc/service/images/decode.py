"""From encoded files to RGB pixels.

Of JPEG, PNG, WebP, TIFF, BMP and GIF, only the first frame or page is read. Any kind of pixel becomes 8-bit RGB:

- Grey, black and white, palette, CMYK, YCbCr and Lab images are converted; colour profiles are not applied.
- Alpha is dropped, not blended: transparent pixels show the colour they are stored with.
- Of more than 8 bits per sample the highest 8 are kept (white of 16 bits becomes 255, since ``65535 >> 8`` is 255).
  Signed, 32-bit and floating-point samples have no agreed white and are refused.
- The EXIF orientation is applied, so that coordinates mean the image as displayed. A corrupt EXIF block counts as none.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from segrpc.service.errors import ImageTooLargeError, ImageUndecodableError, OverloadedError, SegrpcError
from segrpc.service.images import strip, tiff, webp

RGBImage = npt.NDArray[np.uint8]

FORMATS: Final = "JPEG, PNG, WebP, TIFF, BMP and GIF"

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_SIGNATURES: Final = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WebP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]"),
    "BMP": re.compile(rb"BM"),
    "GIF": re.compile(rb"GIF8[79]a"),
}
_STRIPPED: Final[
    dict[str | None, tuple[Callable[[bytes], strip.Stripped], Callable[[BytesIO], ImageFile.ImageFile]]]
] = {
    "JPEG": (strip.strip_jpeg, JpegImageFile),
    "PNG": (strip.strip_png, PngImageFile),
    "GIF": (strip.strip_gif, GifImageFile),
}
# Pillow decodes these BMP images byte by byte in Python: a few kilobytes could take a minute.
_RUN_LENGTHS: Final = (BmpImageFile.COMPRESSIONS["RLE8"], BmpImageFile.COMPRESSIONS["RLE4"])
_TRANSPOSES: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What encoded images must keep to.

    Attributes:
        max_bytes: The largest file, in bytes.
        max_pixels: The largest image, width times height. WebP images above 178,956,970 pixels are refused anyway.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 64_000_000


DEFAULT_LIMITS: Final = ImageLimits()


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What is known of an image before its pixels are decoded.

    Attributes:
        width: Its width in pixels as displayed, that is with the orientation applied.
        height: Its height likewise.
        exif_orientation: The EXIF orientation that was applied, 1 to 8; 1 if there is none.
    """

    width: int
    height: int
    exif_orientation: int


@dataclass(frozen=True, slots=True, eq=False)
class DecodedImage:
    """An image as displayed.

    Attributes:
        pixels: ``[height, width, 3]``, uint8, RGB, C-contiguous.
        exif_orientation: The EXIF orientation that was applied, 1 to 8; 1 if there is none.
    """

    pixels: RGBImage
    exif_orientation: int

    @property
    def width(self) -> int:
        """Its width in pixels."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Its height in pixels."""
        return int(self.pixels.shape[0])


def digest_of(data: bytes) -> str:
    """Return ``sha256:`` and the 64 lower-case hexadecimal digits of the SHA-256 of an encoded file."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def is_digest(text: str) -> bool:
    """Tell whether a text has the form that `digest_of` gives."""
    return _DIGEST.fullmatch(text) is not None


def format_of(data: bytes) -> str | None:
    """Return the name of the supported format whose signature a file begins with, or None."""
    return next((name for name, signature in _SIGNATURES.items() if signature.match(data)), None)


def check_size(size: int, limits: ImageLimits) -> None:
    """Check the size of an encoded file in bytes.

    Raises:
        ImageTooLargeError: If it is above the limit.
    """
    if size > limits.max_bytes:
        raise ImageTooLargeError(f"the image file has {size} bytes; at most {limits.max_bytes} are allowed")


def read_header(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> ImageHeader:
    """Read the size of an image without decoding its pixels.

    Raises:
        ImageTooLargeError: If it has too many bytes or pixels.
        ImageUndecodableError: If it is no image of a supported format.
    """
    with _undecodable():
        image, orientation = _open(data, limits, preview=True)
    width, height = image.size if orientation < 5 else reversed(image.size)
    return ImageHeader(width, height, orientation)


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> DecodedImage:
    """Decode an encoded file.

    Raises:
        ImageTooLargeError: If it has too many bytes or pixels; no pixel is decoded then.
        ImageUndecodableError: If it is no image of a supported format, is truncated or is damaged.
        OverloadedError: If there is not enough memory.
    """
    with _undecodable():
        image, orientation = _open(data, limits)
        rgb = _to_rgb(image)
        if orientation > 1:
            rgb = rgb.transpose(_TRANSPOSES[orientation])
        return DecodedImage(np.array(rgb, order="C"), orientation)


class _PlainTiffFile(TiffImageFile):
    """A TIFF file whose size was checked already: Pillow would warn above a limit of its own."""

    def load_prepare(self) -> None:
        ImageFile.ImageFile.load_prepare(self)


def _open(data: bytes, limits: ImageLimits, *, preview: bool = False) -> tuple[ImageFile.ImageFile, int]:
    """Check the bytes, the format and the pixels, in this order; return the unread image and its EXIF orientation.

    It builds Pillow's readers directly: that keeps all other formats out of reach, and avoids the process-wide settings
    that `PIL.Image.open` obeys. With ``preview``, the pixels need not be there.
    """
    check_size(len(data), limits)
    image, orientation = _reader(data, limits, preview)
    _check_pixels(image.size, limits)
    if image.mode in ("I", "F"):
        raise ImageUndecodableError(
            "the image has signed, 32-bit or floating-point samples; save it with unsigned samples of 8 or 16 bits"
        )
    if isinstance(image, BmpImageFile) and image.info.get("compression") in _RUN_LENGTHS:
        raise ImageUndecodableError("BMP images compressed by run lengths are not supported; save it as PNG")
    return image, orientation


def _check_pixels(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise ImageTooLargeError(
            f"the image has {width} x {height} = {width * height} pixels; at most {limits.max_pixels} are allowed"
        )


def _reader(data: bytes, limits: ImageLimits, preview: bool) -> tuple[ImageFile.ImageFile, int]:
    kind = format_of(data)
    if kind in _STRIPPED:
        strip_format, reader = _STRIPPED[kind]
        stripped = strip_format(data)
        return reader(BytesIO(stripped.preview() if preview else stripped.whole())), stripped.exif_orientation
    if kind == "TIFF":
        return _PlainTiffFile(BytesIO(tiff.pixels_only(data, limits.max_pixels))), tiff.exif_orientation(data)
    if kind == "WebP":
        size = webp.size_of(data)
        if size is None:
            raise ImageUndecodableError("the WebP image is truncated or damaged: it has no size")
        _check_pixels(size, limits)
        image = WebPImageFile(BytesIO(data))
        return image, tiff.exif_orientation(image.info.get("exif", b""))
    if kind == "BMP":
        return BmpImageFile(BytesIO(data)), 1
    what = "is no image of a supported format" if data else "is empty"
    raise ImageUndecodableError(f"the file {what}; {FORMATS} are supported")


def _to_rgb(image: ImageFile.ImageFile) -> Image.Image:
    if isinstance(image, JpegImageFile):
        assert isinstance(image.fp, BytesIO)
        strip.check_scans(image.fp.getvalue())
    image.load()
    if image.mode.startswith("I;16"):
        return _grey_to_rgb(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_to_rgb(image: ImageFile.ImageFile) -> Image.Image:
    """Convert grey of more than 8 bits; Pillow itself would clip it at 255."""
    bits, inverted = 16, False
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(258, (16,))[0]
        inverted = image.tag_v2.get(262) == 0  # white is zero: Pillow turns that round for up to 8 bits only
    grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    return Image.fromarray(~grey if inverted else grey).convert("RGB")


@contextmanager
def _undecodable() -> Iterator[None]:
    """Turn whatever Pillow raises for bad data into errors of ours."""
    try:
        yield
    except SegrpcError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError("the image has more pixels than any limit allows for its format") from error
    except MemoryError as error:
        raise OverloadedError(
            "there is not enough memory to decode the image; try later or send a smaller one"
        ) from error
    except Exception as error:
        raise ImageUndecodableError(
            f"the image cannot be decoded ({error}): it may be truncated or damaged; {FORMATS} are supported"
        ) from error
