"""Overlays: colours where masks and prompts are, the photo elsewhere."""

import numpy as np
import pytest
from PIL import Image

from segrpc.client import Mask
from segrpc.client.render import overlay


def mask_of(array: np.ndarray) -> Mask:
    runs = np.diff(np.flatnonzero(np.diff(array.ravel(order="F"), prepend=0, append=2)), prepend=0)
    height, width = array.shape
    return Mask(height, width, 1.0, int(array.sum()), None, "run_lengths", runs.astype(np.uint32))


@pytest.mark.parametrize("size", [(64, 48), (1920, 1080)])
def test_a_mask_is_tinted_and_outlined(size: tuple[int, int]) -> None:
    width, height = size
    array = np.zeros((height, width), np.uint8)
    array[height // 4 : height // 2, width // 4 : width // 2] = 1
    photo = Image.new("RGB", size, (128, 128, 128))
    drawn = np.asarray(overlay(photo, [mask_of(array)]))
    assert drawn.shape == (height, width, 3)
    inside, edge, far = drawn[height // 3, width // 3], drawn[height // 4 - 1, width // 3], drawn[-1, -1]
    assert far.tolist() == [128, 128, 128]
    assert inside.tolist() != far.tolist()
    assert edge.tolist() not in (inside.tolist(), far.tolist())


def test_prompts_are_drawn() -> None:
    photo = np.full((100, 100, 3), 128, np.uint8)
    drawn = np.asarray(overlay(photo, [], points=[(20, 20), (80, 80)], labels=[1, 0], boxes=(40, 40, 60, 60)))
    red, green = drawn[80, 80].astype(int), drawn[20, 20].astype(int)
    assert green[1] > green[0] + 50
    assert red[0] > red[1] + 50
    assert drawn[40, 50].tolist() != [128, 128, 128]
    assert drawn[50, 50].tolist() == [128, 128, 128]


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="10 x 20"):
        overlay(Image.new("RGB", (20, 10)), [mask_of(np.zeros((20, 10), np.uint8))])


def test_tiny_and_empty_things_are_drawn() -> None:
    empty = mask_of(np.zeros((1, 1), np.uint8))
    assert overlay(Image.new("L", (1, 1)), [empty], points=[(0, 0)], boxes=(0, 0, 1, 1)).size == (1, 1)
