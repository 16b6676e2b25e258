"""Files that were made to do harm."""

import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from segrpc.service.errors import ImageTooLargeError, ImageUndecodableError, SegrpcError
from segrpc.service.images.decode import ImageLimits, decode_image, read_header
from segrpc.service.images.strip import strip_jpeg
from segrpc.service.images.webp import size_of
from tests.unit.images.pictures import chunk, encode, exif, frame, gif, picture, tiff, webp, with_chunks

T = TypeVar("T")


def with_segments(*segments: bytes) -> bytes:
    """A JPEG file with further application segments, number 1, at its start."""
    data = encode(picture(), "JPEG")
    return data[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(one) + 2) + one for one in segments) + data[2:]


@pytest.mark.parametrize(
    "bomb",
    [
        chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(200 << 20))),
        chunk(b"iTXt", b"note\0\1\0\0\0" + zlib.compress(bytes(200 << 20))),
        chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(200 << 20))),
        chunk(b"tEXt", b"note\0x") * 50_000,
        chunk(b"acTL", struct.pack(">2L", 2**31 - 1, 0)) * 2,  # an animation of two thousand million frames
    ],
    ids=["zTXt", "iTXt", "iCCP", "tEXt", "acTL"],
)
def test_metadata_of_png_is_not_unpacked(bomb: bytes) -> None:
    assert np.array_equal(decode_image(with_chunks(bomb)).pixels, picture())


def test_a_png_of_countless_chunks_is_refused() -> None:
    with pytest.raises(ImageUndecodableError, match="chunks"):
        decode_image(with_chunks(chunk(b"IDAT", b"") * 140_000))


def test_a_png_with_more_pixels_than_announced_gives_what_was_announced() -> None:
    data = encode(np.zeros((4000, 4000), np.uint8), "PNG")
    header = struct.pack(">2L", 4, 4) + data[24:29]
    assert decode_image(data[:8] + chunk(b"IHDR", header) + data[33:]).pixels.shape == (4, 4, 3)


def test_metadata_of_jpeg_never_reaches_the_reader() -> None:
    # Pillow would append every such segment to all before it: a file full of them would take it an hour.
    data = with_segments(*[b"Exif\0\0x" for _ in range(60_000)], b"http://ns.adobe.com/xap/1.0/\0<x/>")
    assert strip_jpeg(data).whole() == encode(picture(), "JPEG")


def test_a_malformed_multi_picture_jpeg_is_read_as_jpeg() -> None:
    segment = b"MPF\0II*\0\x08\0\0\0\1\0\1\xb0\4\0\1\0\0\0\2\0\0\0\0\0\0\0"
    data = with_segments(segment).replace(b"\xff\xe1", b"\xff\xe2", 1)
    assert decode_image(data).pixels.shape == picture().shape


