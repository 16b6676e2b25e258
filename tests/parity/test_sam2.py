"""Masks over gRPC are the reference's, bit for bit: float32 on the CPU, one prompt at a time in the reference."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from segrpc.client import SegmentationClient, SegmentationResult
from segrpc.service.models.sam2.catalog import VARIANTS
from tests.checkpoints import write_checkpoint
from tests.parity.conftest import Pair
from tests.parity.reference import Prompt
from tests.photos import load_image
from tests.server_process import ServerProcess

# Name, width, height, mode; portrait and grey are cases of their own.
IMAGES = {
    "tiny": (64, 48, "RGB"),
    "square": (1024, 1024, "RGB"),
    "full-hd": (1920, 1080, "RGB"),
    "4k": (3840, 2160, "RGB"),
    "portrait": (600, 900, "RGB"),
    "grey": (640, 480, "L"),
}


def prompts_for(width: int, height: int) -> dict[str, Prompt]:
    """Return one prompt of each kind, with fractions of pixels and the image's very edges among the coordinates."""
    w, h = float(width), float(height)
    box = (0.21 * w, 0.13 * h, 0.83 * w, 0.77 * h)
    return {
        "one point": Prompt(points=((0.52 * w, 0.41 * h),), labels=(1,)),
        "several points": Prompt(points=((0.3 * w, 0.4 * h), (w, h), (0.6 * w, 0.5 * h)), labels=(1, 1, 1)),
        "negative points": Prompt(points=((0.5 * w, 0.5 * h), (0.1 * w, 0.2 * h), (0, 0)), labels=(1, 0, 0)),
        "box": Prompt(box=box),
        "box and points": Prompt(points=((0.5 * w, 0.4 * h), (0.25 * w, 0.7 * h)), labels=(1, 0), box=box),
    }


def ask(pair: Pair, image: object, prompts: list[Prompt], *, multimask: bool, **options: object) -> SegmentationResult:
    """Ask the service for all prompts in one call."""
    return pair.client.segment(
        image,  # type: ignore[arg-type]
        points=[list(p.points) for p in prompts],
        labels=[list(p.labels) for p in prompts],
        boxes=[p.box for p in prompts],
        multimask_output=multimask,
        return_logits=True,
        **options,  # type: ignore[arg-type]
    )


def assert_same(
    pair: Pair,
    result: SegmentationResult,
    prompts: list[Prompt],
    *,
    multimask: bool,
    mask_inputs: npt.NDArray[np.float32] | None = None,
) -> None:
    """Compare counts byte for byte, and logits and scores bit for bit, with the reference."""
    assert len(result.predictions) == len(prompts)
    assert result.logits is not None
    for i, prompt in enumerate(prompts):
        answer = pair.reference.predict(prompt, multimask, None if mask_inputs is None else mask_inputs[i])
        assert [mask.rle["counts"] for mask in result.predictions[i].masks] == answer.counts
        np.testing.assert_array_equal(result.logits[i], answer.logits)
        np.testing.assert_array_equal(np.array(result.predictions[i].scores, dtype=np.float32), answer.scores)


@pytest.fixture(scope="module")
def pair(make_pair: Callable[..., Pair]) -> Pair:
    """SAM 2.1 tiny whose logits pass the clamp, so that masks made of clamped logits would be found out."""
    return make_pair("sam2.1-hiera-tiny", contrast=150.0)


@dataclass(frozen=True)
class Photo:
    """A photo as a PNG file, and its width and height."""

    file: bytes
    size: tuple[int, int]


@pytest.fixture(scope="module", params=IMAGES, ids=list(IMAGES))
def photo(request: pytest.FixtureRequest, pair: Pair) -> Photo:
    """A photo at one of the sizes, set in the reference."""
    width, height, mode = IMAGES[request.param]
    image = load_image("chelsea").resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    pair.reference.set_image(np.array(image.convert("RGB")))
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return Photo(file.getvalue(), image.size)


