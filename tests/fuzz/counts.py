"""Compressed counts: what is accepted comes back, and means to pycocotools what it means to us.

The first byte chooses the height among the divisors of what the runs sum to; the rest is the counts.
"""

import io
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from segrpc.service import rle
from segrpc.service.schemas import CompressedRLE

MAX_DENSE = 2**16  # pixels that are compared one by one
_SEVEN_GROUPS = re.compile(rb"[P-o]{6}")  # no encoder writes a run so long, and pycocotools computes with 32 bits there


def run(data: bytes) -> None:
    """Decompress, compress and compare."""
    if not data:
        return
    counts = data[1:]
    try:
        runs = rle.run_lengths(counts)
    except ValueError:
        return
    total = int(runs.sum())
    if total > rle.MAX_PIXELS:
        with pytest.raises(ValueError, match="at most"):
            rle.compress(runs)
        return
    canonical = rle.compress(runs)
    np.testing.assert_array_equal(rle.run_lengths(canonical), runs)
    height = next(h for h in range(1 + data[0], 0, -1) if total % h == 0)
    width = total // height
    with pytest.raises(ValueError, match="sum to"):
        rle.checked_runs(counts, height, width + 1)
    if 0 < total <= MAX_DENSE:
        _compare(counts, canonical, height, width)


def _compare(counts: bytes, canonical: bytes, height: int, width: int) -> None:
    ours = CompressedRLE(size=(height, width), counts=counts)
    mask = ours.to_mask()
    theirs = {"size": [height, width], "counts": canonical}
    np.testing.assert_array_equal(coco.decode(theirs), mask)
    if not _SEVEN_GROUPS.search(counts):
        np.testing.assert_array_equal(coco.decode({**theirs, "counts": counts}), mask)
    assert ours.area == mask.sum() == coco.area(theirs)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(rle.to_png(counts, height, width)))), mask)
    assert CompressedRLE.model_validate_json(ours.model_dump_json()) == ours
    ys, xs = np.nonzero(mask)
    expected = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None
    assert ours.bounding_box == expected or _has_empty_runs(counts)


def _has_empty_runs(counts: bytes) -> bool:
    """Tell whether a run other than the first is empty: no encoder writes that, and the box may then be larger."""
    return not rle.run_lengths(counts)[1:].all()
