import re
import struct
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from segrpc.service.errors import ImageTooLargeError, ImageUndecodableError
from segrpc.service.images.decode import ImageLimits, decode_image, digest_of, is_digest, read_header
from tests.unit.images.pictures import HEIGHT, WIDTH, Pixels, encode, exif, picture, tiff

GREY = picture()[:, :, 0]
DEEP = (GREY.astype(np.uint16) << 8) + 200  # 16 bits; the low byte must not matter

LOSSLESS: list[tuple[str, dict[str, Any]]] = [
    ("PNG", {}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", {"big_tiff": True}),
    ("BMP", {}),
]


def close(left: Pixels, right: Pixels, tolerance: int) -> bool:
    return left.shape == right.shape and int(np.abs(left.astype(int) - right).max()) <= tolerance


def turned(pixels: Pixels, orientation: int) -> Pixels:
    """What the EXIF standard says: where row 0 and column 0 of the file are to be shown."""
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: pixels.swapaxes(0, 1)[:, ::-1],
        7: pixels.swapaxes(0, 1)[::-1, ::-1],
        8: pixels.swapaxes(0, 1)[::-1],
    }[orientation]


@pytest.mark.parametrize(("kind", "options"), LOSSLESS)
def test_rgb_is_exact_and_contiguous(kind: str, options: dict[str, Any]) -> None:
    data = encode(picture(), kind, **options)
    image = decode_image(data)
    assert np.array_equal(image.pixels, picture())
    assert image.pixels.dtype == np.uint8
    assert image.pixels.flags.c_contiguous
    assert (image.width, image.height, image.exif_orientation) == (WIDTH, HEIGHT, 1)
    header = read_header(data)
    assert (header.width, header.height, header.exif_orientation) == (WIDTH, HEIGHT, 1)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}])
def test_jpeg_is_close(options: dict[str, Any]) -> None:
    assert close(decode_image(encode(picture(), "JPEG", quality=95, **options)).pixels, picture(), 12)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG"])
def test_grey(kind: str) -> None:
    pixels = decode_image(encode(GREY, kind, **({"lossless": True} if kind == "WEBP" else {}))).pixels
    assert close(pixels, np.stack([GREY] * 3, axis=2), 4 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF"])
def test_black_and_white(kind: str) -> None:
    bits = GREY > 100
    assert np.array_equal(decode_image(encode(Image.fromarray(bits), kind)).pixels, np.stack([bits] * 3, 2) * 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF"])
def test_palette(kind: str) -> None:
    image = Image.fromarray(GREY // 16)
    image.putpalette([value for i in range(16) for value in (i, 255 - i, 10 * i)])
    indices = (GREY // 16).astype(int)
    expected = np.stack([indices, 255 - indices, 10 * indices], axis=2)
    assert np.array_equal(decode_image(encode(image, kind)).pixels, expected)


@pytest.mark.parametrize("transparency", [3, bytes(range(16))])
def test_a_transparent_palette_keeps_its_colours(transparency: int | bytes) -> None:
    image = Image.fromarray(GREY // 16)
    image.putpalette([value for i in range(16) for value in (i, 255 - i, 10 * i)])
    plain, transparent = encode(image, "PNG"), encode(image, "PNG", transparency=transparency)
    assert np.array_equal(decode_image(transparent).pixels, decode_image(plain).pixels)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_alpha_is_dropped_and_not_blended(kind: str, options: dict[str, Any]) -> None:
    rgba = np.dstack([picture(), GREY])  # the leftmost column is wholly transparent
    assert np.array_equal(decode_image(encode(rgba, kind, **options)).pixels, picture())


def test_grey_with_alpha() -> None:
    image = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(GREY[::-1])])
    assert np.array_equal(decode_image(encode(image, "PNG")).pixels, np.stack([GREY] * 3, axis=2))


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk(kind: str) -> None:
    # Pillow, like Photoshop, writes JPEG files of inverted values with Adobe's marker.
    cmyk = np.dstack([picture(), 60 + GREY // 4])
    expected = (255 - picture().astype(int)) * (255 - cmyk[:, :, 3:].astype(int)) // 255
    pixels = decode_image(
        encode(Image.fromarray(cmyk, "CMYK"), kind, **({"quality": 95} if kind == "JPEG" else {}))
    ).pixels
    assert close(pixels, expected.astype(np.uint8), 12 if kind == "JPEG" else 1)


@pytest.mark.parametrize("mode", ["YCbCr", "LAB"])
def test_other_colour_spaces(mode: str) -> None:
    image = Image.fromarray(picture()).convert(mode)
    assert close(decode_image(encode(image, "TIFF")).pixels, np.asarray(image.convert("RGB")), 0)


@pytest.mark.parametrize(
    "data",
    [
        encode(DEEP, "PNG"),
        encode(DEEP, "TIFF", compression="tiff_lzw"),
        tiff(DEEP.astype("<u2").tobytes(), WIDTH, HEIGHT, (258, 3, 1, 16)),
        tiff(DEEP.astype(">u2").tobytes(), WIDTH, HEIGHT, (258, 3, 1, 16), order=">"),
        tiff((65535 - DEEP).astype("<u2").tobytes(), WIDTH, HEIGHT, (258, 3, 1, 16), (262, 3, 1, 0)),
    ],
    ids=["png", "tiff-lzw", "tiff-little-endian", "tiff-big-endian", "tiff-white-is-zero"],
)
def test_of_16_bits_the_highest_8_are_kept(data: bytes) -> None:
    assert np.array_equal(decode_image(data).pixels, np.stack([GREY] * 3, axis=2))


def test_12_bits() -> None:
    row = bytes.fromhex("fff 000 800 010".replace(" ", ""))
    assert decode_image(tiff(row, 4, 1, (258, 3, 1, 12))).pixels[0, :, 0].tolist() == [255, 0, 128, 1]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_samples_without_a_known_white_are_refused(mode: str) -> None:
    data = encode(Image.fromarray(GREY).convert(mode), "TIFF")
    for read in (read_header, decode_image):
        with pytest.raises(ImageUndecodableError, match="8 or 16 bits"):
            read(data)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "jpeg"}),
    ],
)
def test_the_orientation_is_applied(kind: str, options: dict[str, Any], orientation: int) -> None:
    data = encode(picture(), kind, exif=exif(orientation), **options)
    image, header = decode_image(data), read_header(data)
    expected = turned(picture(), orientation)
    assert close(image.pixels, expected, 12 if "JPEG" in (kind, options.get("compression", "").upper()) else 0)
    assert image.pixels.flags.c_contiguous
    assert image.exif_orientation == header.exif_orientation == orientation
    assert (header.height, header.width) == expected.shape[:2]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_counts_as_none(kind: str, orientation: int) -> None:
    if kind == "TIFF":
        data = tiff(GREY.tobytes(), WIDTH, HEIGHT, (274, 3, 1, orientation))
    else:
        data = encode(picture(), kind, exif=exif(orientation))
    assert decode_image(data).exif_orientation == read_header(data).exif_orientation == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "block",
    [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b"II*\0\x08\0\0\0\1\0\x12\1", b"garbage" * 9],
)
def test_a_corrupt_exif_block_counts_as_none(kind: str, block: bytes) -> None:
    data = encode(picture(), kind, exif=b"Exif\0\0" + block)
    assert decode_image(data).exif_orientation == 1
    assert (read_header(data).width, read_header(data).height) == (WIDTH, HEIGHT)


