"""The size of a WebP image, from its first bytes.

Pillow makes libwebp's decoder to learn the size, which reserves eight bytes for each pixel that the header claims: more
than a gigabyte for a file of 34 bytes.
"""

import struct

_VP8_START = b"\x9d\x01\x2a"  # of a key frame, behind its three bytes of flags
_VP8L_START = 0x2F


def size_of(data: bytes) -> tuple[int, int] | None:
    """Return width and height in pixels, or None if the file does not tell: then no decoder takes it either."""
    kind, content = data[12:16], data[20:30]
    if len(content) < 10:
        return None
    if kind == b"VP8X":
        width, height = (int.from_bytes(content[at : at + 3], "little") + 1 for at in (4, 7))
        return width, height
    if kind == b"VP8L" and content[0] == _VP8L_START:
        (bits,) = struct.unpack_from("<L", content, 1)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and content[3:6] == _VP8_START:
        width, height = (one & 0x3FFF for one in struct.unpack_from("<2H", content, 6))
        return width, height
    return None