@pytest.mark.parametrize("multimask", [True, False], ids=["multimask", "single"])
@pytest.mark.parametrize("kind", list(prompts_for(1, 1)))
def test_each_kind_of_prompt(pair: Pair, photo: Photo, kind: str, multimask: bool) -> None:
    prompts = [prompts_for(*photo.size)[kind]]
    assert_same(pair, ask(pair, photo.file, prompts, multimask=multimask), prompts, multimask=multimask)


@pytest.mark.parametrize("kinds", [("one point", "one point"), tuple(prompts_for(1, 1))], ids=["equal", "ragged"])
def test_several_prompts_in_one_call(pair: Pair, photo: Photo, kinds: tuple[str, ...]) -> None:
    prompts = [prompts_for(*photo.size)[kind] for kind in kinds]
    assert_same(pair, ask(pair, photo.file, prompts, multimask=True), prompts, multimask=True)


def test_refinement_with_the_logits_of_an_earlier_mask(pair: Pair, photo: Photo) -> None:
    first = prompts_for(*photo.size)["one point"]
    logits = ask(pair, photo.file, [first], multimask=True).logits
    assert logits is not None
    for kind in ("negative points", "box and points"):
        prompts = [prompts_for(*photo.size)[kind]]
        chosen = logits[:, 1:2]
        result = ask(pair, photo.file, prompts, multimask=False, mask_input=chosen)
        assert_same(pair, result, prompts, multimask=False, mask_inputs=chosen)


def test_refinement_of_several_prompts(pair: Pair, photo: Photo) -> None:
    prompts = [prompts_for(*photo.size)[kind] for kind in ("one point", "box")]
    logits = ask(pair, photo.file, prompts, multimask=True).logits
    assert logits is not None
    chosen = logits[:, :1]
    result = ask(pair, photo.file, prompts, multimask=False, mask_input=chosen)
    assert_same(pair, result, prompts, multimask=False, mask_inputs=chosen)


def test_a_mask_alone_is_a_prompt(pair: Pair, photo: Photo) -> None:
    logits = ask(pair, photo.file, [prompts_for(*photo.size)["box"]], multimask=True).logits
    assert logits is not None
    chosen = logits[0, 2:3]
    result = pair.client.segment(photo.file, mask_input=chosen, return_logits=True, multimask_output=False)
    assert_same(pair, result, [Prompt()], multimask=False, mask_inputs=chosen[None])


def test_an_embedding_that_went_to_the_client_and_back(pair: Pair, photo: Photo) -> None:
    prompts = list(prompts_for(*photo.size).values())
    encoded = pair.client.encode(photo.file, return_image_embedding=True)
    assert encoded.embedding is not None
    result = ask(pair, photo.file, prompts, multimask=True, embedding=encoded.embedding)
    assert result.timing.embedding_cached
    assert_same(pair, result, prompts, multimask=True)


def test_the_clamp_is_exercised(pair: Pair, photo: Photo) -> None:
    logits = ask(pair, photo.file, [prompts_for(*photo.size)["one point"]], multimask=True).logits
    assert logits is not None
    assert np.abs(logits).max() == 32.0


# Versions 2 and 2.1 of a size have the same encoder, and their decoders are compared on the two small sizes.
ONLY_LOADED = ("sam2-hiera-base-plus", "sam2-hiera-large")


@pytest.mark.large
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("sam2.1-hiera-tiny", *ONLY_LOADED)])
def test_every_size_agrees(make_pair: Callable[..., Pair], name: str) -> None:
    pair = make_pair(name)
    assert [model.name for model in pair.client.models()] == [name]
    photo = load_image("coffee")
    pair.reference.set_image(np.array(photo))
    prompts = list(prompts_for(*photo.size).values())
    for multimask in (True, False):
        assert_same(pair, ask(pair, photo, prompts, multimask=multimask), prompts, multimask=multimask)


@pytest.mark.large
@pytest.mark.parametrize("name", ONLY_LOADED)
def test_every_size_loads(tmp_path: Path, name: str) -> None:
    checkpoint = write_checkpoint(name, tmp_path)
    with (
        ServerProcess("--checkpoint", str(checkpoint), log=tmp_path / "log") as server,
        SegmentationClient(server.target) as client,
    ):
        assert [model.name for model in client.models()] == [name]
