"""What the docstring of `GrabCut` promises, on the demo photos and on drawn pictures of a few plain colours."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from segrpc.service.errors import ModelLoadError
from segrpc.service.models.base import Decoded, DecodeRequest, Embedding, Float32Array
from segrpc.service.models.grabcut import GrabCut
from segrpc.service.schemas import ModelDeploymentConfig
from tests.photos import NAMES, BoolMask, Prompts, drawn_mask, iou, load_array, prompts_of

Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]
Clicks = Sequence[tuple[float, float]]

SIDE = 256  # of the grid that logits are given on


def grabcut(**params: Any) -> GrabCut:
    model = GrabCut(ModelDeploymentConfig(name="grabcut", model_params=params))
    model.load_model()
    return model


MODEL = grabcut()


def request(
    embedding: Embedding,
    points: Clicks = (),
    labels: Sequence[int] = (),
    box: Box | None = None,
    mask_input: Float32Array | None = None,
    num_masks: int = 1,
) -> DecodeRequest:
    return DecodeRequest(
        embedding=embedding,
        points=np.array(points, dtype=np.float32).reshape(-1, 2),
        labels=np.array(labels, dtype=np.int32),
        box=None if box is None else np.array(box, dtype=np.float32),
        mask_input=mask_input,
        num_masks=num_masks,
    )


def of_prompts(embedding: Embedding, prompts: Prompts, num_masks: int) -> DecodeRequest:
    return request(embedding, prompts.points, prompts.labels, prompts.box, num_masks=num_masks)


def decode(one: DecodeRequest) -> Decoded:
    (decoded,) = MODEL.decode([one])
    return decoded


def masks_of(embedding: Embedding, decoded: Decoded) -> list[BoolMask]:
    return [mask.to_mask() for mask in MODEL.to_masks(decoded, embedding.width, embedding.height)]


def at(mask: BoolMask, x: float, y: float) -> bool:
    """What a mask says at a click."""
    height, width = mask.shape
    return bool(mask[min(int(y), height - 1), min(int(x), width - 1)])


def assert_equal(one: Decoded, other: Decoded) -> None:
    np.testing.assert_array_equal(one.logits, other.logits)
    np.testing.assert_array_equal(one.scores, other.scores)


@pytest.fixture(scope="module")
def cat() -> Embedding:
    return MODEL.embed(load_array("chelsea"))


def patchwork() -> Pixels:
    """A grey picture of 400 x 200 with a red square on the left that touches a blue one on the right."""
    image = np.full((200, 400, 3), 128, dtype=np.uint8)
    image[50:150, 100:200] = (200, 30, 30)
    image[50:150, 200:300] = (30, 30, 200)
    return image


@pytest.fixture(scope="module")
def squares() -> Embedding:
    return MODEL.embed(patchwork())


def area(x_min: int, y_min: int, x_max: int, y_max: int) -> BoolMask:
    """A rectangle as a mask of the patchwork."""
    mask = np.zeros((200, 400), dtype=np.bool_)
    mask[y_min:y_max, x_min:x_max] = True
    return mask


def logits_of(mask: BoolMask) -> Float32Array:
    """Logits ``[1, 256, 256]`` as a client may make them of a mask: just positive and negative."""
    stretched = cv2.resize(mask.astype(np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
    return np.where(stretched > 0, 5.0, -5.0).astype(np.float32)[None]


RED, BLUE = area(100, 50, 200, 150), area(200, 50, 300, 150)


@pytest.mark.parametrize("name", NAMES)
def test_points_and_box_give_the_mask_that_was_drawn_by_hand(name: str) -> None:
    embedding, drawn = MODEL.embed(load_array(name)), drawn_mask(name)
    single = decode(of_prompts(embedding, prompts_of(name), 1))
    assert iou(masks_of(embedding, single)[0], drawn) >= 0.85
    three = decode(of_prompts(embedding, prompts_of(name), 3))
    assert iou(masks_of(embedding, three)[int(three.scores.argmax())], drawn) >= 0.85


@pytest.mark.parametrize("num_masks", [1, 3])
def test_what_is_given_for_a_prompt(cat: Embedding, num_masks: int) -> None:
    decoded = decode(of_prompts(cat, prompts_of("chelsea"), num_masks))
    assert decoded.logits.shape == (num_masks, SIDE, SIDE)
    assert decoded.scores.shape == (num_masks,)
    assert decoded.logits.dtype == decoded.scores.dtype == np.float32
    assert np.abs(decoded.logits).max() <= 32
    assert ((decoded.scores >= 0) & (decoded.scores <= 1)).all()
    assert decoded.object_score == 0
    for mask, logits in zip(masks_of(cat, decoded), decoded.logits, strict=True):
        assert mask.shape == (cat.height, cat.width)
        assert 0 < mask.mean() < 1
        assert mask.mean() == pytest.approx((logits > 0).mean(), abs=0.01)


def test_logits_are_the_distance_from_the_outline(squares: Embedding) -> None:
    (logits,) = decode(request(squares, box=(100, 50, 200, 150))).logits
    # On the grid, the red square covers columns 64 to 127 and rows 64 to 191.
    np.testing.assert_array_equal(logits > 0, np.pad(np.ones((128, 64)), ((64, 64), (64, 128))))
    np.testing.assert_allclose(logits[128, 60:70], [-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5], atol=1e-5)
    assert (logits[128, 255], logits[128, 95]) == (-32.0, 31.5)


def test_the_first_of_three_is_the_smallest_and_the_last_the_largest(cat: Embedding) -> None:
    everything = prompts_of("chelsea")
    for prompts in (everything.points_only(), everything.box_only()):
        part, _, whole = (mask.sum() for mask in masks_of(cat, decode(of_prompts(cat, prompts, 3))))
        assert part < whole


def test_which_of_the_three_a_single_one_is(cat: Embedding) -> None:
    everything = prompts_of("chelsea")
    for prompts in (everything.box_only(), everything):
        single, three = decode(of_prompts(cat, prompts, 1)), decode(of_prompts(cat, prompts, 3))
        np.testing.assert_array_equal(single.logits, three.logits[2:])
        np.testing.assert_array_equal(single.scores, three.scores[2:])
    points = everything.points_only()
    for prompts in (points, Prompts(points.points[:1], (1,), None), Prompts(points.points[:1], (0,), None)):
        single, three = decode(of_prompts(cat, prompts, 1)), decode(of_prompts(cat, prompts, 3))
        best = int(three.scores.argmax())
        np.testing.assert_array_equal(single.logits, three.logits[best : best + 1])
    earlier = logits_of(drawn_mask("chelsea"))
    single, three = (decode(request(cat, everything.points, everything.labels, None, earlier, n)) for n in (1, 3))
    np.testing.assert_array_equal(single.logits, three.logits[1:2])


def test_equal_prompts_give_equal_masks() -> None:
    embedding = MODEL.embed(load_array("raccoon"))
    prompts = prompts_of("raccoon")
    first = decode(of_prompts(embedding, prompts, 3))
    for other in (prompts.points_only(), prompts.box_only()):
        decode(of_prompts(embedding, other, 3))
    cv2.setRNGSeed(12345)
    assert_equal(decode(of_prompts(embedding, prompts, 3)), first)
    assert_equal(decode(of_prompts(MODEL.embed(load_array("raccoon")), prompts, 3)), first)
    assert_equal(grabcut().decode([of_prompts(embedding, prompts, 3)])[0], first)


def test_threads_give_the_masks_that_one_gives_alone() -> None:
    requests = [
        of_prompts(MODEL.embed(load_array(name)), prompts, 1)
        for name in ("chelsea", "coffee")
        for prompts in (prompts_of(name), prompts_of(name).box_only())
    ]
    alone = [decode(one) for one in requests]
    together = Barrier(len(requests))

    def work(start: int) -> list[Decoded]:
        together.wait()
        order = [(start + step) % len(requests) for step in range(len(requests))]
        return [found for _, found in sorted((i, decode(requests[i])) for i in order)]

    with ThreadPoolExecutor(len(requests)) as pool:
        for found in pool.map(work, range(len(requests))):
            for one, expected in zip(found, alone, strict=True):
                assert_equal(one, expected)


def test_prompts_of_one_call_do_not_influence_each_other(cat: Embedding, squares: Embedding) -> None:
    requests = [
        request(squares, [(150, 100)], [1], num_masks=3),
        of_prompts(cat, prompts_of("chelsea"), 1),
        request(squares, box=(90, 40, 310, 160), num_masks=3),
    ]
    before = [(one.pixels.copy(), one.lab.copy(), one.gradient.copy()) for one in (cat.features, squares.features)]
    for one, found in zip(requests, MODEL.decode(requests), strict=True):
        assert_equal(found, decode(one))
    for arrays, scene in zip(before, (cat.features, squares.features), strict=True):
        for array, now in zip(arrays, (scene.pixels, scene.lab, scene.gradient), strict=True):
            np.testing.assert_array_equal(array, now)


def test_the_number_of_rounds_is_respected(cat: Embedding) -> None:
    prompts = prompts_of("chelsea").points_only()
    few, many = (grabcut(iterations=n).decode([of_prompts(cat, prompts, 3)])[0] for n in (1, 20))
    assert not np.array_equal(few.logits, many.logits)
    assert_equal(grabcut(iterations=5).decode([of_prompts(cat, prompts, 3)])[0], decode(of_prompts(cat, prompts, 3)))


SHARE = st.floats(0, 1)
CLICK = st.tuples(SHARE, SHARE, st.integers(0, 1))


@given(
    name=st.sampled_from(NAMES),
    size=st.sampled_from([(256, 256), (97, 61), (640, 480), (900, 40), (3, 200)]),
    clicks=st.lists(CLICK, min_size=1, max_size=6),
    corners=st.none() | st.tuples(SHARE, SHARE, SHARE, SHARE),
    refine=st.booleans(),
)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])
def test_clicks_and_boxes_are_honoured(
    name: str,
    size: tuple[int, int],
    clicks: list[tuple[float, float, int]],
    corners: tuple[float, float, float, float] | None,
    refine: bool,
) -> None:
    width, height = size
    points = [(x * width, y * height) for x, y, _ in clicks]
    labels = [label for *_, label in clicks]
    cells = np.array([(min(int(x), width - 1) + 0.5, min(int(y), height - 1) + 0.5) for x, y in points])
    cells = (cells * SIDE / size).astype(int)
    is_object = np.array(labels) == 1
    between = np.linalg.norm(cells[is_object][:, None] - cells[~is_object][None], axis=2)
    assume(between.size == 0 or between.min() >= 4)
    box = None
    if corners is not None:
        (x_min, x_max), (y_min, y_max) = sorted(corners[0::2]), sorted(corners[1::2])
        assume(x_min < x_max and y_min < y_max)
        box = (x_min * width, y_min * height, x_max * width, y_max * height)
    embedding = MODEL.embed(np.asarray(cv2.resize(load_array(name), size), dtype=np.uint8))
    earlier = logits_of(np.asarray(cv2.resize(drawn_mask(name).astype(np.uint8), size)) > 0) if refine else None
    decoded = decode(request(embedding, points, labels, box, earlier, num_masks=3))
    for mask, logits in zip(masks_of(embedding, decoded), decoded.logits, strict=True):
        assert [at(mask, x, y) for x, y in points] == [label == 1 for label in labels]
        if is_object.any():
            assert_connected(logits > 0, cells[is_object])
        elif box is not None:
            assert_within(mask, box)


def assert_connected(mask: BoolMask, clicked: npt.NDArray[np.int64]) -> None:
    count, components = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    assert set(range(1, count)) == {int(components[y, x]) for x, y in clicked}


def assert_within(mask: BoolMask, box: Box) -> None:
    """Check that a mask leaves a box by the rounding to cells only: half a cell at most, or a cell's width in all."""
    height, width = mask.shape
    ys, xs = np.nonzero(mask)
    for found, low, high, size in ((xs + 0.5, box[0], box[2], width), (ys + 0.5, box[1], box[3], height)):
        cell = size / SIDE
        assert (found > min(low - cell / 2, size - cell) - 1e-6).all()
        assert (found < max(high + cell / 2, low + cell * 3 / 2) + 1e-6).all()


