"""``segrpc refine`` and ``segrpc replay``: sessions from the command line."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from segrpc.client.codec import DIGEST_SCHEME, URI_SCHEMES
from segrpc.client.render import open_photo
from segrpc.client.replay import Replay, ReplayedRound
from segrpc.client.sessions.terminal import Terminal, picture, typed_lines
from segrpc.client.sessions.types import RefineOptions
from segrpc.client.sync import SegmentationClient
from segrpc.client.types import Mask


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands to those of ``segrpc``; ``commands`` is what ``add_subparsers`` returned."""
    refine = commands.add_parser("refine", parents=[common], help="segment objects in a session, command by command")
    refine.add_argument("image", help="a file, or a URI that the server may read")
    refine.add_argument("--model", default="", metavar="NAME", help="default: the server's default model")
    refine.add_argument("--single", action="store_true", help="ask for one mask instead of several candidates")
    refine.add_argument("--policy", choices=["latest_wins", "every_edit"], default="latest_wins")
    refine.add_argument("--no-feedback", action="store_true", help="do not feed the mask back into the next round")
    refine.add_argument("--output", type=Path, metavar="FILE", help="write the masks over the image after each step")
    refine.add_argument("--export", type=Path, metavar="FILE", help="write the session at its end (JSON), for replay")
    refine.set_defaults(run=_refine)

    replay = commands.add_parser("replay", parents=[common], help="compute an exported session again, and compare")
    replay.add_argument("export", type=Path, help="what `refine --export` wrote")
    replay.add_argument("image", help="the image that it is about")
    replay.add_argument("--output", type=Path, metavar="FILE", help="write the final masks over the image")
    replay.set_defaults(run=_replay)


def _refine(client: SegmentationClient, args: argparse.Namespace) -> int:
    is_elsewhere = args.image.lower().startswith((*URI_SCHEMES, DIGEST_SCHEME))
    photo = None if is_elsewhere and not args.output else open_photo(args.image)
    options: RefineOptions = {
        "model": args.model,
        "multimask_output": not args.single,
        "edit_policy": args.policy,
        "mask_feedback": "none" if args.no_feedback else "logits",
    }
    with client.refine(args.image, **options) as session:
        if sys.stdin.isatty():
            print(f"{session.image.width} x {session.image.height} pixels; help lists the commands")
        try:
            all_well = Terminal(session, photo, args.output, args.json).run(typed_lines("segrpc> "))
        finally:
            if args.export:
                args.export.write_text(json.dumps(session.export()), "utf-8")
    return 0 if all_well else 1


def _replay(client: SegmentationClient, args: argparse.Namespace) -> int:
    export = json.loads(args.export.read_text("utf-8"))
    photo = open_photo(args.image) if args.output else None
    replay = client.replay(export, args.image)
    if photo is not None:
        picture(photo, _shown(export, replay)).save(args.output)
    if args.json:
        print(json.dumps(_as_json(replay)))
    else:
        _print(replay)
    return 0 if replay.identical else 1


def _shown(export: dict[str, Any], replay: Replay) -> list[tuple[Mask, ReplayedRound]]:
    rounds = {one.revision: one for one in replay.rounds}
    shown = []
    for one in export["objects"].values():
        if one["shown_revision"] in rounds:
            last = rounds[one["shown_revision"]]
            shown.append((last.prediction.masks[one["selected"]], last))
    return shown


def _as_json(replay: Replay) -> dict[str, Any]:
    rounds = [
        {"revision": one.revision, "object_id": one.object_id, "identical": one.identical} for one in replay.rounds
    ]
    return {"identical": replay.identical, "same_image": replay.same_image, "rounds": rounds}


def _print(replay: Replay) -> None:
    words = {True: "identical", False: "DIFFERENT", None: "not recorded"}
    for one in replay.rounds:
        print(f"object {one.object_id}, revision {one.revision}: {words[one.identical]}")
    if replay.same_image is False:
        print("the image is another file than that of the session")
    compared = sum(one.identical is not None for one in replay.rounds)
    print(f"{compared - len(replay.different)} of {compared} recorded rounds are identical")
