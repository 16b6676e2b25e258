"""``segrpc``: segment images from the command line."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from segrpc.client.channel import DEFAULT_TARGET, DEFAULT_TIMEOUT
from segrpc.client.errors import SegmentationError
from segrpc.client.flow import SegmentOptions
from segrpc.client.render import open_photo, overlay
from segrpc.client.sessions import cli as sessions
from segrpc.client.sync import SegmentationClient
from segrpc.client.types import Mask, SegmentationResult, Timing

FOREGROUND, BACKGROUND = "foreground", "background"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments without the program's name. Default: those of the process.

    Returns:
        The exit status: 0 if all went well, 1 if the server refused or is not ready, 2 for wrong usage.
    """
    args = _parser().parse_args(argv)
    try:
        with SegmentationClient(
            args.server,
            timeout=args.timeout,
            token=args.token or os.environ.get("SEGRPC_TOKEN") or None,
            tls=args.tls,
            ca=args.ca,
            client_certificate=args.cert,
            client_key=args.key,
        ) as client:
            return int(args.run(client, args))
    except SegmentationError as error:
        print(f"segrpc: {error}", file=sys.stderr)
        for violation in error.violations:
            print(f"  {violation.field}: {violation.description}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"segrpc: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="segrpc", description="Segment images with a segrpc server.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    server = os.environ.get("SEGRPC_SERVER", DEFAULT_TARGET)
    common.add_argument("--server", default=server, metavar="HOST:PORT", help=f"default: SEGRPC_SERVER, or {server}")
    common.add_argument("--tls", action="store_true", help="connect with TLS; the next three imply it")
    common.add_argument("--ca", type=Path, metavar="FILE", help="authorities to trust (PEM); default: the system's")
    common.add_argument("--cert", type=Path, metavar="FILE", help="this client's certificate (PEM)")
    common.add_argument("--key", type=Path, metavar="FILE", help="its private key (PEM)")
    common.add_argument(
        "--token", help="API key or JSON Web Token; default: SEGRPC_TOKEN, which other users do not see"
    )
    common.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT, metavar="SECONDS")
    common.add_argument("--json", action="store_true", help="print JSON, for programs")

    segment = commands.add_parser("segment", parents=[common], help="segment one object in an image")
    segment.add_argument("image", help="a file, or a URI that the server may read")
    segment.add_argument(
        "--point", type=_point, action="append", default=[], metavar="X,Y[,background]", help="a click; may be repeated"
    )
    segment.add_argument("--box", type=_box, metavar="X0,Y0,X1,Y1", help="a box around the object")
    segment.add_argument("--model", default="", metavar="NAME", help="default: the server's default model")
    segment.add_argument("--single", action="store_true", help="ask for one mask instead of several candidates")
    segment.add_argument("--output", type=Path, metavar="FILE", help="write the best mask over the image as a picture")
    segment.add_argument("--save-rle", type=Path, metavar="FILE", help="write all masks as COCO results (JSON)")
    segment.set_defaults(run=_segment)

    encode = commands.add_parser("encode", parents=[common], help="encode an image ahead of the first click")
    encode.add_argument("image", help="a file, or a URI that the server may read")
    encode.add_argument("--model", default="", metavar="NAME", help="default: the server's default model")
    encode.add_argument("--save", type=Path, metavar="FILE", help="write the embedding as an .npz file (float32)")
    encode.set_defaults(run=_encode)

    models = commands.add_parser("models", parents=[common], help="list the models that are served")
    models.set_defaults(run=_models)

    sessions.add_commands(commands, common)

    health = commands.add_parser("health", parents=[common], help="tell whether the server is ready (exit status 0)")
    health.add_argument("--service", default="", metavar="NAME", help="one service; default: the whole server")
    health.set_defaults(run=_health)
    return parser


def _point(text: str) -> tuple[float, float, int]:
    x, y, *label = text.split(",")
    if label not in ([], [FOREGROUND], [BACKGROUND]):
        raise ValueError(text)  # argparse reports it with the option's name
    return float(x), float(y), 0 if label == [BACKGROUND] else 1


def _box(text: str) -> tuple[float, float, float, float]:
    x_min, y_min, x_max, y_max = (float(number) for number in text.split(","))
    return x_min, y_min, x_max, y_max


