"""Run-length encoding against pycocotools and numpy."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco

from segrpc.service import rle

Mask = npt.NDArray[np.bool_]

masks = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40))


def encoded(mask: npt.NDArray[Any]) -> bytes:
    return rle.compress(rle.runs_of_mask(mask))


def dense(runs: npt.NDArray[np.int64], height: int, width: int) -> Mask:
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width, order="F")


@given(masks)
def test_counts_are_those_of_pycocotools_and_come_back(mask: Mask) -> None:
    counts = encoded(mask)
    assert counts == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    np.testing.assert_array_equal(rle.decode(counts, *mask.shape), mask)


@given(masks)
def test_run_lengths_describe_the_mask(mask: Mask) -> None:
    height, width = mask.shape
    runs = rle.run_lengths(encoded(mask))
    np.testing.assert_array_equal(dense(runs, height, width), mask)
    again = coco.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
    assert again["counts"] == encoded(mask)


@given(st.lists(st.integers(0, rle.MAX_PIXELS // 30), min_size=1, max_size=30))
def test_runs_come_back(runs: list[int]) -> None:
    assert rle.run_lengths(rle.compress(np.array(runs))).tolist() == runs


@pytest.mark.parametrize("runs", [[rle.MAX_PIXELS], [0, rle.MAX_PIXELS], [2**24, 2**24 - 1, 2**24, 2**24 - 1, 2]])
def test_the_longest_runs_come_back(runs: list[int]) -> None:
    assert rle.run_lengths(rle.compress(np.array(runs))).tolist() == runs


def test_more_pixels_than_pycocotools_has_room_for_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 67108864"):
        rle.compress(np.array([rle.MAX_PIXELS, 1]))


@given(masks)
def test_area_and_bounding_box(mask: Mask) -> None:
    runs = rle.runs_of_mask(mask)
    assert rle.area(runs) == mask.sum()
    box = rle.bounding_box(runs, len(mask))
    if not mask.any():
        assert box is None
    else:
        rows, columns = np.nonzero(mask)
        assert box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


@given(masks)
def test_png(mask: Mask) -> None:
    image = Image.open(io.BytesIO(rle.to_png(encoded(mask), *mask.shape)))
    assert image.mode == "1"
    np.testing.assert_array_equal(np.asarray(image), mask)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (b"", "no runs"),
        (b"\x00", "out of the range"),
        (b"0p", "out of the range"),
        (b"0Q", "cut off"),
        (b"4O", "negative"),
        (b"Q" * 20 + b"0", "too long"),
        (b"5", "sum to 5"),
    ],
)
def test_malformed_counts_are_refused(counts: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rle.decode(counts, 2, 2)


@given(st.binary(max_size=40))
def test_garbage_never_reaches_pycocotools(counts: bytes) -> None:
    try:
        mask = rle.decode(counts, 3, 5)
    except ValueError:
        return
    np.testing.assert_array_equal(mask, dense(rle.run_lengths(counts), 3, 5))


def test_any_number_but_zero_is_the_object() -> None:
    mask = np.array([[0, 2], [256, -1]])
    np.testing.assert_array_equal(rle.decode(encoded(mask), 2, 2), mask != 0)