def test_a_mask_leaves_the_box_for_an_object_click(squares: Embedding) -> None:
    box = (100.0, 50.0, 200.0, 150.0)
    (inside,) = masks_of(squares, decode(request(squares, box=box)))
    assert iou(inside, RED) > 0.98
    (with_click,) = masks_of(squares, decode(request(squares, [(150, 100), (250, 100)], [1, 1], box)))
    assert at(with_click, 250, 100)


def test_a_background_click_outside_of_the_box_says_no_more_than_the_box(cat: Embedding) -> None:
    by_box = prompts_of("chelsea").box_only()
    assert by_box.box is not None
    alone = of_prompts(cat, by_box, 1)
    beside = of_prompts(cat, by_box.and_point(by_box.box[2] + 6, 150, 0), 1)
    assert_equal(decode(beside), decode(alone))


def test_only_what_is_connected_to_an_object_click_is_kept() -> None:
    image = np.full((256, 256, 3), 128, dtype=np.uint8)
    image[40:100, 40:100] = image[150:210, 150:210] = (200, 30, 30)
    embedding = MODEL.embed(image)
    (both,) = masks_of(embedding, decode(request(embedding, box=(30, 30, 220, 220))))
    assert (at(both, 70, 70), at(both, 180, 180)) == (True, True)
    (one,) = masks_of(embedding, decode(request(embedding, [(70, 70)], [1], (30, 30, 220, 220))))
    assert (at(one, 70, 70), at(one, 180, 180)) == (True, False)


