"""The classes that models subclass, tried on a model small enough to foresee its answers."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segrpc.service.errors import (
    CapabilityMissingError,
    ImageTooLargeError,
    ImageUndecodableError,
    InvalidFieldError,
    NoPredictorStateError,
    UriNotAllowedError,
)
from segrpc.service.images.decode import ImageLimits, RGBImage
from segrpc.service.images.sources import SourcePolicy
from segrpc.service.models.base import (
    Decoded,
    DecodeRequest,
    Embedding,
    InferenceModel,
    PromptableModel,
    assemble_output,
    check_capabilities,
    decode_requests,
)
from segrpc.service.schemas import (
    CompressedRLE,
    FloatType,
    ModelDeploymentConfig,
    ModelMetadata,
    NDArrayFloat,
    SegmentationInput,
)
from tests.unit.images.pictures import HEIGHT, WIDTH, encode, exif, picture

PNG = encode(picture(), "PNG")
SIDE = 4
EVERYTHING = ModelMetadata(mask_size=SIDE, mask_counts=(1, 3), mask_input=True, embeddings=True)
NOTHING = ModelMetadata(points=False, boxes=False)
CLICK: dict[str, Any] = {"image": PNG, "points": [[[3, 2]]]}


class Level(PromptableModel):
    """Candidate ``i`` is what is redder than ``50 * (i + 1)``; the number of clicks is the score, in tenths."""

    @property
    def metadata(self) -> ModelMetadata:
        return EVERYTHING

    def load_model(self) -> None:
        pass

    def embed(self, image: RGBImage) -> Embedding:
        red = image[:, :, 0].copy()
        return Embedding(image.shape[1], image.shape[0], red, red.nbytes)

    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        return [self._decode(request) for request in requests]

    def _decode(self, request: DecodeRequest) -> Decoded:
        levels = 50 * np.arange(1, request.num_masks + 1)
        logits = np.broadcast_to(levels[:, None, None], (request.num_masks, SIDE, SIDE)).astype(np.float32)
        self._red = request.embedding.features
        scores = np.full(request.num_masks, len(request.labels) / 10, dtype=np.float32)
        return Decoded(logits, scores, object_score=2.5)

    def to_masks(self, decoded: Decoded, width: int, height: int) -> list[CompressedRLE]:
        assert self._red.shape == (height, width)
        return [CompressedRLE.from_mask(self._red > level[0, 0]) for level in decoded.logits]

    def export_embedding(self, embedding: Embedding, dtype: FloatType) -> tuple[NDArrayFloat, list[NDArrayFloat]]:
        red = NDArrayFloat.from_numpy(embedding.features, dtype)
        return red, [red, red]

    def import_embedding(
        self, image_embedding: NDArrayFloat, high_resolution_features: list[NDArrayFloat], width: int, height: int
    ) -> Embedding:
        red = image_embedding.to_numpy()
        return Embedding(width, height, red, red.nbytes)


class Plain(Level):
    """The same, but its embeddings stay inside."""

    export_embedding = PromptableModel.export_embedding
    import_embedding = PromptableModel.import_embedding


CONFIG = ModelDeploymentConfig(name="level")


@pytest.fixture
def model() -> Level:
    return Level(CONFIG)


def embedding_of(width: int = WIDTH, height: int = HEIGHT) -> Embedding:
    return Level(CONFIG).embed(np.zeros((height, width, 3), dtype=np.uint8))


def mask_input(prompts: int = 1, side: int = SIDE) -> NDArrayFloat:
    values = np.arange(prompts * side * side, dtype=np.float32).reshape(prompts, 1, side, side)
    return NDArrayFloat.from_numpy(values)


@pytest.mark.parametrize(
    ("data", "missing"),
    [
        (CLICK, "points"),
        ({"image": PNG, "boxes": [[0, 0, 2, 2]]}, "boxes"),
        ({"image": PNG, "points": [[[1, 1]], []], "boxes": [None, [0, 0, 2, 2]]}, "points, boxes"),
        ({"image": PNG, "mask_input": mask_input()}, "mask_input"),
        ({"image": PNG, "return_image_embedding": True}, "embeddings"),
        ({"image": PNG, "return_image_embedding": True, "return_logits": True}, "embeddings, logits"),
    ],
)
def test_missing_capabilities_are_named(data: dict[str, Any], missing: str) -> None:
    with pytest.raises(CapabilityMissingError) as caught:
        check_capabilities(SegmentationInput(**data), NOTHING, "m")
    assert caught.value.message == f"model 'm' does not support {missing}"
    check_capabilities(SegmentationInput(**data), EVERYTHING, "m")


def test_a_given_embedding_needs_the_capability() -> None:
    tensor = NDArrayFloat.from_numpy(np.zeros((1, 1)))
    given = SegmentationInput(**CLICK, image_embedding=tensor, high_resolution_features=[tensor])
    with pytest.raises(CapabilityMissingError, match="embeddings"):
        check_capabilities(given, ModelMetadata(), "m")


def test_columns_that_no_prompt_uses_need_no_capability() -> None:
    unused = SegmentationInput(image=PNG, points=[[[1, 1]]], boxes=[None])
    check_capabilities(unused, ModelMetadata(boxes=False), "m")
    unused = SegmentationInput(image=PNG, points=[[]], boxes=[[0, 0, 1, 1]])
    check_capabilities(unused, ModelMetadata(points=False), "m")


@pytest.mark.parametrize(
    ("counts", "options", "said"),
    [
        ((1, 3), {"num_multimask_outputs": 2}, "model 'm' gives 1 or 3 masks for a prompt, not 2"),
        ((1,), {}, "model 'm' gives 1 masks for a prompt, not 3"),
        ((3,), {"multimask_output": False}, "model 'm' gives 3 masks for a prompt, not 1"),
        ((1,), {"multimask_output": False, "num_multimask_outputs": 3}, None),
        ((1, 3), {}, None),
        ((), {"num_multimask_outputs": 7}, None),
    ],
)
def test_the_number_of_masks(counts: tuple[int, ...], options: dict[str, Any], said: str | None) -> None:
    asked, metadata = SegmentationInput(**CLICK, **options), ModelMetadata(mask_counts=counts)
    if said is None:
        check_capabilities(asked, metadata, "m")
        return
    with pytest.raises(CapabilityMissingError) as caught:
        check_capabilities(asked, metadata, "m")
    assert caught.value.message == said


def test_without_prompts_the_number_of_masks_does_not_matter() -> None:
    only_embedding = SegmentationInput(image=PNG, return_image_embedding=True, num_multimask_outputs=2)
    check_capabilities(only_embedding, EVERYTHING, "m")


def test_a_mask_input_has_the_models_size() -> None:
    with pytest.raises(InvalidFieldError) as caught:
        check_capabilities(SegmentationInput(image=PNG, mask_input=mask_input(side=5)), EVERYTHING, "m")
    (violation,) = caught.value.violations
    assert violation.field == "mask_input"
    assert violation.description == "has shape [1, 5, 5] for a prompt; model 'm' takes [1, 4, 4]"


def test_an_input_is_split_into_its_prompts() -> None:
    embedding = embedding_of()
    asked = SegmentationInput(
        image=PNG,
        points=[[[1, 2], [3.5, 4]], [], [[0, 0]]],
        labels=[[1, 0], [], [0]],
        boxes=[None, [1, 2, 3, 4.5], [0, 0, 24, 16]],
        mask_input=mask_input(3),
    )
    first, second, third = decode_requests(asked, embedding, EVERYTHING, "m")
    assert (first.points.tolist(), first.labels.tolist(), first.box) == ([[1, 2], [3.5, 4]], [1, 0], None)
    assert (second.points.shape, second.labels.shape) == ((0, 2), (0,))
    assert second.box is not None
    assert second.box.tolist() == [1, 2, 3, 4.5]
    assert third.box is not None
    assert (third.points.tolist(), third.labels.tolist(), third.box.tolist()) == ([[0, 0]], [0], [0, 0, 24, 16])
    for i, request in enumerate((first, second, third)):
        assert request.embedding is embedding
        assert request.num_masks == 3
        assert [str(array.dtype) for array in (request.points, request.labels)] == ["float32", "int32"]
        assert request.mask_input is not None
        np.testing.assert_array_equal(request.mask_input, mask_input(3).to_numpy()[i])


def test_columns_may_be_absent() -> None:
    (by_box,) = decode_requests(
        SegmentationInput(image=PNG, boxes=[[0, 0, 1, 1]], multimask_output=False), embedding_of(), EVERYTHING, "m"
    )
    assert (by_box.points.shape, by_box.labels.shape, by_box.mask_input, by_box.num_masks) == ((0, 2), (0,), None, 1)
    (by_point,) = decode_requests(SegmentationInput(**CLICK), embedding_of(), EVERYTHING, "m")
    assert (by_point.labels.tolist(), by_point.box) == ([1], None)
    embedding_only = SegmentationInput(image=PNG, return_image_embedding=True)
    assert decode_requests(embedding_only, embedding_of(), EVERYTHING, "m") == []


def test_coordinates_are_checked_against_the_image() -> None:
    asked = SegmentationInput(image=PNG, points=[[[10, 20]], [[10.5, 20]]], boxes=[None, [0, 0, 1, 21]])
    with pytest.raises(InvalidFieldError) as caught:
        decode_requests(asked, embedding_of(10, 20), EVERYTHING, "m")
    assert [violation.field for violation in caught.value.violations] == ["points[1][0][0]", "boxes[1][3]"]


def test_capabilities_are_checked_with_the_image() -> None:
    with pytest.raises(CapabilityMissingError, match="does not support points"):
        decode_requests(SegmentationInput(**CLICK), embedding_of(), NOTHING, "m")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logits_are_clamped_and_all_that_was_asked_for_is_there(model: Level, dtype: FloatType) -> None:
    asked = SegmentationInput(**CLICK, return_logits=True, return_image_embedding=True)
    embedding = model.embed(picture())
    logits = np.linspace(-100, 100, 3 * SIDE * SIDE, dtype=np.float32).reshape(3, SIDE, SIDE)
    decoded = [Decoded(logits, np.array([0.1, 0.2, 0.3], dtype=np.float32), object_score=-1.5)]
    row = [CompressedRLE.from_mask(np.ones((HEIGHT, WIDTH)))] * 3
    output = assemble_output(model, asked, embedding, decoded, [row], dtype)
    assert output.masks == [row]
    assert output.mask_logits is not None
    assert (output.mask_logits.shape, output.mask_logits.dtype) == ((1, 3, SIDE, SIDE), dtype)
    clamped = np.clip(logits, -32, 32)[None]
    np.testing.assert_array_equal(output.mask_logits.to_numpy(), clamped.astype(dtype).astype(np.float32))
    assert output.scores == NDArrayFloat.from_numpy(np.array([[0.1, 0.2, 0.3]], dtype=np.float32))
    assert output.object_scores is not None
    assert output.object_scores.to_numpy().tolist() == [-1.5]
    assert (output.image_embedding, output.high_resolution_features) == model.export_embedding(embedding, dtype)


def test_what_was_not_asked_for_is_not_there(model: Level) -> None:
    embedding = model.embed(picture())
    asked = SegmentationInput(**CLICK)
    decoded = model.decode(decode_requests(asked, embedding, EVERYTHING, "m"))
    masks = [model.to_masks(one, WIDTH, HEIGHT) for one in decoded]
    output = assemble_output(model, asked, embedding, decoded, masks, "float32")
    assert (output.image_embedding, output.high_resolution_features, output.mask_logits) == (None, None, None)
    none_at_all = SegmentationInput(image=PNG, return_image_embedding=True, return_logits=True)
    output = assemble_output(model, none_at_all, embedding, [], [], "float32")
    assert (output.masks, output.scores, output.object_scores, output.mask_logits) == ([], None, None, None)
    assert output.image_embedding is not None


def test_predict_takes_encoded_bytes(model: Level) -> None:
    asked = SegmentationInput(image=PNG, points=[[[1, 1]], [[2, 2], [3, 3]]], return_logits=True)
    output = model.predict(asked)
    assert output.scores is not None
    np.testing.assert_allclose(output.scores.to_numpy(), [[0.1] * 3, [0.2] * 3])
    for row in output.masks:
        for level, mask in zip((50, 100, 150), row, strict=True):
            np.testing.assert_array_equal(mask.to_mask(), picture()[:, :, 0] > level)
    assert output.mask_logits is not None
    assert output.mask_logits.to_numpy().max() == 32
    single = model.predict(SegmentationInput(**CLICK, multimask_output=False))
    assert single.masks == [output.masks[0][:1]]


def test_predict_applies_the_orientation(model: Level) -> None:
    turned = encode(picture(), "PNG", exif=exif(6))
    output = model.predict(SegmentationInput(image=turned, points=[[[HEIGHT, WIDTH]]]))
    expected = np.rot90(picture()[:, :, 0], -1) > 50
    np.testing.assert_array_equal(output.masks[0][0].to_mask(), expected)


def test_predict_reads_paths_and_urls_as_far_as_the_models_policy_allows(model: Level, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(PNG)
    in_base64 = base64.b64encode(PNG).decode()
    expected = model.predict(SegmentationInput(**CLICK))
    for source in (in_base64, f"data:image/png;base64,{in_base64}"):
        assert model.predict(SegmentationInput(**{**CLICK, "image": source})) == expected
    for path in (file, str(file), file.as_uri()):
        with pytest.raises(UriNotAllowedError):
            model.predict(SegmentationInput(**{**CLICK, "image": path}))
    model.source_policy = SourcePolicy(media_roots=(tmp_path,))
    for path in (file, str(file), file.as_uri()):
        assert model.predict(SegmentationInput(**{**CLICK, "image": path})) == expected


def test_predict_refuses_what_is_no_image(model: Level) -> None:
    with pytest.raises(ImageUndecodableError):
        model.predict(SegmentationInput(**{**CLICK, "image": b"text"}))
    with pytest.raises(InvalidFieldError):
        model.predict(SegmentationInput(image=PNG, points=[[[WIDTH + 1, 0]]]))


@pytest.mark.parametrize("limits", [ImageLimits(max_bytes=len(PNG) - 1), ImageLimits(max_pixels=WIDTH * HEIGHT - 1)])
def test_predict_keeps_to_the_models_limits(model: Level, limits: ImageLimits) -> None:
    model.image_limits = limits
    with pytest.raises(ImageTooLargeError):
        model.predict(SegmentationInput(**CLICK))


def test_predict_keeps_no_image(model: Level) -> None:
    model.predict(SegmentationInput(**CLICK))
    with pytest.raises(NoPredictorStateError, match="reset_predictor=True"):
        model.predict(SegmentationInput(points=[[[1, 1]]], reset_predictor=False))


def test_predict_uses_a_given_embedding_instead_of_the_pixels(model: Level) -> None:
    returned = model.predict(SegmentationInput(image=PNG, return_image_embedding=True))
    assert (returned.masks, returned.mask_logits) == ([], None)
    given: dict[str, Any] = {
        "image_embedding": returned.image_embedding,
        "high_resolution_features": returned.high_resolution_features,
    }
    assert model.predict(SegmentationInput(**CLICK, **given)) == model.predict(SegmentationInput(**CLICK))
    black = encode(np.zeros_like(picture()), "PNG")
    by_embedding = model.predict(SegmentationInput(**{**CLICK, "image": black}, **given))
    np.testing.assert_array_equal(by_embedding.masks[0][0].to_mask(), picture()[:, :, 0] > 50)


def test_by_default_embeddings_stay_inside() -> None:
    plain, embedding = Plain(CONFIG), embedding_of()
    with pytest.raises(CapabilityMissingError, match="model 'level' cannot return embeddings"):
        plain.export_embedding(embedding, "float32")
    tensor = NDArrayFloat.from_numpy(np.zeros((1, 1)))
    with pytest.raises(CapabilityMissingError, match="model 'level' does not take embeddings"):
        plain.import_embedding(tensor, [tensor], WIDTH, HEIGHT)


def test_a_batch_is_answered_in_order(model: Level) -> None:
    inputs = [SegmentationInput(image=PNG, points=[[[1, 1]] * clicks]) for clicks in (3, 1, 2)]
    assert model.predict_batch(inputs) == [model.predict(one) for one in inputs]
    scores = [output.scores.to_numpy()[0, 0] for output in model.predict_batch(inputs) if output.scores is not None]
    np.testing.assert_allclose(scores, [0.3, 0.1, 0.2])
    assert model.predict_batch([]) == []


def test_a_model_promises_points_and_boxes_unless_it_says_more() -> None:
    class Doubling(InferenceModel):
        def load_model(self) -> None:
            pass

        def predict(self, input: Any) -> Any:  # noqa: A002
            return 2 * input

    doubling = Doubling(CONFIG)
    assert doubling.config is CONFIG
    metadata = doubling.metadata
    assert (metadata.points, metadata.boxes, metadata.mask_input, metadata.embeddings) == (True, True, False, False)
    assert doubling.predict_batch([1, "a"]) == [2, "aa"]


def test_a_model_must_say_how_it_loads_and_predicts() -> None:
    class Incomplete(InferenceModel):
        def load_model(self) -> None:
            pass

    with pytest.raises(TypeError, match="predict"):
        Incomplete(CONFIG)  # type: ignore[abstract]
