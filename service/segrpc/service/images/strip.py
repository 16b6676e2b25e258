"""Encoded files, reduced to what decoding their first picture needs.

Pillow's parsers of metadata warn about what is merely odd, and some take quadratic time or unpack what they are given:
a hostile file can hold a thread for hours, or fill the memory, before a pixel is decoded. So metadata, comments,
thumbnails and later frames never reach them. What remains decodes to the same pixels.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from segrpc.service.errors import ImageUndecodableError
from segrpc.service.images.tiff import exif_orientation

# More than any encoder writes into 64 MiB, and walked through in a fraction of a second.
_MAX_BLOCKS: Final = 2**17
# Encoders write about ten. Each scan of a progressive JPEG passes over all its pixels again, however short the scan.
_MAX_SCANS: Final = 50

_MARKER: Final = re.compile(rb"\xff([^\x00\xff])")
_MARKER_AFTER_SCAN: Final = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_WITHOUT_LENGTH: Final = frozenset({0x01, *range(0xD0, 0xD9)})
_EOI, _SOS, _APP1 = 0xD9, 0xDA, 0xE1
# JFIF and Adobe's segment say what colours the channels are. All other application segments and comments go.
_METADATA: Final = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})

_HEAD_CHUNKS: Final = frozenset({b"IHDR", b"PLTE"})
_PIXEL_CHUNKS: Final = frozenset({b"IDAT", b"IEND"})

# More than what any reader looks at, of the body, to know the size and the mode of an image.
_PREVIEW: Final = 2**17


@dataclass(frozen=True, slots=True)
class Stripped:
    """A file without metadata.

    Attributes:
        head: Its beginning, up to the pixels.
        body: The pixels, as pieces of the original file.
        exif_orientation: What its EXIF block said, 1 to 8; 1 if it had none.
    """

    head: bytes
    body: Sequence[memoryview]
    exif_orientation: int = 1

    def whole(self) -> bytes:
        """Return the file."""
        return b"".join((self.head, *self.body))

    def preview(self) -> bytes:
        """Return as much of the file as it takes to open it. A large file is not copied for that."""
        return b"".join((self.head, *(piece[:_PREVIEW] for piece in self.body[:1])))


def strip_jpeg(data: bytes) -> Stripped:
    """Take out the metadata.

    Raises:
        ImageUndecodableError: If its structure is broken.
    """
    kept = [data[:2]]
    exif = b""
    position = 2
    for _ in range(_MAX_BLOCKS):
        marker, start, end = _jpeg_segment(data, position, _MARKER)
        if marker == _SOS:
            return Stripped(b"".join(kept), [memoryview(data)[start:]], exif_orientation(exif))
        if marker == _EOI:
            break
        if marker == _APP1 and not exif and data.startswith(b"Exif\0\0", start + 4):
            exif = data[start + 4 : end]
        if marker not in _METADATA:
            kept.append(data[start:end])
        position = end
    raise ImageUndecodableError("the JPEG image has no picture data")


def check_scans(data: bytes) -> None:
    """Refuse a JPEG file that was made to take long.

    Raises:
        ImageUndecodableError: If it has too many scans.
    """
    scans = position = 0
    pattern = _MARKER
    for _ in range(_MAX_BLOCKS):
        try:
            marker, _, position = _jpeg_segment(data, position, pattern)
        except ImageUndecodableError:
            return  # truncated: the decoder will notice
        scans += marker == _SOS
        if marker == _EOI:
            return
        if scans > _MAX_SCANS:
            break
        pattern = _MARKER_AFTER_SCAN if scans else _MARKER
    raise ImageUndecodableError(f"the JPEG image has more than {_MAX_SCANS} scans; no encoder writes that many")


def _jpeg_segment(data: bytes, position: int, pattern: re.Pattern[bytes]) -> tuple[int, int, int]:
    """Find the next segment: its marker, its start, and its end."""
    found = pattern.search(data, position)
    if found is None:
        raise ImageUndecodableError("the JPEG image is truncated")
    marker = found[1][0]
    if marker in _WITHOUT_LENGTH or marker == _EOI:
        return marker, found.start(), found.end()
    length = int.from_bytes(data[found.end() : found.end() + 2], "big")
    if length < 2:
        raise ImageUndecodableError("the JPEG image is truncated or damaged: a segment has no length")
    return marker, found.start(), found.end() + length


def strip_png(data: bytes) -> Stripped:
    """Take out metadata, transparency and animation.

    Raises:
        ImageUndecodableError: If its structure is broken.
    """
    head = [data[:8]]
    body: list[memoryview] = []
    exif = b""
    for name, start, end in _png_chunks(data):
        if name in _HEAD_CHUNKS and not body:
            head.append(data[start:end])
        elif name in _PIXEL_CHUNKS:
            body.append(memoryview(data)[start:end])
        elif name == b"eXIf" and not exif:
            exif = data[start + 8 : end - 4]
    return Stripped(b"".join(head), body, exif_orientation(exif))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Find the chunks up to the last one, or up to where the file is truncated: their names, starts and ends."""
    position = 8
    for _ in range(_MAX_BLOCKS):
        if position + 8 > len(data):
            return
        length, name = struct.unpack_from(">L4s", data, position)
        start, position = position, position + length + 12
        yield name, start, position
        if name == b"IEND":
            return
    raise ImageUndecodableError(f"the PNG image has more than {_MAX_BLOCKS} chunks")


def strip_gif(data: bytes) -> Stripped:
    """Take out what comes before the first frame.

    Raises:
        ImageUndecodableError: If its structure is broken, or the frame does not fit its screen.
    """
    if len(data) < 13:
        raise ImageUndecodableError("the GIF image is truncated")
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    start = 13 + (6 << (flags & 7) if flags & 0x80 else 0)
    position = _after_extensions(data, start)
    if data[position : position + 1] != b"," or len(data) < position + 9:
        raise ImageUndecodableError("the GIF image is truncated or damaged: it has no frame")
    x, y, frame_width, frame_height = struct.unpack_from("<4H", data, position + 1)
    if x + frame_width > width or y + frame_height > height:
        raise ImageUndecodableError(
            f"the GIF image is damaged: its first frame of {frame_width} x {frame_height} pixels at {x}, {y} does not "
            f"fit its screen of {width} x {height}"
        )
    return Stripped(data[:start], [memoryview(data)[position:]])


def _after_extensions(data: bytes, position: int) -> int:
    """Return where the extensions that stand at a position end."""
    in_extension = False
    for _ in range(_MAX_BLOCKS):
        first = data[position : position + 1]
        if in_extension:  # a sub-block: its size, then as many bytes; the empty one is the last
            position += 1 + int.from_bytes(first)
            in_extension = first > b"\0"
        elif first == b"!":
            position += 2
            in_extension = True
        else:
            return position
    raise ImageUndecodableError(f"the GIF image has more than {_MAX_BLOCKS} blocks before its first frame")
