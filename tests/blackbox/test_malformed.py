"""A thousand malformed requests: no INTERNAL or UNKNOWN, the server stays healthy and its memory comes back."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from segrpc.v1.refine_pb2 import ImageChunk, UploadHeader
from segrpc.v1.segmentation_service_pb2 import EncodeImageRequest, SegmentRequest, UploadImageRequest
from segrpc.v1.types_pb2 import DATA_TYPE_FLOAT32, Box, Image, OutputOptions, Point, Prompt, Tensor
from tests.fuzz.targets import mutated
from tests.server_process import ServerProcess, connect, raw

Code = grpc.StatusCode
COUNT = 1000
SEED = 20_240_607
# What the table has for wrong requests, and for those that happen to be right.
EXPECTED = {
    Code.OK,
    Code.INVALID_ARGUMENT,
    Code.NOT_FOUND,
    Code.PERMISSION_DENIED,
    Code.FAILED_PRECONDITION,
}
SEGMENT = "/segrpc.v1.SegmentationService/Segment"
ENCODE = "/segrpc.v1.SegmentationService/EncodeImage"
UPLOAD = "/segrpc.v1.SegmentationService/UploadImage"


def wrong_tensor(chance: random.Random) -> Tensor:
    """A tensor whose type, shape and data rarely fit each other."""
    axes = [chance.choice([-1, 0, 1, 3, 256, 2**31, 2**63 - 1]) for _ in range(chance.randrange(10))]
    return Tensor(dtype=chance.randrange(7), shape=axes, data=chance.randbytes(chance.randrange(64)))  # type: ignore[arg-type]


def wrong_request(photo: bytes, chance: random.Random) -> bytes:
    """A request that is a message, with fields that are hardly ever right."""

    def number() -> float:
        return chance.choice([-1.0, 0.0, 7.5, 1e30, float("nan"), float("inf")])

    request = SegmentRequest(
        model=chance.choice(["", "grabcut", "sam2", "x" * 1000]),
        image=chance.choice(
            [Image(data=photo), Image(data=b""), Image(uri="file:///etc/passwd"), Image(digest="x"), None]
        ),
        prompts=[
            Prompt(
                points=[Point(x=number(), y=number(), label=chance.randrange(4)) for _ in range(chance.randrange(3))],  # type: ignore[arg-type]
                box=chance.choice([None, Box(x_min=number(), y_min=number(), x_max=number(), y_max=number())]),
                mask_input=chance.choice([None, None, wrong_tensor(chance)]),
            )
            for _ in range(chance.randrange(4))
        ],
        output=OutputOptions(
            num_multimask_outputs=chance.choice([-1, 0, 1, 2, 3, 2**31 - 1]),
            return_logits=chance.random() < 0.5,
            return_image_embedding=chance.random() < 0.1,
            tensor_dtype=chance.randrange(6),  # type: ignore[arg-type]
            mask_encoding=chance.randrange(5),  # type: ignore[arg-type]
        ),
        session_id=chance.choice(["", "s"]),
        reset_predictor=chance.choice([None, True, False]),
    )
    if chance.random() < 0.2:
        request.image_embedding.CopyFrom(wrong_tensor(chance))
    if chance.random() < 0.2:
        request.high_resolution_features.append(wrong_tensor(chance))
    return request.SerializeToString()


def damaged_image(photo: bytes, chance: random.Random) -> bytes:
    """A good request with an image that is cut off or changed."""
    data = photo[: chance.randrange(len(photo))] if chance.random() < 0.5 else mutated(photo, chance)
    return SegmentRequest(image=Image(data=data), prompts=[Prompt(points=[Point(x=1, y=1)])]).SerializeToString()


def unary_messages(photo: bytes, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Yield methods and messages, of all kinds in turn."""
    valid = SegmentRequest(
        image=Image(data=photo[:2000]),
        prompts=[Prompt(points=[Point(x=5, y=5)], mask_input=Tensor(dtype=DATA_TYPE_FLOAT32, shape=[1], data=b"1234"))],
    ).SerializeToString()
    encode = EncodeImageRequest(image=Image(data=photo[:2000])).SerializeToString()
    kinds: list[Callable[[], tuple[str, bytes]]] = [
        lambda: (SEGMENT, chance.randbytes(chance.randrange(200))),
        lambda: (SEGMENT, mutated(valid, chance)),
        lambda: (SEGMENT, wrong_request(photo, chance)),
        lambda: (SEGMENT, damaged_image(photo, chance)),
        lambda: (ENCODE, mutated(encode, chance)),
    ]
    while True:
        for kind in kinds:
            yield kind()


def upload_messages(photo: bytes, chance: random.Random) -> list[bytes]:
    """An upload with something wrong in it."""
    header = UploadImageRequest(header=UploadHeader(size=len(photo)))
    middle = len(photo) // 2
    pieces = [ImageChunk(data=photo[:middle]), ImageChunk(offset=middle, data=photo[middle:])]
    messages = [header.SerializeToString(), *(UploadImageRequest(chunk=p).SerializeToString() for p in pieces)]
    victim = chance.randrange(len(messages))
    kind = chance.randrange(3)
    if kind == 0:
        del messages[victim]
    elif kind == 1:
        chance.shuffle(messages)
    else:
        messages[victim] = mutated(messages[victim], chance)
    return messages


def code_of(call: Callable[[], object]) -> Code:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return Code.OK


def send_malformed(channel: grpc.Channel, photo: bytes, count: int, seed: int) -> None:
    """Send requests one after the other, every tenth an upload, and check each answer's code."""
    chance = random.Random(seed)
    messages = unary_messages(photo, chance)
    for i in range(count):
        if i % 10 == 9:
            pieces = upload_messages(photo, chance)
            code = code_of(lambda pieces=pieces: raw(channel, UPLOAD, client_streams=True)(iter(pieces)))  # type: ignore[misc]
            assert code in EXPECTED, (i, code, UPLOAD)
        else:
            method, message = next(messages)
            code = code_of(lambda m=method, d=message: raw(channel, m)(d, timeout=30))  # type: ignore[misc]
            assert code in EXPECTED, (i, code, method, message[:200])


def test_malformed_requests(tmp_path: Path, photo: bytes) -> None:
    config, log = tmp_path / "config.toml", tmp_path / "log"
    # Requests that happen to be right need not take long.
    config.write_text('[[models]]\nname = "grabcut"\nmodel_params = { iterations = 1 }\n')
    # Caches of a few MiB are full after the first round, so that what grows later is a leak.
    small = ["--image-store-bytes", "4MiB", "--embedding-cache-bytes", "4MiB", "--log-level", "warning"]
    with ServerProcess("--config", str(config), *small, log=log) as server, connect(server) as channel:
        send_malformed(channel, photo, COUNT // 2, SEED)
        before = server.resident_bytes()
        send_malformed(channel, photo, COUNT, SEED + 1)
        grown = server.resident_bytes() - before
        assert grown < 32 * 2**20, f"the server grew by {grown / 2**20:.1f} MiB"
        assert raw(channel, "/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"
        good = SegmentRequest(image=Image(data=photo), prompts=[Prompt(points=[Point(x=5, y=5)])])
        assert code_of(lambda: raw(channel, SEGMENT)(good.SerializeToString())) is Code.OK
        assert "bug in" not in server.log_text()
