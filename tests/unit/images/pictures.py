"""Pictures and files for the tests of images."""

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]

WIDTH, HEIGHT = 24, 16


def picture() -> Pixels:
    """A smooth picture without any symmetry, ``[16, 24, 3]``."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([x * 10, y * 15, 255 - x * 5 - y * 3], axis=2).astype(np.uint8)


def encode(image: Image.Image | npt.NDArray[Any], kind: str, **options: Any) -> bytes:
    """Write a file of a format, by Pillow."""
    file = BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    """An EXIF block with an orientation."""
    block = Image.Exif()
    block[274] = orientation
    return block


def tiff(pixels: bytes, width: int, height: int, *tags: tuple[int, int, int, int], order: str = "<") -> bytes:
    """An uncompressed TIFF file of one strip. Tags are given as tag, type, count and value."""
    usual = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1)}
    usual |= {273: (4, 1, 8), 277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, len(pixels))}
    usual |= {tag: (type_, count, value) for tag, type_, count, value in tags}
    entries = b""
    for tag, (type_, count, value) in sorted(usual.items()):
        entries += struct.pack(order + "HHL", tag, type_, count)
        entries += struct.pack(order + "HH", value, 0) if (type_, count) == (3, 1) else struct.pack(order + "L", value)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "L", 8 + len(pixels))
    return head + pixels + struct.pack(order + "H", len(usual)) + entries + bytes(4)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data))


def with_chunks(*chunks: bytes) -> bytes:
    """A PNG file with further chunks before its pixels."""
    data = encode(picture(), "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def gif(screen: tuple[int, int], *blocks: bytes) -> bytes:
    return b"GIF89a" + struct.pack("<2H", *screen) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff" + b"".join(blocks) + b";"


def frame(x: int, y: int, width: int, height: int) -> bytes:
    return b"," + struct.pack("<4H", x, y, width, height) + b"\0\2\2\x4c\1\0"  # LZW data of one pixel: index 1


def webp(width: int, height: int) -> bytes:
    """A WebP file whose header claims a size."""
    header = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF\x2a\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + header + b"VP8L\x0c\0\0\0\x2f" + bytes(11)