def test_the_orientation_is_found_in_a_block_with_other_corrupt_tags() -> None:
    corrupt = struct.pack("<2H2L", 271, 2, 65535, 2**31 - 1)  # a maker's name that lies nowhere
    block = b"II*\0\x08\0\0\0\2\0" + corrupt + struct.pack("<2HL2H", 274, 3, 1, 6, 0) + bytes(4)
    assert decode_image(encode(picture(), "JPEG", exif=b"Exif\0\0" + block)).exif_orientation == 6


def test_odd_tags_of_a_tiff_file_do_no_harm() -> None:
    odd = [(270, 2, 5000, 10**9), (34665, 4, 1, 10**9), (700, 7, 10**6, 8), (305, 99, 3, 0)]
    assert np.array_equal(decode_image(tiff(GREY.tobytes(), WIDTH, HEIGHT, *odd)).pixels[:, :, 0], GREY)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    first, second = (Image.new("RGB", (8, 6), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(first, kind, save_all=True, append_images=[second] * 20, **options)
    with Image.open(BytesIO(data)) as check:
        assert getattr(check, "n_frames", 1) > 1
    assert np.array_equal(decode_image(data).pixels, np.asarray(first))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_limits(kind: str) -> None:
    data = encode(picture(), kind)
    decode_image(data, ImageLimits(len(data), WIDTH * HEIGHT))
    for read in (read_header, decode_image):
        with pytest.raises(ImageTooLargeError, match=f"has {len(data)} bytes; at most {len(data) - 1} are"):
            read(data, ImageLimits(max_bytes=len(data) - 1))
        with pytest.raises(ImageTooLargeError, match="24 x 16 = 384 pixels; at most 383 are"):
            read(data, ImageLimits(max_pixels=WIDTH * HEIGHT - 1))


def test_the_bytes_are_checked_before_the_format_and_the_format_before_the_pixels() -> None:
    with pytest.raises(ImageTooLargeError):
        decode_image(b"no image", ImageLimits(max_bytes=7))
    with pytest.raises(ImageUndecodableError):
        decode_image(b"no image", ImageLimits(max_pixels=0))
    with pytest.raises(ImageTooLargeError):  # its pixels are missing, but nobody gets to look for them
        decode_image(encode(picture(), "PNG")[:60], ImageLimits(max_pixels=10))


def test_the_process_wide_limits_of_pillow_neither_matter_nor_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)  # it would warn, and warnings are errors
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"):
        decode_image(encode(picture(), kind))
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == (WIDTH * HEIGHT - 1, False)


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "AVIF", "PDF", "EPS"])
def test_other_formats_are_refused(kind: str) -> None:
    data = encode(picture(), kind)
    for read in (read_header, decode_image):
        with pytest.raises(ImageUndecodableError, match="JPEG, PNG, WebP, TIFF, BMP and GIF are supported"):
            read(data)


@pytest.mark.parametrize(("data", "what"), [(b"", "is empty"), (b"<svg/>", "no image"), (bytes(1000), "no image")])
def test_what_is_no_image_is_refused(data: bytes, what: str) -> None:
    with pytest.raises(ImageUndecodableError, match=what):
        decode_image(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_truncated_files_are_refused(kind: str) -> None:
    data = encode(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8), kind)
    for part in (0.9, 0.5, 0.1):
        with pytest.raises(ImageUndecodableError):
            decode_image(data[: int(len(data) * part)])
    for size in range(25):
        with pytest.raises(ImageUndecodableError):
            read_header(data[:size])


def test_digests() -> None:
    digest = digest_of(b"abc")
    assert digest == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert is_digest(digest)
    for text in ("", digest[7:], digest.upper(), digest[:-1], digest + "0", digest + "\n", digest.replace("b", "g")):
        assert not is_digest(text)
    assert re.fullmatch("sha256:[0-9a-f]{64}", digest_of(b""))
