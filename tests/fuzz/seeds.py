"""Writes the seeds of the corpora: ``python -m tests.fuzz.seeds``. Files that are there already stay."""

import base64
import struct

import numpy as np
from PIL import Image as Picture

from segrpc.service import rle
from segrpc.v1.refine_pb2 import (
    AddPoints,
    ClearBox,
    Edit,
    MovePoint,
    RefineConfig,
    RefineRequest,
    RemovePoint,
    SelectMask,
    Undo,
    UploadHeader,
)
from segrpc.v1.segmentation_service_pb2 import EncodeImageRequest, SegmentRequest
from segrpc.v1.types_pb2 import DATA_TYPE_FLOAT16, DATA_TYPE_FLOAT32, Box, Image, OutputOptions, Point, Prompt, Tensor
from tests.fuzz.targets import CORPUS
from tests.unit.images.pictures import encode, exif, picture, tiff

LOGITS = Tensor(dtype=DATA_TYPE_FLOAT32, shape=[1, 4, 4], data=bytes(64))


def _messages() -> dict[str, bytes]:
    embedding = Tensor(dtype=DATA_TYPE_FLOAT16, shape=[1, 2, 2], data=bytes(8))
    segment = SegmentRequest(
        request_id="r",
        model="model",
        image=Image(data=b"image"),
        prompts=[Prompt(points=[Point(x=5, y=6, label=2), Point(x=1, y=1)], box=Box(x_min=1, x_max=9, y_max=9))],  # type: ignore[arg-type]
        output=OutputOptions(multimask_output=True, num_multimask_outputs=3, return_logits=True, mask_encoding=2),  # type: ignore[arg-type]
        session_id="s",
    )
    masks = SegmentRequest(prompts=[Prompt(mask_input=LOGITS), Prompt(mask_input=LOGITS, points=[Point(x=1, y=2)])])
    embedded = SegmentRequest(
        image_embedding=embedding,
        high_resolution_features=[embedding, embedding],
        prompts=[Prompt(points=[Point(x=3, y=3)])],
    )
    edits = {
        "add": Edit(add_points=AddPoints(points=[Point(x=1, y=2), Point(x=3, y=4)], point_ids=["a", "b"])),
        "move": Edit(move_point=MovePoint(point_id="a", x=1, y=2)),
        "remove": Edit(remove_point=RemovePoint(point_id="a")),
        "box": Edit(set_box=Box(x_min=1, y_min=2, x_max=3, y_max=4)),
        "clear": Edit(clear_box=ClearBox()),
        "mask": Edit(set_mask=LOGITS),
        "select": Edit(select_mask=SelectMask(index=2)),
        "undo": Edit(undo=Undo(steps=2)),
    }
    for edit in edits.values():
        edit.object_id = "o"
    config = RefineConfig(
        model="model", upload=UploadHeader(size=9, digest="sha256:" + "0" * 64), output=segment.output
    )
    return {
        "segment": b"\0" + segment.SerializeToString(),
        "segment-masks": b"\0" + masks.SerializeToString(),
        "segment-embedding": b"\0" + embedded.SerializeToString(),
        "encode": b"\2" + EncodeImageRequest(model="model", image=Image(uri="data:,x")).SerializeToString(),
        "refine-config": b"\1" + RefineRequest(config=config).SerializeToString(),
        **{f"refine-{name}": b"\1" + RefineRequest(seq=1, edit=e).SerializeToString() for name, e in edits.items()},
    }


def _images() -> dict[str, bytes]:
    image = Picture.fromarray(picture())
    return {
        "jpeg": encode(image, "JPEG", exif=exif(6)),
        "jpeg-progressive": encode(image, "JPEG", progressive=True, comment=b"text"),
        "jpeg-cmyk": encode(image.convert("CMYK"), "JPEG"),
        "png": encode(image, "PNG", exif=exif(8)),
        "png-16": encode(Picture.fromarray(picture()[:, :, 0].astype(np.uint16) * 200), "PNG"),
        "png-palette": encode(image.convert("P"), "PNG", save_all=True, append_images=[image]),
        "webp": encode(image, "WEBP", exif=exif(5)),
        "webp-lossless": encode(image.convert("RGBA"), "WEBP", lossless=True),
        "tiff": tiff(bytes(64), 8, 8),
        "tiff-big": encode(image, "TIFF", big_tiff=True),
        "tiff-fax": encode(image.convert("1"), "TIFF", compression="group4"),
        **{f"tiff-{how}": encode(image, "TIFF", compression=how) for how in ("tiff_lzw", "jpeg", "packbits")},
        "bmp": encode(image, "BMP"),
        "bmp-palette": encode(image.convert("P"), "BMP"),
        "gif": encode(image.convert("P"), "GIF", save_all=True, append_images=[image.rotate(90)]),
    }


def _tensors() -> dict[str, bytes]:
    def layout(dtype: int, shape: list[int], data: bytes) -> bytes:
        return bytes([dtype, len(shape)]) + struct.pack(f"<{len(shape)}q", *shape) + data

    return {
        "float32": layout(1, [1, 2, 2], np.arange(4, dtype="<f4").tobytes()),
        "float16": layout(2, [3], np.array([0.5, -0.0, 6e-8], "<f2").tobytes()),
        "bfloat16": layout(3, [2, 1], b"\x80\x3f\x7f\x7f"),
        "scalar": layout(1, [], b"\0\0\x80\x3f"),
        "huge": layout(1, [2**62, 2**62], b"1234"),
    }


def _counts() -> dict[str, bytes]:
    y, x = np.mgrid[0:40, 0:60]
    masks = {
        "empty": np.zeros((8, 8)),
        "full": np.ones((8, 8)),
        "disc": (y - 20) ** 2 + (x - 25) ** 2 < 150,
        "stripes": x[:16, :16] % 2,
        "checks": (x[:12, :12] + y[:12, :12]) % 2,
    }
    return {
        **{name: bytes([len(mask) - 1]) + rle.compress(rle.runs_of_mask(mask)) for name, mask in masks.items()},
        "jumps": b"\4" + rle.compress(np.array([100, 3, 7, 2000, 50, 1000, 5, 40, 2, 0, 900, 3])),
        "long-runs": b"\0" + rle.compress(np.array([0, 2**24, 3, 2**24])),
    }


def _sources() -> dict[str, bytes]:
    png = base64.b64encode(encode(picture()[:2, :2], "PNG")).decode()
    texts = {
        "data": f"data:image/png;base64,{png}",
        "data-percent": "data:image/png,%89PNG%0D%0A",
        "base64": png,
        "file": "file://{ROOT}/../photos/SOURCES.md",
        "file-outside": "file://{ROOT}/../masks/chelsea.json",
        "file-localhost": "file://localhost/etc/passwd",
        "path": "{ROOT}/./SOURCES.md",
        "path-outside": "{ROOT}/../../../Makefile",
        "http": "http://images.example.org/a.jpg?b=c#d",
        "http-port": "https://a.b.example.com:8080/",
        "http-user": "http://user:password@images.example.org@evil.example.net/",
        "http-ipv6": "http://[2001:db8::1]/x",
        "http-idn": "http://bücher.example.com:8080/\u3002",
    }
    return {name: text.encode() for name, text in texts.items()}


def main() -> None:
    """Write what is missing."""
    corpora = {
        "messages": _messages(),
        "images": _images(),
        "tensors": _tensors(),
        "counts": _counts(),
        "sources": _sources(),
    }
    for target, files in corpora.items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            if not (folder / name).exists():
                (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
