"""What ``make demo`` runs: start a server, segment the shipped photos over a real socket, write overlays.

First each photo by single calls, then one in an interactive session whose worker process is killed in between.

python -m tests.demo --output demo-output [--checkpoint sam2.1_hiera_tiny.pt]
"""

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from segrpc.client import Mask, RefineResult, RefineSession, SegmentationClient
from segrpc.client.render import overlay
from tests.photos import NAMES, Prompts, load_image, photo_path, prompts_of
from tests.server_process import ServerProcess

Logits = npt.NDArray[np.float32]

SESSION_PHOTO = "astronaut"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    photo: str
    prompt: str
    mask: Mask
    milliseconds: float


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Segment the shipped photos and write overlays.")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the PNG files")
    parser.add_argument("--checkpoint", help="SAM 2 checkpoint to use instead of GrabCut")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    options = ["--checkpoint", args.checkpoint] if args.checkpoint else []
    with tempfile.TemporaryDirectory() as folder, ServerProcess(*options, log=Path(folder) / "log") as server:
        print(server.greeting)
        with SegmentationClient(server.target) as client:
            print_table([row for name in NAMES for row in segment(client, name, args.output)])
            print(f"\nA session on {SESSION_PHOTO}, with three clicks, an undo, and a killed worker:")
            print_table(refine(client, server, args.output))
    print(f"\noverlays are in {args.output}/")


def segment(client: SegmentationClient, name: str, output: Path) -> list[Row]:
    """Segment a photo by points and by a box, and refine the box's mask with the points; write an overlay of each."""
    image, prompts = load_image(name), prompts_of(name)
    by_points, _ = ask(client, name, "points", prompts.points_only(), image, output)
    by_box, logits = ask(client, name, "box", prompts.box_only(), image, output)
    refined, _ = ask(client, name, "refined", prompts, image, output, mask_input=logits)
    return [by_points, by_box, refined]


def ask(
    client: SegmentationClient,
    name: str,
    step: str,
    prompts: Prompts,
    image: Image.Image,
    output: Path,
    mask_input: Logits | None = None,
) -> tuple[Row, Logits]:
    """Ask for a mask and write its overlay; return the line of the table and the mask's logits."""
    start = time.perf_counter()
    result = client.segment(
        photo_path(name),
        **prompts.arguments(),
        mask_input=mask_input,
        multimask_output=mask_input is None,
        return_logits=True,
    )
    milliseconds = (time.perf_counter() - start) * 1e3
    (prediction,) = result.predictions
    assert result.logits is not None
    overlay(image, [prediction.best], **prompts.arguments()).save(output / f"{name}-{step}.png")
    return Row(name, step, prediction.best, milliseconds), result.logits[0, prediction.best_index]


def refine(client: SegmentationClient, server: ServerProcess, output: Path) -> list[Row]:
    """Click, undo and click on in a session; kill the worker in between. Write an overlay after each step."""
    image = load_image(SESSION_PHOTO)
    rows: list[Row] = []
    with client.refine(photo_path(SESSION_PHOTO)) as session:

        def step(name: str, edit: Callable[[], RefineResult]) -> None:
            start = time.perf_counter()
            mask = edit().mask
            milliseconds = (time.perf_counter() - start) * 1e3
            assert mask is not None
            shown = shown_prompts(session)
            overlay(image, [mask], points=shown.points, labels=shown.labels).save(
                output / f"session-{len(rows) + 1}.png"
            )
            rows.append(Row(SESSION_PHOTO, name, mask, milliseconds))

        step("click the suit", lambda: session.click(130, 320))
        step("and the face", lambda: session.click(215, 120))
        step("and the hair", lambda: session.click(270, 60))
        step("undo", session.undo)
        for pid in server.stats()["engine"]["worker_pids"]:
            os.kill(pid, signal.SIGKILL)
        step("worker killed; not the flag", lambda: session.click(25, 330, label=0))
    return rows


def shown_prompts(session: RefineSession) -> Prompts:
    """Return the points behind the mask that a session shows."""
    shown = session.shown_round()
    return Prompts(shown.points, shown.labels, shown.box) if shown else Prompts((), (), None)


def print_table(rows: list[Row]) -> None:
    """Print what was found."""
    print(f"\n{'photo':14} {'prompt':27} {'score':>6} {'area':>9} {'of image':>9} {'latency':>10}")
    for row in rows:
        share = row.mask.area / (row.mask.width * row.mask.height)
        print(
            f"{row.photo:14} {row.prompt:27} {row.mask.score:6.2f} {row.mask.area:7} px {share:9.1%} "
            f"{row.milliseconds:7.0f} ms"
        )


if __name__ == "__main__":
    main()
