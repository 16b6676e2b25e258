"""TEMPORARY"""
import hashlib, io, re, threading
from dataclasses import dataclass
import numpy as np, numpy.typing as npt
from PIL import Image, ImageOps
from segrpc.service.errors import *
RGBImage = npt.NDArray[np.uint8]
@dataclass(frozen=True)
class ImageLimits:
    max_bytes: int = 64 * 2**20
    max_pixels: int = 64_000_000
@dataclass(frozen=True)
class ImageHeader:
    width: int
    height: int
    exif_orientation: int
@dataclass(frozen=True)
class DecodedImage:
    pixels: RGBImage
    width: int
    height: int
    exif_orientation: int
def digest_of(data): return "sha256:" + hashlib.sha256(data).hexdigest()
def is_digest(t): return re.fullmatch(r"sha256:[0-9a-f]{64}", t) is not None
def _open(data, limits):
    if len(data) > limits.max_bytes: raise ImageTooLargeError("too many bytes")
    try:
        im = Image.open(io.BytesIO(data), formats=["JPEG","PNG","WEBP","TIFF","BMP","GIF"])
        o = im.getexif().get(0x112, 1)
    except Exception as e: raise ImageUndecodableError("no image")
    if im.width*im.height > limits.max_pixels: raise ImageTooLargeError("too many pixels")
    return im, o if o in range(1,9) else 1
def read_header(data, limits=ImageLimits()):
    im, o = _open(data, limits)
    w, h = im.size if o < 5 else im.size[::-1]
    return ImageHeader(w, h, o)
def decode_image(data, limits=ImageLimits()):
    im, o = _open(data, limits)
    try: p = np.ascontiguousarray(np.asarray(ImageOps.exif_transpose(im).convert("RGB")))
    except Exception: raise ImageUndecodableError("truncated")
    return DecodedImage(p, p.shape[1], p.shape[0], o)