def test_of_clicks_of_both_kinds_into_one_place_the_last_counts(cat: Embedding) -> None:
    for last in (0, 1):
        for mask in masks_of(cat, decode(request(cat, [(200, 150)] * 2, [1 - last, last], num_masks=3))):
            assert at(mask, 200, 150) is bool(last)


@pytest.mark.parametrize("num_masks", [1, 3])
def test_an_earlier_mask_alone_is_kept_but_for_its_outline(cat: Embedding, num_masks: int) -> None:
    (earlier,) = decode(of_prompts(cat, prompts_of("chelsea"), 1)).logits
    for refined in decode(request(cat, mask_input=earlier[None], num_masks=num_masks)).logits:
        away = np.abs(earlier) > 8
        np.testing.assert_array_equal(refined[away] > 0, earlier[away] > 0)
        assert iou(refined > 0, earlier > 0) > 0.9


@pytest.mark.parametrize("points", [[(185, 100)], [(120, 100), (185, 100)]])
def test_an_object_click_adds_what_an_earlier_mask_lacks(squares: Embedding, points: Clicks) -> None:
    lacking = area(100, 50, 170, 150)
    (refined,) = masks_of(squares, decode(request(squares, points, [1] * len(points), mask_input=logits_of(lacking))))
    assert iou(lacking, RED) == 0.7
    assert iou(refined, RED) > 0.9


