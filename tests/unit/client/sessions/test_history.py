"""Exports, and computing them again: without a network."""

import base64
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from segrpc.client import AddPoints, Replay, SetMask
from segrpc.client.codec import load_image, tensor_message
from segrpc.client.flow import SentImages
from segrpc.client.replay import replay
from segrpc.client.sessions.source import NewSession
from segrpc.client.sessions.state import SessionState
from segrpc.client.types import ImageInfo
from segrpc.v1 import types_pb2
from segrpc.v1.segmentation_service_pb2 import SegmentRequest, SegmentResponse
from tests.unit.client.sessions.responses import IMAGE, opened, rejected, result, round_of

LOGITS = np.arange(4, dtype=np.float32).reshape(2, 2)
PHOTO = load_image(b"photo")


def exported() -> dict[str, Any]:
    """Export a session of two objects: three rounds, one of which was overtaken, and one that was undone."""
    state = SessionState(
        NewSession(PHOTO, SentImages()),
        {"model": "sam", "num_multimask_outputs": 3, "request_id": "mine"},
        60.0,
    )
    list(state.opening(0.0))
    state.received(opened())
    state.submit(AddPoints([(1, 1)]))
    state.received(result(1, 1, rounds=[round_of(1, (1, 1), multimask_output=True)], scores=(0.5, 0.75)))
    state.submit(SetMask(LOGITS))
    state.submit(AddPoints([(2, 1)], point_ids=["p"]))
    overtaken, newest = round_of(2, (1, 1), mask_seq=2), round_of(3, (1, 1), (2, 1), mask_revision=1, mask_index=1)
    newest.point_ids.extend(["", "p"])
    newest.prompt.box.CopyFrom(types_pb2.Box(x_max=4, y_max=2))
    state.received(result(3, 3, rounds=[overtaken, newest]))
    state.submit(AddPoints([(1, 1)], object_id="b"))
    state.received(result(4, 4, object_id="b", rounds=[round_of(4, (1, 1), multimask_output=True)], scores=(1, 0)))
    image = ImageInfo(IMAGE.digest, IMAGE.width, IMAGE.height, 1)
    export = state.ledger.history.export(image, "sam", state.options, state.ledger.latest)
    loaded: dict[str, Any] = json.loads(json.dumps(export))
    assert loaded == export, "values of JSON only"
    return loaded


def test_an_export_tells_what_was_computed() -> None:
    export = exported()
    assert (export["format"], export["version"], export["model"]) == ("segrpc-session", 1, "sam")
    assert export["image"] == {"digest": IMAGE.digest, "width": 4, "height": 2}
    assert export["options"] == {"num_multimask_outputs": 3}
    assert export["objects"] == {
        "1": {"shown_revision": 3, "selected": 0},
        "b": {"shown_revision": 4, "selected": 0},
    }
    first, overtaken, third, _ = export["rounds"]
    assert first == {
        "revision": 1,
        "object_id": "1",
        "points": [[1.0, 1.0]],
        "labels": [0],
        "box": None,
        "mask": None,
        "multimask_output": True,
        "masks": [{"counts": "133", "size": [2, 4], "score": score} for score in (0.5, 0.75)],
    }
    assert "masks" not in overtaken
    assert overtaken["mask"] == {"logits": base64.b64encode(LOGITS.tobytes()).decode(), "shape": [1, 2, 2]}
    assert third["mask"] == {"revision": 1, "index": 1}
    assert third["point_ids"] == ["", "p"]
    assert third["box"] == [0, 0, 4, 2]


def test_logits_of_another_process_and_of_rejected_edits() -> None:
    state = SessionState(NewSession(PHOTO, SentImages()), {}, 60.0)
    list(state.opening(0.0))
    state.received(opened())
    state.submit(SetMask(LOGITS))
    state.received(rejected(1, 1))
    state.received(result(9, 1, rounds=[round_of(1, (1, 1), mask_seq=1)]))
    export = state.ledger.history.export(ImageInfo("", 4, 2, 1), "sam", {}, state.ledger.latest)
    assert export["rounds"][0]["mask"] == {"seq": 1}
    with pytest.raises(ValueError, match="mask input of revision 1"):
        run(export, [])


