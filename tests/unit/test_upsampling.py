import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from torch.nn import functional

from segrpc.service import rle
from segrpc.service.models.sam2 import masks
from segrpc.service.rle import runs_of_mask
from segrpc.service.upsampling import Taps, linear_taps, runs_above_zero, runs_of_logits

Float32Array = npt.NDArray[np.float32]


def smooth(random: np.random.Generator, size: int, cells: int) -> Float32Array:
    """Noise of so many cells, stretched: blobs."""
    noise = torch.from_numpy(random.standard_normal((1, 1, cells, cells)).astype(np.float32))
    return functional.interpolate(noise, (size, size), mode="bicubic", align_corners=False)[0, 0].numpy()


KINDS: dict[str, Callable[[np.random.Generator, int], Float32Array]] = {
    "rough": lambda random, size: random.standard_normal((size, size)).astype(np.float32),
    "smooth": lambda random, size: smooth(random, size, max(2, size // 12)),
    "very smooth": lambda random, size: smooth(random, size, 3),
    "exact zeros": lambda random, size: np.where(
        random.random((size, size)) < 0.5, 0, random.standard_normal((size, size))
    ).astype(np.float32),
    "few values": lambda random, size: random.integers(-2, 3, (size, size)).astype(np.float32),
    "tiny values": lambda random, size: (random.standard_normal((size, size)) * 1e-30).astype(np.float32),
    "one point": lambda random, size: (
        np.where(np.arange(size**2) == random.integers(size**2), 3.0, -5.0).reshape(size, size).astype(np.float32)
    ),
    "nothing": lambda random, size: np.full((size, size), -1, np.float32),
    "zero": lambda random, size: np.zeros((size, size), np.float32),
    "everything": lambda random, size: np.full((size, size), 1, np.float32),
}
SIZES = [(1, 1), (1, 9), (9, 1), (48, 64), (255, 257), (256, 256), (1080, 1920), (333, 2000), (4000, 30), (30, 4000)]


def dense(logits: Float32Array, height: int, width: int) -> npt.NDArray[np.bool_]:
    """The mask as the reference makes it."""
    tensor = torch.from_numpy(logits)[None, None]
    upsampled = functional.interpolate(tensor, (height, width), mode="bilinear", align_corners=False)
    return (upsampled[0, 0] > 0.0).numpy()


def assert_same(logits: Float32Array, height: int, width: int) -> None:
    mask = dense(logits, height, width)
    (runs,) = masks.mask_runs(torch.from_numpy(logits)[None], height, width)
    counts = coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]
    assert rle.compress(runs) == counts
    np.testing.assert_array_equal(runs, rle.run_lengths(counts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_runs_are_those_of_the_dense_mask(kind: str, size: tuple[int, int]) -> None:
    assert_same(KINDS[kind](np.random.default_rng(5), 256), *size)


@pytest.mark.parametrize("size", [(2160, 3840), (4320, 7680)], ids=str)
def test_large_masks(size: tuple[int, int]) -> None:
    assert_same(KINDS["smooth"](np.random.default_rng(6), 256), *size)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([2, 16, 64, 256]),
    height=st.integers(1, 700),
    width=st.integers(1, 700),
)
def test_runs_of_any_size(kind: str, seed: int, size: int, height: int, width: int) -> None:
    assert_same(KINDS[kind](np.random.default_rng(seed), size), height, width)


def test_several_masks_keep_their_order() -> None:
    random = np.random.default_rng(7)
    logits = np.stack([KINDS[kind](random, 256) for kind in ("smooth", "nothing", "rough")])
    found = masks.mask_runs(torch.from_numpy(logits), 300, 451)
    for one, runs in zip(logits, found, strict=True):
        np.testing.assert_array_equal(runs, runs_of_mask(dense(one, 300, 451)))


@pytest.mark.parametrize("together", [1, 2, 100])
def test_what_a_gpu_does(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(masks, "_PIXELS_AT_A_TIME", together * 333 * 500)
    # Each kind beside each other one: where one mask ends and the next begins is no change of either.
    random = np.random.default_rng(8)
    logits = np.stack([KINDS[kind](random, 256) for pair in itertools.product(KINDS, KINDS) for kind in pair])
    found = masks.dense_mask_runs(torch.from_numpy(logits), 333, 500)
    assert len(found) == len(logits)
    for one, runs in zip(logits, found, strict=True):
        np.testing.assert_array_equal(runs, runs_of_mask(dense(one, 333, 500)))


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"exact zeros", "few values"}))
def test_without_torch_the_runs_are_the_same(kind: str) -> None:
    # Where sums are exactly zero, torch may round otherwise: it multiplies and adds in one step.
    logits = KINDS[kind](np.random.default_rng(9), 256)
    for height, width in SIZES:
        np.testing.assert_array_equal(
            runs_above_zero(logits, height, width), runs_of_mask(dense(logits, height, width))
        )


def test_a_mask_of_the_logits_size_is_their_sign() -> None:
    logits = KINDS["rough"](np.random.default_rng(10), 64)
    np.testing.assert_array_equal(runs_above_zero(logits, 64, 64), runs_of_mask(logits > 0))


def test_the_last_bit_of_a_rounding_is_not_guessed() -> None:
    # Half-way down, 0.625 a and 0.375 b are equal as rounded, and cancel; with one rounding less something is left.
    a, b = np.float32(0.005), np.float32(0.008333333)
    assert a * np.float32(0.625) == b * np.float32(0.375)
    assert float(a) * 0.625 > float(b) * 0.375
    across, down = Taps.of(*linear_taps(2, 2), 2), Taps.of(*linear_taps(2, 8), 2)
    assert runs_of_logits(np.array([[a, a], [-b, -b]], np.float32), across, down, lambda rows: rows) is None
