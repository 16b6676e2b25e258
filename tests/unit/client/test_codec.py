"""Python values to messages: shapes, one prompt or several, images of all kinds."""

import hashlib
import io
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from segrpc.client import codec
from segrpc.client.codec import TensorType
from segrpc.v1 import types_pb2
from segrpc.v1.types_pb2 import Box, Mask, Point, Prompt, RunLengths

FG, BG = types_pb2.POINT_LABEL_FOREGROUND, types_pb2.POINT_LABEL_BACKGROUND


def prompts(points: Any = None, labels: Any = None, boxes: Any = None, mask_input: Any = None) -> list[Prompt]:
    return codec.prompt_messages(points, labels, boxes, mask_input)


@pytest.mark.parametrize("points", [[(1, 2), (3, 4)], [[1, 2], [3, 4]], np.array([[1, 2], [3, 4]]), [[(1, 2), (3, 4)]]])
@pytest.mark.parametrize("labels", [[1, 0], np.array([1, 0])])
def test_one_prompt_needs_no_outer_level(points: Any, labels: Any) -> None:
    expected = Prompt(points=[Point(x=1, y=2, label=FG), Point(x=3, y=4, label=BG)])
    assert prompts(points, labels) == [expected]
    assert prompts(points, [labels]) == [expected]


def test_points_are_on_the_object_unless_told() -> None:
    assert prompts([(1, 2)]) == [Prompt(points=[Point(x=1, y=2, label=FG)])]


@pytest.mark.parametrize("boxes", [(1, 2, 3, 4), [[1, 2, 3, 4]], np.array([1, 2, 3, 4]), np.array([[1, 2, 3, 4]])])
def test_a_box(boxes: Any) -> None:
    assert prompts(boxes=boxes) == [Prompt(box=Box(x_min=1, y_min=2, x_max=3, y_max=4))]


def test_prompts_of_different_kinds() -> None:
    found = prompts(points=[[(1, 2)], []], labels=[[0], []], boxes=[None, (1, 2, 3, 4)])
    assert found == [
        Prompt(points=[Point(x=1, y=2, label=BG)]),
        Prompt(box=Box(x_min=1, y_min=2, x_max=3, y_max=4)),
    ]


def test_boxes_with_prompts_that_have_no_points() -> None:
    assert len(prompts(points=[[], []], labels=[[], []], boxes=[(1, 2, 3, 4), (1, 2, 3, 4)])) == 2
    assert len(prompts(points=[[]], labels=[[]], boxes=[(1, 2, 3, 4)])) == 1


@pytest.mark.parametrize("shape", [(256, 256), (1, 256, 256), (1, 1, 256, 256)])
def test_mask_input_of_one_prompt(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    (prompt,) = prompts(mask_input=array)
    assert list(prompt.mask_input.shape) == [1, 256, 256]
    assert codec.tensor_array(prompt.mask_input).tobytes() == array.tobytes()


def test_mask_input_of_several_prompts() -> None:
    array = np.zeros((2, 1, 256, 256), np.float32)
    assert len(prompts(points=[[(1, 2)], [(3, 4)]], mask_input=array)) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"points": [(1, 2, 3)]}, r"points\[0\] must be pairs"),
        ({"points": [(1, 2)], "labels": [1, 0]}, "labels has"),
        ({"points": [(1, 2)], "labels": [2]}, "neither 1"),
        ({"labels": [1]}, "without points"),
        ({"boxes": (1, 2, 3)}, r"boxes\[0\] must be"),
        ({"mask_input": np.zeros((3, 256, 256))}, "one candidate for each prompt"),
        ({"points": [[(1, 2)], [(3, 4)]], "boxes": (1, 2, 3, 4)}, "number of prompts differs"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prompts(**given)


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (4, 5, 4)])
def test_arrays_travel_without_loss(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(pixels(codec.load_image(array).data), array)
    np.testing.assert_array_equal(pixels(codec.load_image(Image.fromarray(array)).data), array)


def test_a_pil_image_is_sent_as_its_pixels_stand() -> None:
    image = Image.new("RGB", (4, 2))
    image.getexif()[0x0112] = 6
    sent = Image.open(io.BytesIO(codec.load_image(image).data))
    assert sent.size == (4, 2)
    assert 0x0112 not in sent.getexif()


def test_files_travel_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "photo.bin"
    file.write_bytes(b"anything")
    for given in (file, str(file), b"anything", bytearray(b"anything")):
        loaded = codec.load_image(given)  # type: ignore[arg-type]
        assert loaded.data == b"anything"
        assert loaded.digest == f"sha256:{hashlib.sha256(b'anything').hexdigest()}"


def test_names_are_left_to_the_server() -> None:
    for uri in ("file:///a.png", "https://example.org/a.png", "HTTP://example.org/a.png", "data:image/png;base64,AAAA"):
        assert codec.image_message(codec.load_image(uri)) == types_pb2.Image(uri=uri)
    digest = f"sha256:{'0' * 64}"
    assert codec.image_message(codec.load_image(digest)) == types_pb2.Image(digest=digest)


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 2), np.float32), np.zeros((2, 2, 2), np.uint8), np.zeros((0, 2, 3), np.uint8), 7, None]
)
def test_what_is_no_image_is_refused(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="image"):
        codec.load_image(wrong)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_come_back_bit_for_bit(dtype: Any) -> None:
    array = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(dtype)
    again = codec.tensor_array(codec.tensor_message(array))
    assert again.dtype == array.dtype
    assert again.tobytes() == array.tobytes()
    assert again.shape == array.shape


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        codec.data_type("float64")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="jpeg"):
        codec.mask_encoding("jpeg")  # type: ignore[arg-type]


def test_the_types_have_numbers() -> None:
    names: tuple[TensorType, ...] = ("float32", "float16", "bfloat16")
    assert len({codec.data_type(name) for name in names}) == 3


def test_a_mask_in_each_encoding() -> None:
    from segrpc.client.codec import _mask

    expected = np.array([[False, True], [True, True], [False, False]])
    runs = [1, 1, 1, 2, 1]
    file = io.BytesIO()
    Image.fromarray(expected).save(file, "PNG")
    for message in (
        Mask(height=3, width=2, run_lengths=RunLengths(lengths=runs)),
        Mask(height=3, width=2, png=file.getvalue()),
    ):
        mask = _mask(message)
        np.testing.assert_array_equal(mask.array, expected)
        again = _mask(Mask(height=3, width=2, coco_rle=mask.rle["counts"]))
        np.testing.assert_array_equal(again.array, expected)
        assert again.rle == mask.rle