def test_a_background_click_takes_what_an_earlier_mask_has_too_much(squares: Embedding) -> None:
    surplus = RED | area(200, 50, 240, 150)
    (refined,) = masks_of(squares, decode(request(squares, [(220, 100)], [0], mask_input=logits_of(surplus))))
    assert iou(surplus, RED) == pytest.approx(1 / 1.4)
    assert iou(refined, RED) > 0.9


@pytest.mark.parametrize("name", ["astronaut", "chelsea"])
def test_clicks_correct_the_mask_of_a_box(name: str) -> None:
    embedding, drawn, prompts = MODEL.embed(load_array(name)), drawn_mask(name), prompts_of(name)
    by_box = decode(of_prompts(embedding, prompts.box_only(), 1))
    refined = decode(request(embedding, prompts.points, prompts.labels, mask_input=by_box.logits))
    before, after = (iou(masks_of(embedding, one)[0], drawn) for one in (by_box, refined))
    assert after > before + 0.02


def test_clicks_that_agree_with_an_earlier_mask_change_nothing_away_from_its_outline(squares: Embedding) -> None:
    # The mask is wrong on purpose: half red, half grey. What it holds was not asked to change.
    earlier = logits_of(area(50, 50, 150, 150))
    kept = decode(request(squares, [(60, 100), (350, 100)], [1, 0], mask_input=earlier)).logits[0] > 0
    inner = np.zeros((SIDE, SIDE), dtype=np.bool_)
    inner[64 + 9 : 192 - 9, 32 + 9 : 96 - 9] = True
    assert kept[inner].all()
    assert not kept[:, 96 + 9 :].any()


