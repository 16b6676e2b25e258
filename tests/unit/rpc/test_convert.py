"""Messages to inputs: field paths, and that nothing is lost on the way."""

import numpy as np
import pytest

from segrpc.service.rpc import convert
from segrpc.v1.segmentation_service_pb2 import SegmentRequest
from segrpc.v1.types_pb2 import DATA_TYPE_FLOAT16, DATA_TYPE_FLOAT32, Box, OutputOptions, Point, Prompt, Tensor


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("points[0][2][0]", "prompts[0].points[2].x"),
        ("points[3][1][1]", "prompts[3].points[1].y"),
        ("points[3][1]", "prompts[3].points[1]"),
        ("points[3]", "prompts[3]"),
        ("points", "prompts"),
        ("labels[1][2]", "prompts[1].points[2].label"),
        ("labels[1]", "prompts[1]"),
        ("boxes[2][3]", "prompts[2].box.y_max"),
        ("boxes[2]", "prompts[2].box"),
        ("mask_input.data", "prompts[0].mask_input.data"),
        ("num_multimask_outputs", "output.num_multimask_outputs"),
        ("image_embedding.shape", "image_embedding.shape"),
        ("image", "image"),
    ],
)
def test_paths_in_the_requests_terms(path: str, expected: str) -> None:
    assert convert.request_path(path) == expected


def test_columns_are_filled_from_prompts() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 1, 256, 256)).astype("<f4")
    prompts = [
        Prompt(points=[Point(x=1.5, y=2, label=1), Point(x=3, y=4, label=2)]),  # type: ignore[arg-type]
        Prompt(box=Box(x_min=1, y_min=2, x_max=3, y_max=4)),
    ]
    for prompt, array in zip(prompts, logits, strict=True):
        prompt.mask_input.CopyFrom(Tensor(dtype=DATA_TYPE_FLOAT32, shape=array.shape, data=array.tobytes()))
    output = OutputOptions(multimask_output=False, return_logits=True)
    converted = convert.segmentation_input(SegmentRequest(prompts=prompts, output=output), b"image")
    assert converted.image == b"image"
    assert converted.points == [[[1.5, 2], [3, 4]], []]
    assert converted.labels == [[1, 0], []]
    assert converted.boxes == [None, [1, 2, 3, 4]]
    assert converted.mask_input is not None
    np.testing.assert_array_equal(converted.mask_input.to_numpy(), logits)
    assert (converted.multimask_output, converted.num_multimask_outputs, converted.return_logits) == (False, 3, True)


def test_mask_inputs_of_16_bits_are_widened_exactly() -> None:
    array = np.random.default_rng(0).normal(size=(1, 8, 8)).astype(np.float16)
    prompt = Prompt(mask_input=Tensor(dtype=DATA_TYPE_FLOAT16, shape=array.shape, data=array.tobytes()))
    converted = convert.segmentation_input(SegmentRequest(prompts=[prompt, prompt]), b"image")
    assert converted.mask_input is not None
    np.testing.assert_array_equal(converted.mask_input.to_numpy(), np.stack([array, array]).astype(np.float32))
