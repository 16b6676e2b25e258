"""The directory at the head of a TIFF file, which is also the form of an EXIF block."""

import struct
from dataclasses import dataclass
from typing import Final

from PIL import TiffTags

from segrpc.service.errors import ImageTooLargeError, ImageUndecodableError

ORIENTATION: Final = 274

_TILE_WIDTH, _TILE_LENGTH = 322, 323
# The tags that say where the pixels are and how they are packed. All others describe the picture.
_PIXEL_TAGS: Final = frozenset(
    {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339, 347}
    | {*range(512, 522), 529, 530, 532}
)
# Bytes of a value of each type.
_TYPE_SIZES: Final = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8}
_TEXT: Final = {1, 2, 7}  # Pillow takes all the values of these types together as one
_UNSIGNED: Final = {1: "B", 3: "H", 4: "L"}

# Strips or tiles. Each one costs a few hundred bytes of memory while the file is read.
_MAX_VALUES: Final = 2**18


@dataclass(frozen=True, slots=True)
class Entry:
    """One tag of a directory.

    Attributes:
        type: The type's number.
        count: How many values it has.
        raw: The entry as it stands in the directory.
        value: The value or, if it does not fit, its offset in the file.
    """

    type: int
    count: int
    raw: bytes
    value: bytes

    @property
    def nbytes(self) -> int:
        """How many bytes the values take; 0 for an unknown type."""
        return self.count * _TYPE_SIZES.get(self.type, 0)


@dataclass(frozen=True, slots=True)
class Directory:
    """The first directory of a file.

    Attributes:
        order: ``<`` for little-endian, ``>`` for big-endian.
        big: Whether this is BigTIFF, with offsets of 64 bits.
        entries: By tag. Of a repeated tag only the first counts.
    """

    order: str
    big: bool
    entries: dict[int, Entry]

    def number(self, tag: int, default: int = 0) -> int:
        """Return the first value of a tag that has whole numbers which stand in the directory itself."""
        entry = self.entries.get(tag)
        if entry is None or entry.type not in _UNSIGNED or not 0 < entry.nbytes <= len(entry.value):
            return default
        return int(struct.unpack_from(self.order + _UNSIGNED[entry.type], entry.value)[0])


def read_directory(data: bytes) -> Directory:
    """Read the first directory of a TIFF file or of an EXIF block.

    Raises:
        ValueError: If there is none.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    version = int.from_bytes(data[2:4], "little" if order == "<" else "big")
    if order is None or version not in (42, 43):
        raise ValueError("no TIFF header")
    big = version == 43
    count_format, entry_format = ("Q", "HHQ8s") if big else ("H", "HHL4s")
    entry_size = struct.calcsize(order + entry_format)
    try:
        (start,) = struct.unpack_from(order + ("Q" if big else "L"), data, 8 if big else 4)
        (count,) = struct.unpack_from(order + count_format, data, start)
        start += struct.calcsize(order + count_format)
        entries: dict[int, Entry] = {}
        for position in range(start, start + min(count, 2**16) * entry_size, entry_size):
            tag, type_, values, value = struct.unpack_from(order + entry_format, data, position)
            entries.setdefault(tag, Entry(type_, values, data[position : position + entry_size], value))
    except (struct.error, OverflowError) as error:  # OverflowError: an offset of 64 bits
        raise ValueError("the directory is truncated") from error
    return Directory(order, big, entries)


def exif_orientation(exif: bytes) -> int:
    """Return the orientation that an EXIF block gives, 1 to 8; 1 if it gives none or is corrupt."""
    try:
        orientation = read_directory(exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")).number(ORIENTATION, 1)
    except ValueError:
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def pixels_only(data: bytes, max_pixels: int) -> bytes:
    """Return a TIFF file that has a single directory with no more than what decoding the pixels needs.

    Raises:
        ImageUndecodableError: If the directory is corrupt.
        ImageTooLargeError: If a tile has more than ``max_pixels``.
    """
    try:
        directory = read_directory(data)
    except ValueError as error:
        raise ImageUndecodableError(f"the TIFF image is damaged: {error}") from error
    tile_pixels = directory.number(_TILE_WIDTH) * directory.number(_TILE_LENGTH)
    if tile_pixels > max_pixels:
        raise ImageTooLargeError(f"a tile of the image has {tile_pixels} pixels; at most {max_pixels} are allowed")
    kept = {tag: entry for tag, entry in directory.entries.items() if tag in _PIXEL_TAGS and entry.nbytes}
    _check_entries(kept, directory.order, len(data))
    return _with_directory(data, directory, [kept[tag].raw for tag in sorted(kept)])


def _check_entries(entries: dict[int, Entry], order: str, file_size: int) -> None:
    """Refuse entries that point beyond the file or have more values than they may."""
    outside = [entry for entry in entries.values() if entry.nbytes > len(entry.value)]
    for entry in outside:
        (offset,) = struct.unpack(order + ("Q" if len(entry.value) == 8 else "L"), entry.value)
        if offset + entry.nbytes > file_size:
            raise ImageUndecodableError("the TIFF image is truncated: a tag lies beyond the end of the file")
    if sum(entry.nbytes for entry in outside) > file_size:
        raise ImageUndecodableError("the TIFF image is damaged: its tags overlap")
    for tag, entry in entries.items():
        single = TiffTags.lookup(tag).length == 1 and entry.type not in _TEXT
        if entry.count > (1 if single else _MAX_VALUES):
            raise ImageUndecodableError(f"the TIFF image is damaged: tag {tag} has {entry.count} values")


def _with_directory(data: bytes, directory: Directory, entries: list[bytes]) -> bytes:
    """Return the file with another directory. Pixels stay where they are, so their offsets remain right."""
    offset_format = directory.order + ("Q" if directory.big else "L")
    head = 8 if directory.big else 4
    start = len(data) + len(data) % 2
    whole = memoryview(data)
    return b"".join(
        (
            whole[:head],
            struct.pack(offset_format, start),
            whole[head + struct.calcsize(offset_format) :],
            bytes(len(data) % 2),
            struct.pack(directory.order + ("Q" if directory.big else "H"), len(entries)),
            *entries,
            struct.pack(offset_format, 0),
        )
    )