def _segment(client: SegmentationClient, args: argparse.Namespace) -> int:
    prompts: SegmentOptions = {"model": args.model, "multimask_output": not args.single}
    if args.point:
        prompts["points"] = [(x, y) for x, y, _ in args.point]
        prompts["labels"] = [label for _, _, label in args.point]
    if args.box:
        prompts["boxes"] = args.box
    start = time.perf_counter()
    result = client.segment(args.image, **prompts)
    milliseconds = (time.perf_counter() - start) * 1e3
    masks = [mask for prediction in result.predictions for mask in prediction.masks]
    if args.save_rle:
        args.save_rle.write_text(json.dumps([mask.to_coco() for mask in masks]), "utf-8")
    if args.output:
        _write_overlay(args, prompts, result)
    if args.json:
        print(json.dumps(_as_json(result, masks, milliseconds)))
    else:
        _print_masks(result, masks, milliseconds)
    return 0


def _write_overlay(args: argparse.Namespace, prompts: SegmentOptions, result: SegmentationResult) -> None:
    best = [prediction.best for prediction in result.predictions]
    drawn: dict[str, Any] = {name: prompts.get(name) for name in ("points", "labels", "boxes")}
    overlay(open_photo(args.image), best, **drawn).save(args.output)


def _as_json(result: SegmentationResult, masks: list[Mask], milliseconds: float) -> dict[str, Any]:
    return {
        "model": result.model,
        "image": {"digest": result.image.digest, "width": result.image.width, "height": result.image.height},
        "masks": [{**mask.to_coco(), "box": mask.box, "area": mask.area} for mask in masks],
        "best": result.predictions[0].best_index,
        "latency_ms": round(milliseconds, 3),
        "timing_ms": _timing_ms(result.timing),
        "embedding_cached": result.timing.embedding_cached,
    }


def _timing_ms(timing: Timing) -> dict[str, float]:
    stages = ("queue", "decode_image", "encode_image", "decode_mask", "postprocess", "total")
    return {stage: round(getattr(timing, stage) * 1e3, 3) for stage in stages}


def _print_masks(result: SegmentationResult, masks: list[Mask], milliseconds: float) -> None:
    best = result.predictions[0].best
    print(f"{result.model}, {result.image.width} x {result.image.height} pixels, {milliseconds:.0f} ms")
    print(f"{'mask':>4} {'score':>6} {'area':>12}  box")
    for i, mask in enumerate(masks):
        box = "empty" if mask.box is None else ",".join(f"{corner:g}" for corner in mask.box)
        print(f"{i:4} {mask.score:6.3f} {mask.area:9} px  {box}{'  (best)' if mask is best else ''}")


def _encode(client: SegmentationClient, args: argparse.Namespace) -> int:
    encoded = client.encode(args.image, model=args.model, return_image_embedding=args.save is not None)
    if args.save and encoded.embedding:
        features = encoded.embedding.high_resolution_features
        arrays: dict[str, Any] = {f"high_resolution_features_{i}": array for i, array in enumerate(features)}
        np.savez(args.save, image_embedding=encoded.embedding.image_embedding, **arrays)
    image = encoded.image
    if args.json:
        about = {"digest": image.digest, "width": image.width, "height": image.height, "model": encoded.model}
        print(json.dumps({**about, "timing_ms": _timing_ms(encoded.timing)}))
    else:
        cached = ", was cached" if encoded.timing.embedding_cached else ""
        print(f"{encoded.model}: {image.width} x {image.height} pixels, {encoded.timing.total * 1e3:.0f} ms{cached}")
        print(image.digest)
    return 0


def _models(client: SegmentationClient, args: argparse.Namespace) -> int:
    models = client.models()
    if args.json:
        print(json.dumps([asdict(model) for model in models]))
        return 0
    for model in models:
        able = [name for name in ("points", "boxes", "mask_input", "embeddings") if getattr(model, name)]
        default = " (default)" if model.is_default else ""
        print(f"{model.name}{default}: {model.family} on {model.device}, {model.compute_dtype}; {', '.join(able)}")
    return 0


def _health(client: SegmentationClient, args: argparse.Namespace) -> int:
    ready = client.health(args.service)
    print(json.dumps({"serving": ready}) if args.json else "serving" if ready else "not serving")
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main())
