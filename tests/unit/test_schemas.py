"""The pydantic types: what they accept, what they refuse and where they say it was."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from segrpc.service.schemas import (
    CompressedRLE,
    FloatType,
    ModelDeploymentConfig,
    NDArrayFloat,
    SegmentationInput,
    SegmentationOutput,
    violations_of,
)

CLICK: dict[str, Any] = {"image": b"x", "points": [[[1.0, 2.0]]], "labels": [[1]]}


def fields_of(**data: Any) -> list[str]:
    """Return the paths of what is wrong with an input."""
    with pytest.raises(ValidationError) as caught:
        SegmentationInput(**data)
    return [violation.field for violation in violations_of(caught.value)]


@given(
    hnp.arrays(
        np.float32, hnp.array_shapes(max_dims=4), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
)
def test_float32_comes_back_bit_for_bit(array: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    value = NDArrayFloat.from_numpy(array)
    assert value.shape == array.shape
    assert value.to_numpy().tobytes() == array.tobytes()
    assert NDArrayFloat.model_validate_json(value.model_dump_json()) == value


@pytest.mark.parametrize(("dtype", "exact"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_16_bits_round_once(dtype: FloatType, exact: Any) -> None:
    array = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    value = NDArrayFloat.from_numpy(array, dtype)
    assert len(value.data) == 2 * array.size
    np.testing.assert_array_equal(value.to_numpy(), array.astype(exact).astype(np.float32))
    assert NDArrayFloat.from_numpy(value.to_numpy(), dtype) == value


@pytest.mark.parametrize(
    ("data", "shape"),
    [(b"1234", (2,)), (b"12345", (1,)), (b"", (1,)), (b"", (0,)), (b"1234", (1,) * 9), (b"1234", (2**62, 2**62))],
)
def test_data_must_fit_the_shape(data: bytes, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError):
        NDArrayFloat(data=data, shape=shape)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_must_be_finite(number: float) -> None:
    with pytest.raises(ValidationError, match="NaN or infinite"):
        NDArrayFloat.from_numpy(np.array([1.0, number]))


def test_what_overflows_16_bits_is_refused() -> None:
    with pytest.raises(ValidationError, match="NaN or infinite"):
        NDArrayFloat.from_numpy(np.array([1e6]), "float16")


def test_a_numpy_array_is_accepted_where_one_is_expected() -> None:
    mask_input = np.zeros((1, 1, 256, 256), np.float32)
    given_input = SegmentationInput(**CLICK, mask_input=mask_input)  # type: ignore[arg-type]
    assert given_input.mask_input is not None
    assert given_input.mask_input.shape == mask_input.shape


def test_rle_of_a_mask_and_back() -> None:
    mask = np.random.default_rng(0).random((7, 9)) < 0.5
    compressed = CompressedRLE.from_mask(mask)
    assert compressed.size == (7, 9)
    np.testing.assert_array_equal(compressed.to_mask(), mask)
    again = CompressedRLE.model_validate_json(compressed.model_dump_json())
    assert again == compressed
    assert compressed.model_dump(mode="json") == {"size": [7, 9], "counts": compressed.counts.decode()}


@pytest.mark.parametrize("counts", [b"", b"63", "\u20ac"])
def test_rle_must_fill_its_size(counts: bytes | str) -> None:
    with pytest.raises(ValidationError):
        CompressedRLE(size=(2, 2), counts=counts)  # type: ignore[arg-type]


def test_points_without_labels_are_on_the_object() -> None:
    assert SegmentationInput(image=b"x", points=[[[1, 2], [3, 4]], []], boxes=[None, [0, 0, 1, 1]]).labels == [
        [1, 1],
        [],
    ]


def test_prompts_may_differ_in_kind() -> None:
    mixed = SegmentationInput(image=b"x", points=[[[1, 2]], []], labels=[[0], []], boxes=[None, [0, 0, 5, 5]])
    assert mixed.num_prompts == 2


@pytest.mark.parametrize(
    ("data", "fields"),
    [
        ({"points": [[[1, 2]]]}, ["image"]),
        ({"image": b"x"}, ["points"]),
        ({"image": b"x", "points": [[[1, 2]]], "labels": [[1, 0]]}, ["labels[0]"]),
        ({"image": b"x", "points": [[[1, 2]]], "labels": [[1], [1]]}, ["labels"]),
        ({"image": b"x", "points": [[[1, 2]]], "labels": [[2]]}, ["labels[0][0]"]),
        ({"image": b"x", "labels": [[1]], "boxes": [[0, 0, 1, 1]]}, ["labels"]),
        ({"image": b"x", "points": [[[1, 2, 3]]]}, ["points[0][0]"]),
        ({"image": b"x", "points": [[[1, float("nan")]], [[float("inf"), 1]]]}, ["points[0][0][1]", "points[1][0][0]"]),
        ({"image": b"x", "points": [[[-1, 1]]]}, ["points[0][0][0]"]),
        ({"image": b"x", "points": [[[1, 2]], []]}, ["points[1]"]),
        ({"image": b"x", "boxes": [[3, 0, 1, 1]]}, ["boxes[0]"]),
        ({"image": b"x", "boxes": [[0, 0, 1]]}, ["boxes[0]"]),
        ({"image": b"x", "boxes": [[0, 0, 1, 1]], "points": [[], []]}, ["boxes"]),
        ({**CLICK, "mask_input": np.zeros((1, 3, 256, 256))}, ["mask_input"]),
        ({**CLICK, "mask_input": np.zeros((2, 1, 256, 256))}, ["mask_input"]),
        ({**CLICK, "image_embedding": np.zeros((1, 2))}, ["high_resolution_features"]),
        ({**CLICK, "high_resolution_features": [np.zeros((1, 2))]}, ["image_embedding"]),
        ({**CLICK, "num_multimask_outputs": 0}, ["num_multimask_outputs"]),
        ({**CLICK, "reset_predictor": False}, ["image"]),
        ({**CLICK, "color": 1}, ["color"]),
    ],
)
def test_what_is_wrong_is_named(data: dict[str, Any], fields: list[str]) -> None:
    assert fields_of(**data) == fields


def test_coordinates_beyond_the_image_are_found() -> None:
    checked = SegmentationInput(image=b"x", points=[[[10, 20], [10.5, 20]], [[1, 21]]], boxes=[None, [0, 0, 11, 30]])
    found = [violation.field for violation in checked.violations_in(width=10, height=20)]
    assert found == ["points[0][1][0]", "points[1][0][1]", "boxes[1][2]", "boxes[1][3]"]


def test_an_output_has_as_many_scores_as_masks() -> None:
    mask = CompressedRLE.from_mask(np.ones((2, 2)))
    with pytest.raises(ValidationError):
        SegmentationOutput(masks=[[mask]], scores=NDArrayFloat.from_numpy(np.ones((1, 2))))
    with pytest.raises(ValidationError):
        SegmentationOutput(masks=[[mask], []], scores=NDArrayFloat.from_numpy(np.ones((2, 1))))
    with pytest.raises(ValidationError):
        SegmentationOutput(masks=[[mask]])


def test_a_deployment_is_registered_under_its_own_name_unless_told() -> None:
    assert ModelDeploymentConfig(name="a").registered_name == "a"
    assert ModelDeploymentConfig(name="a", model="b").registered_name == "b"