def answer(*scores: float, logits: float | None = None, width: int = 4) -> SegmentResponse:
    """Return a server's answer, with the given scores and, for each candidate, logits that count up from a number."""
    image = types_pb2.ImageInfo(digest=IMAGE.digest, width=width, height=2)
    response = SegmentResponse(image=image, predictions=[types_pb2.Prediction()])
    for score in scores:
        response.predictions[0].masks.add(height=2, width=4, score=score, area=3, coco_rle=b"133")
    if logits is not None:
        array = np.full((1, len(scores), 2, 2), logits, np.float32) + np.arange(len(scores))[None, :, None, None]
        response.mask_logits.CopyFrom(tensor_message(array.astype(np.float32)))
    return response


def run(
    export: Any, responses: Iterable[SegmentResponse], image: bytes | str = b"photo"
) -> tuple[Replay, list[SegmentRequest]]:
    """Replay with the given answers; return the requests as well."""
    steps, requests = replay(export, image, SentImages()), []
    try:
        call = next(steps)
        for response in responses:
            request = SegmentRequest()
            request.CopyFrom(call.request)
            requests.append(request)
            call = steps.send(response)
    except StopIteration as done:
        return done.value, requests
    raise AssertionError(f"a further call: {call}")


def same() -> list[SegmentResponse]:
    return [answer(0.5, 0.75, logits=10), answer(0.1), answer(0.5), answer(1, 0)]


def test_replaying_computes_each_round_with_the_logits_of_the_replayed_ones() -> None:
    found, requests = run(exported(), same())
    assert found.identical
    assert found.same_image
    assert [one.identical for one in found.rounds] == [True, None, True, True]
    assert [one.object_id for one in found.rounds] == ["1", "1", "1", "b"]
    first, overtaken, third, other = requests
    assert first.model == "sam"
    assert first.output.multimask_output
    assert first.output.num_multimask_outputs == 2
    assert first.output.return_logits
    assert not first.prompts[0].HasField("mask_input")
    assert overtaken.prompts[0].mask_input.data == LOGITS.tobytes()
    assert not overtaken.output.multimask_output
    assert not overtaken.output.return_logits
    assert third.prompts[0].mask_input.data == np.full((2, 2), 11, np.float32).tobytes()
    assert third.prompts[0].box == types_pb2.Box(x_max=4, y_max=2)
    assert [(point.x, point.y) for point in third.prompts[0].points] == [(1, 1), (2, 1)]
    assert [point.label for point in third.prompts[0].points] == [types_pb2.POINT_LABEL_BACKGROUND] * 2
    assert not other.prompts[0].HasField("mask_input")


def test_any_difference_is_told() -> None:
    for change in ("score", "coco_rle"):
        responses = same()
        setattr(responses[2].predictions[0].masks[0], change, 0.25 if change == "score" else b"124")
        found, _ = run(exported(), responses)
        assert not found.identical
        assert [one.revision for one in found.different] == [3]


def test_another_image() -> None:
    with pytest.raises(ValueError, match="5 x 2"):
        run(exported(), [answer(0.5, 0.75, logits=10, width=5)])
    responses = same()
    for response in responses:
        response.image.digest = f"sha256:{'1' * 64}"
    found, _ = run(exported(), responses)
    assert found.identical
    assert not found.same_image


@pytest.mark.parametrize(
    ("image", "same_image"),
    [(b"photo", True), (PHOTO.digest, True), (b"another", False), (IMAGE.digest, False), ("https://it.is/one", None)],
)
def test_the_image_of_a_session_without_rounds(image: bytes | str, same_image: bool | None) -> None:
    about = {"digest": PHOTO.digest, "width": 4, "height": 2}
    found, _ = run({**exported(), "image": about, "rounds": [], "objects": {}}, [], image)
    assert (found.rounds, found.identical, found.image) == ((), True, None)
    assert found.same_image is same_image


@pytest.mark.parametrize(
    "export",
    [
        {},
        {"format": "segrpc-session", "version": 2},
        {"format": "segrpc-session", "version": 1},
        {"format": "segrpc-session", "version": 1, "image": {"digest": "", "width": 1, "height": 1}, "rounds": [{}]},
        {"format": "segrpc-session", "version": 1, "image": [], "rounds": []},
        {"format": "segrpc-session", "version": 1, "image": {"digest": "", "width": 1, "height": 1}, "rounds": [7]},
    ],
)
def test_what_is_no_export_is_refused(export: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not an exported session"):
        run(export, [])


def test_a_mask_input_that_is_missing() -> None:
    export = exported()
    for mask in ({"revision": 99, "index": 0}, {"logits": "AAAA", "shape": [1, 2, 2]}, {}):
        export["rounds"][0]["mask"] = mask
        with pytest.raises(ValueError, match="mask input of revision 1"):
            run(export, [])
