"""What a server would say, as messages."""

from collections.abc import Sequence
from typing import Any

from segrpc.v1 import refine_pb2, types_pb2
from segrpc.v1.refine_pb2 import RefineResponse

IMAGE = types_pb2.ImageInfo(digest=f"sha256:{'0' * 64}", width=4, height=2, exif_orientation=1)


def opened(applied_seq: int = 0, *, revision: int = 0, resumed: bool = False) -> RefineResponse:
    message = refine_pb2.SessionOpened(session_id="the-session", resume_token="secret", image=IMAGE, resumed=resumed)
    message.expire_time.FromSeconds(1_800_000_000)
    return RefineResponse(revision=revision, applied_seq=applied_seq, opened=message)


def result(
    applied_seq: int,
    revision: int,
    *,
    object_id: str = "1",
    shown: int | None = None,
    rounds: Sequence[refine_pb2.Round] = (),
    scores: Sequence[float] = (0.5,),
) -> RefineResponse:
    message = refine_pb2.MaskResult(
        object_id=object_id, rounds=rounds, shown_revision=revision if shown is None else shown
    )
    for score in scores:
        message.prediction.masks.add(height=2, width=4, score=score, area=3, coco_rle=b"133")
    return RefineResponse(revision=revision, applied_seq=applied_seq, result=message)


def round_of(revision: int, *points: tuple[float, float], **fields: Any) -> refine_pb2.Round:
    prompt = types_pb2.Prompt(
        points=[types_pb2.Point(x=x, y=y, label=types_pb2.POINT_LABEL_BACKGROUND) for x, y in points]
    )
    return refine_pb2.Round(revision=revision, prompt=prompt, **fields)


def rejected(seq: int, applied_seq: int, reason: str = "INVALID_FIELD") -> RefineResponse:
    violation = refine_pb2.FieldViolation(field="edit.add_points.points[0].x", description="lies outside")
    message = refine_pb2.EditRejected(seq=seq, reason=reason, message="wrong", violations=[violation])
    return RefineResponse(applied_seq=applied_seq, rejected=message)
