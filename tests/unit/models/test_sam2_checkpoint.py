"""Loading SAM 2: what is wrong with a checkpoint or a parameter is said; and a loaded model keeps no state."""

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from sam2.build_sam import build_sam2

from segrpc.service.errors import ModelLoadError
from segrpc.service.models.base import Decoded, DecodeRequest, Embedding
from segrpc.service.models.registry import create_model
from segrpc.service.models.sam2.catalog import VARIANTS, name_for_file
from segrpc.service.models.sam2.checkpoint import identify, read_checkpoint
from segrpc.service.models.sam2.model import Sam2
from segrpc.service.schemas import CompressedRLE, ModelDeploymentConfig
from tests.checkpoints import write_checkpoint
from tests.photos import load_array

TINY = "sam2.1-hiera-tiny"
PATCH_EMBED = "image_encoder.trunk.patch_embed.proj.weight"
WEIGHT = torch.zeros(96, 3, 7, 7)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SAM 2.1 tiny under a name that tells nothing."""
    folder = tmp_path_factory.mktemp("checkpoint")
    file = write_checkpoint(TINY, folder).rename(folder / "mine.pt")
    yield file
    file.unlink()


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Sam2:
    """The model, told from its weights."""
    made = sam2(checkpoint=checkpoint, device="cpu")
    made.load_model()
    return made


def sam2(model: str = "sam2", **params: Any) -> Sam2:
    made = create_model(ModelDeploymentConfig(name="mine", model=model, model_params=params))
    assert isinstance(made, Sam2)
    return made


def message_of(work: Callable[[], object]) -> str:
    with pytest.raises(ModelLoadError) as caught:
        work()
    return caught.value.message


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (
            {"colour": 1, "batch": 2},
            "model 'mine' does not understand batch, colour; it takes checkpoint, config, decoder, device",
        ),
        ({"dtype": "float64"}, "dtype 'float64' is unknown; give float32, bfloat16 or float16"),
        ({"dtype": ["float16"]}, "dtype ['float16'] of model 'mine' is no str"),
        ({"decoder": "slow"}, "decoder 'slow' is unknown; give fast or reference"),
        ({"encoder": "slow"}, "encoder 'slow' is unknown; give fast, reference or int8"),
        ({"device": "gpu"}, "device 'gpu' is unknown; give auto, cpu, cuda or cuda:N"),
        ({"device": "meta"}, "device 'meta' is not supported; give auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there: torch sees"),
        ({"device": 0.5}, "device 0.5 of model 'mine' is no str"),
        ({"threads": "two"}, "threads 'two' of model 'mine' is no int"),
        ({"threads": -1}, "threads -1 of model 'mine' is below 0"),
        ({"checkpoint": 3}, "checkpoint 3 of model 'mine' is no str"),
    ],
)
def test_a_wrong_parameter_is_explained_before_anything_is_loaded(params: dict[str, Any], said: str) -> None:
    assert said in message_of(lambda: sam2(**params))


def test_without_a_size_a_checkpoint_is_needed() -> None:
    assert message_of(lambda: sam2().load_model()) == "model 'sam2' needs a checkpoint file"


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    said = message_of(lambda: sam2(checkpoint=tmp_path).load_model())
    assert said.startswith(f"checkpoint {str(tmp_path)!r} is not a file; give the path of a .pt file")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\3\4 no archive",
        b"\x80\x02.",
        b"\x80\x02}X\x05\0\0\0modelK\x01s.",
        pickle.dumps({"model": [1, 2]})[:-4],
        pickle.dumps(print),
    ],
    ids=["empty", "archive", "empty-pickle", "not-weights", "cut-pickle", "global"],
)
def test_what_is_no_checkpoint_is_refused_in_one_way(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "mine.pt"
    file.write_bytes(data)
    said = message_of(lambda: read_checkpoint(file))
    assert said.startswith(f"checkpoint {str(file)!r} ")
    assert "\n" not in said


def test_damage_anywhere_near_the_start_is_an_error_of_ours_or_harmless(tmp_path: Path) -> None:
    file, rng = tmp_path / "mine.pt", np.random.default_rng(0)
    torch.save({"model": {PATCH_EMBED: torch.zeros(2, 3, 7, 7)}}, file, _use_new_zipfile_serialization=False)
    whole, refused = file.read_bytes(), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for at in rng.integers(0, 600, 3):
            damaged[at] = rng.integers(0, 256)
        file.write_bytes(damaged)
        try:
            read_checkpoint(file)
        except ModelLoadError:
            refused += 1
    assert refused > 75


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, zipped: bool) -> None:
    file, trace = tmp_path / "mine.pt", tmp_path / "trace"
    content = {"model": {PATCH_EMBED: WEIGHT, "other": Touch(trace)}}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    torch.load(file, weights_only=False)
    assert trace.exists()  # it would have
    trace.unlink()
    assert "cannot be read" in message_of(lambda: read_checkpoint(file))
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        WEIGHT,
        {PATCH_EMBED: WEIGHT},
        {"model": WEIGHT},
        {"model": {"weight": WEIGHT}},
        {"model": {PATCH_EMBED: 1}},
        {"model": {PATCH_EMBED: torch.tensor(1.0)}},
        {"model": {PATCH_EMBED: WEIGHT, 1: WEIGHT}},
        {"model": {PATCH_EMBED: WEIGHT, "epoch": 3}},
    ],
)
def test_other_weights_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "mine.pt")
    for name in ("sam2", TINY):
        said = message_of(lambda name=name: sam2(name, checkpoint=str(tmp_path / "mine.pt")).load_model())  # type: ignore[misc]
        assert said.endswith("has no SAM 2 weights under the key 'model'")


def test_a_size_that_was_never_published_needs_its_config(tmp_path: Path) -> None:
    file = tmp_path / "mine.pt"
    torch.save({"model": {PATCH_EMBED: WEIGHT}}, file)
    said = message_of(lambda: sam2(checkpoint=file).load_model())
    assert said == f"checkpoint {str(file)!r} is of no published size: give its config"
    said = message_of(lambda: sam2(checkpoint=file, config=VARIANTS[TINY].config).load_model())
    assert "does not fit the configuration" in said
    assert "look like" not in said


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.large if name.endswith("large") else ()) for name in VARIANTS]
)
def test_every_published_size_is_told_from_its_weights(name: str) -> None:
    state = build_sam2(VARIANTS[name].config, ckpt_path=None, device="cpu").state_dict()
    assert identify(state) is VARIANTS[name]


def test_the_size_is_told_under_another_file_name(model: Sam2, checkpoint: Path) -> None:
    assert name_for_file(checkpoint) is None
    assert identify(read_checkpoint(checkpoint)) is VARIANTS[TINY]
    metadata = model.metadata
    assert (metadata.family, metadata.input_size, metadata.mask_size) == ("sam2", 1024, 256)
    assert metadata.device == "cpu"


def test_a_config_that_does_not_exist_is_named(checkpoint: Path) -> None:
    said = message_of(lambda: sam2(checkpoint=checkpoint, config="configs/none.yaml").load_model())
    assert said.startswith("the SAM 2 configuration 'configs/none.yaml' cannot be built: ")
    assert "\n" not in said


@pytest.mark.parametrize("version", ["sam2-hiera-tiny", "sam2.1-hiera-small"])
def test_a_checkpoint_of_another_size_says_which_it_is(checkpoint: Path, version: str) -> None:
    config = VARIANTS[version].config
    for made in (sam2(version, checkpoint=checkpoint), sam2(checkpoint=checkpoint, config=config)):
        said = message_of(made.load_model)
        assert said.startswith(f"checkpoint {str(checkpoint)!r} does not fit the configuration {config!r}; ")
        assert f"its weights look like {TINY}" in said


def request(embedding: Embedding, x: float, y: float) -> DecodeRequest:
    """A click and a box around it."""
    box = np.array([x - 50, y - 40, x + 60, y + 70], dtype=np.float32)
    return DecodeRequest(embedding, np.array([[x, y]], np.float32), np.array([1], np.int32), box, None, 3)


Answer = tuple[Decoded, list[CompressedRLE]]


def answer(model: Sam2, one: DecodeRequest) -> Answer:
    (decoded,) = model.decode([one])
    return decoded, model.to_masks(decoded, one.embedding.width, one.embedding.height)


def same(one: Decoded, other: Decoded) -> bool:
    logits, scores = np.array_equal(one.logits, other.logits), np.array_equal(one.scores, other.scores)
    return logits and scores and one.object_score == other.object_score


def test_threads_on_different_images_get_what_each_gets_alone(model: Sam2) -> None:
    alone: list[tuple[DecodeRequest, Answer]] = []
    for name in ("chelsea", "coffee"):
        embedding = model.embed(load_array(name))
        for x, y in ((120, 90), (200, 150)):
            one = request(embedding, x, y)
            alone.append((one, answer(model, one)))
    assert not same(alone[0][1][0], alone[2][1][0])
    together = Barrier(3)

    def ask(order: list[int]) -> list[tuple[int, Answer]]:
        together.wait()
        return [(i, answer(model, alone[i][0])) for i in order]

    def encode() -> Embedding:
        together.wait()
        return model.embed(load_array("chelsea"))

    with ThreadPoolExecutor(3) as pool:
        encoded = pool.submit(encode)
        for answers in pool.map(ask, ([0, 1, 0, 1], [2, 3, 2, 3])):
            for i, (decoded, masks) in answers:
                assert same(decoded, alone[i][1][0])
                assert masks == alone[i][1][1]
        assert same(answer(model, request(encoded.result(), 120, 90))[0], alone[0][1][0])
    for decoded, (_, (expected, _)) in zip(model.decode([one for one, _ in alone]), alone, strict=True):
        assert same(decoded, expected)