def test_a_box_cuts_an_earlier_mask(squares: Embedding) -> None:
    (refined,) = masks_of(squares, decode(request(squares, box=(100, 50, 200, 150), mask_input=logits_of(RED | BLUE))))
    assert iou(refined, RED) > 0.95


def test_an_empty_earlier_mask_says_nothing(squares: Embedding) -> None:
    nothing = np.full((1, SIDE, SIDE), -3.0, dtype=np.float32)
    for points, labels, box in (([(150, 100)], [1], None), ([], [], (90.0, 40.0, 310.0, 160.0))):
        with_it, without = (decode(request(squares, points, labels, box, m, 3)) for m in (nothing, None))
        assert_equal(with_it, without)


def test_scores_rank_an_outline_along_edges_above_one_across_a_plain(squares: Embedding) -> None:
    on_edges = decode(request(squares, box=(100, 50, 200, 150)))
    assert on_edges.scores[0] > 0.9
    plain = decode(request(squares, mask_input=logits_of(area(310, 20, 390, 180))))
    assert plain.scores[0] < on_edges.scores[0]
    # The same outline in a box three times as large.
    loose = decode(request(squares, box=(0, 0, 400, 200), mask_input=logits_of(RED)))
    assert loose.scores[0] < 0.5 * on_edges.scores[0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2500, 1)])
@pytest.mark.parametrize("kind", ["uniform", "noise"])
def test_tiny_and_narrow_images(shape: tuple[int, int], kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3))
    height, width = shape
    embedding = MODEL.embed(np.asarray(noise if kind == "noise" else np.full_like(noise, 90), dtype=np.uint8))
    assert (embedding.width, embedding.height) == (width, height)
    corner = (float(width), float(height))
    for label in (0, 1):
        for mask in masks_of(embedding, decode(request(embedding, [corner], [label], num_masks=3))):
            assert mask.shape == shape
            assert at(mask, *corner) is bool(label)
    box = (0.0, 0.0, *corner)
    for mask in masks_of(embedding, decode(request(embedding, [(0, 0)], [1], box, num_masks=3))):
        assert at(mask, 0, 0)


def test_uniform_images_and_the_score_of_no_outline() -> None:
    height, width = 300, 1000
    embedding = MODEL.embed(np.full((height, width, 3), 90, dtype=np.uint8))
    (whole,) = masks_of(embedding, decode(request(embedding, box=(0, 0, width, height))))
    assert whole.all()  # the box is all that there is to tell
    everything = np.full((1, SIDE, SIDE), 1.0, dtype=np.float32)
    for decoded in (
        decode(request(embedding, box=(0, 0, width, height))),
        decode(request(embedding, mask_input=everything, num_masks=3)),
    ):
        assert (decoded.logits > 0).all()
        assert (decoded.scores == 0).all()
    nothing = decode(request(embedding, [(1, 1)], [0], num_masks=3))
    assert (nothing.scores[~(nothing.logits > 0).any(axis=(1, 2))] == 0).all()
    assert not any(at(mask, 1, 1) for mask in masks_of(embedding, nothing))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"threads": 2, "colour": 1}, "does not understand colour, threads; it takes iterations"),
        ({"iterations": 0}, "iterations 0 of model 'cut' is no whole number of at least 1"),
        ({"iterations": 2.0}, "iterations 2.0"),
        ({"iterations": "5"}, "iterations '5'"),
        ({"iterations": True}, "iterations True"),
        ({"iterations": None}, "iterations None"),
    ],
)
def test_wrong_parameters_are_named(params: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        GrabCut(ModelDeploymentConfig(name="cut", model="grabcut", model_params=params))
    assert said in caught.value.message


def test_what_it_says_it_can_do() -> None:
    metadata = MODEL.metadata
    assert (metadata.family, metadata.mask_size, metadata.mask_counts) == ("grabcut", SIDE, (1, 3))
    assert (metadata.points, metadata.boxes, metadata.mask_input, metadata.embeddings) == (True, True, True, False)


def test_the_size_of_an_embedding_does_not_depend_on_the_image(cat: Embedding, squares: Embedding) -> None:
    scene = cat.features
    assert cat.nbytes == squares.nbytes == scene.pixels.nbytes + scene.lab.nbytes + scene.gradient.nbytes