def test_a_jpeg_of_countless_scans_is_refused() -> None:
    data = encode(picture(), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert decode_image(data[:-2] + scan * 20 + data[-2:]).pixels.shape == picture().shape
    slow = data[:-2] + scan * 50 + data[-2:]
    with pytest.raises(ImageUndecodableError, match="scans"):
        decode_image(slow)
    with pytest.raises(ImageUndecodableError, match="scans"):  # nor when they hide behind a false end
        decode_image(data[:-2] + b"\xff\xfe\0\4\xff\xd9" + scan * 50 + data[-2:])


def test_a_gif_frame_must_fit_its_screen() -> None:
    assert decode_image(gif((1, 1), frame(0, 0, 1, 1))).pixels.tolist() == [[[255, 255, 255]]]
    for bomb in (frame(0, 0, 65535, 65535), frame(1, 0, 1, 1), frame(0, 0, 1, 2)):
        with pytest.raises(ImageUndecodableError, match="does not fit its screen"):
            decode_image(gif((1, 1), bomb))


def test_later_frames_are_not_looked_at() -> None:
    later = frame(0, 0, 65535, 65535) * 10_000
    assert decode_image(gif((1, 1), frame(0, 0, 1, 1), later)).pixels.shape == (1, 1, 3)


@pytest.mark.parametrize("extension", [b"!\xfe\0", b"!\xfe" + b"\1x" * 200_000 + b"\0"])
def test_a_gif_of_countless_blocks_is_refused(extension: bytes) -> None:
    with pytest.raises(ImageUndecodableError, match="blocks"):
        decode_image(gif((1, 1), extension * 140_000 if len(extension) == 3 else extension, frame(0, 0, 1, 1)))


@pytest.mark.parametrize(
    "data",
    [
        gif((65535, 65535), frame(0, 0, 1, 1)),
        webp(16383, 16383),
        tiff(b"", 10**9, 10**9),
        encode(picture(), "BMP")[:18] + struct.pack("<2L", 2**31 - 1, 2**31 - 1) + encode(picture(), "BMP")[26:],
        encode(picture(), "PNG")[:8]
        + chunk(b"IHDR", struct.pack(">2L5B", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
        + encode(picture(), "PNG")[33:],
    ],
    ids=["gif", "webp", "tiff", "bmp", "png"],
)
def test_a_huge_image_is_refused_by_its_header(data: bytes) -> None:
    for read in (read_header, decode_image):
        with pytest.raises(ImageTooLargeError):
            read(data)


def lossless_webp(side: int) -> bytes:
    """A WebP file of one colour, whose pixels take no bits: as many as one likes."""
    data = encode(Image.new("RGB", (1, 1)), "WEBP", lossless=True)
    return data[:21] + struct.pack("<L", (side - 1) | (side - 1) << 14) + data[25:]


@pytest.mark.parametrize("data", [webp(13_300, 13_300), lossless_webp(13_300)], ids=["extended", "lossless"])
def test_no_memory_is_reserved_for_what_a_webp_header_claims(data: bytes) -> None:
    """A file of a few bytes; libwebp would reserve eight bytes for each of its pixels to tell their number."""
    program = """
import resource, sys
from pathlib import Path
from segrpc.service.errors import ImageTooLargeError
from segrpc.service.images.decode import read_header
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 2**28, held + 2**28))
try:
    read_header(sys.stdin.buffer.read())
except ImageTooLargeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, timeout=60, check=False)
    assert done.stdout.startswith(b"the image has 13300 x 13300 = 176890000 pixels"), (done.stdout, done.stderr)


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 80}, {"quality": 80, "exif": exif(1)}])
@pytest.mark.parametrize("size", [(1, 1), (300, 7), (2, 16_383)])
def test_the_size_of_webp_images_is_read_as_pillow_does(options: dict[str, Any], size: tuple[int, int]) -> None:
    data = encode(Image.new("RGB", size), "WEBP", **options)
    with Image.open(BytesIO(data)) as image:
        assert size_of(data) == image.size == size


@pytest.mark.parametrize(
    "data",
    [
        b"%PDF-1.4\n" + encode(picture(), "JPEG"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" + encode(picture(), "PNG"),
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + encode(picture(), "PNG"),  # an icon
        b"8BPS\0\1" + encode(picture(), "JPEG"),
        b"P6\n24 16\n255\n" + picture().tobytes(),
        b"PK\3\4" + encode(picture(), "PNG"),
        b"\n" + encode(picture(), "GIF"),
    ],
    ids=["pdf", "eps", "svg", "ico", "psd", "ppm", "zip", "newline"],
)
def test_an_image_within_a_file_of_another_kind_is_not_found(data: bytes) -> None:
    # Readers of other kinds are out of reach: some of them run programs, or read other files.
    with pytest.raises(ImageUndecodableError, match="no image of a supported format"):
        decode_image(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_file_that_is_something_else_as_well_is_read_as_what_it_begins_with(kind: str) -> None:
    data = encode(picture(), kind)
    white = encode(np.full_like(picture(), 255), "PNG")
    for tail in (b"PK\5\6" + bytes(18), b"<script>alert(1)</script>", b"<?php ?>", white, data):
        assert np.array_equal(decode_image(data + tail).pixels, decode_image(data).pixels)


@pytest.mark.parametrize("size", [(0, 1), (1, 0), (0, 0)])
def test_images_without_pixels_are_refused(size: tuple[int, int]) -> None:
    for data in (
        gif(size, frame(0, 0, *size)),
        tiff(b"", *size),
        encode(picture(), "JPEG").replace(b"\0\x10\0\x18", struct.pack(">2H", *size)),
    ):
        with pytest.raises(ImageUndecodableError):
            decode_image(data)


def test_a_huge_tile_is_refused() -> None:
    with pytest.raises(ImageTooLargeError, match="tile"):
        decode_image(
            tiff(b"x", 1, 1, (259, 3, 1, 8), (322, 4, 1, 65536), (323, 4, 1, 65536), (324, 4, 1, 8), (325, 4, 1, 1))
        )


def test_a_tiff_of_countless_strips_is_refused() -> None:
    with pytest.raises(ImageUndecodableError, match="tag 273 has 300000 values"):
        decode_image(tiff(bytes(1_200_000), 1, 300_000, (273, 4, 300_000, 8), (278, 4, 1, 1)))


@pytest.mark.parametrize("tag", [(273, 4, 100, 10**6), (258, 3, 3, 10**9), (256, 4, 2, 8)])
def test_a_tiff_with_tags_that_lie_nowhere_is_refused(tag: tuple[int, int, int, int]) -> None:
    with pytest.raises(ImageUndecodableError, match="TIFF image is"):
        decode_image(tiff(bytes(64), 8, 8, tag))


def test_a_tiff_that_is_its_own_next_page() -> None:
    data = tiff(bytes(64), 8, 8)
    assert decode_image(data[:-4] + data[4:8]).pixels.shape == (8, 8, 3)


def test_run_length_bmp_is_refused() -> None:
    data = bytearray(encode(Image.new("P", (8, 8)), "BMP"))
    data[30] = 1
    with pytest.raises(ImageUndecodableError, match="run lengths"):
        read_header(bytes(data))


def samples() -> list[bytes]:
    image = Image.fromarray(picture())
    grey = Image.fromarray(picture()[:, :, 0].astype(np.uint16) * 200)
    frames: dict[str, Any] = {"save_all": True, "append_images": [image.rotate(90)]}
    return [
        *(encode(image.convert(mode), "JPEG", exif=exif(6)) for mode in ("L", "RGB", "CMYK")),
        encode(image, "JPEG", progressive=True, comment=b"text", icc_profile=b"profile"),
        *(encode(image.convert(mode), "PNG", exif=exif(8)) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(encode(image, kind, **frames) for kind in ("PNG", "WEBP", "GIF", "TIFF")),
        *(encode(image.convert(mode), "WEBP", exif=exif(5), lossless=mode == "RGB") for mode in ("RGB", "RGBA")),
        *(encode(image.convert(mode), "TIFF", exif=exif(3)) for mode in ("1", "P", "RGB", "CMYK", "YCbCr", "F")),
        *(encode(image, "TIFF", compression=how) for how in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "lzma")),
        *(encode(image.convert("1"), "TIFF", compression=how) for how in ("group3", "group4")),
        encode(image, "TIFF", big_tiff=True),
        *(encode(grey, kind) for kind in ("PNG", "TIFF")),
        *(encode(image.convert(mode), "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")),
        encode(image.convert("P"), "GIF"),
    ]


def with_right_checksums(data: bytes) -> bytes:
    """Mend the checksums of a PNG file, which would otherwise hide most damage."""
    mended, position = bytearray(data), 8
    while data.startswith(b"\x89PNG") and position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        mended[end : end + 4] = struct.pack(">L", zlib.crc32(data[position + 4 : end]))[: max(0, len(data) - end)]
        position = end + 4
    return bytes(mended)


ANY_PLACE = st.floats(0, 1, exclude_max=True)
HEAD = st.floats(0, 0.2)
EDGES = [
    b"\0",
    b"\xff",
    b"\x7f",
    b"\xff\xff",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xd9",
    b"\xff\xda",
]
EDITS = st.tuples(
    HEAD | ANY_PLACE,
    st.sampled_from(["overwrite", "insert", "delete"]),
    st.sampled_from(EDGES) | st.binary(min_size=1, max_size=8),
)


@given(st.sampled_from(samples()), st.lists(EDITS, min_size=1, max_size=8), ANY_PLACE | st.none())
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_files_give_an_image_or_an_error_of_ours(
    data: bytes, edits: list[tuple[float, str, bytes]], cut: float | None
) -> None:
    damaged = bytearray(data)
    for place, how, what in edits:
        at = int(place * len(damaged))
        damaged[at : at + (0 if how == "insert" else len(what))] = b"" if how == "delete" else what
    if cut is not None:
        del damaged[int(cut * len(damaged)) :]
    limits = ImageLimits(max_pixels=100_000)
    for variant in (bytes(damaged), with_right_checksums(bytes(damaged))):
        header = outcome(read_header, variant, limits)
        image = outcome(decode_image, variant, limits)
        if image is not None:  # then the header must have told the truth
            assert header is not None
            assert (header.height, header.width) == image.pixels.shape[:2]
            assert header.exif_orientation == image.exif_orientation


def outcome(read: Callable[[bytes, ImageLimits], T], data: bytes, limits: ImageLimits) -> T | None:
    try:
        return read(data, limits)
    except SegrpcError:
        return None
