"""What ``make demo`` runs: start a server, segment the shipped photos over a real socket, write overlays.

python -m tests.demo --output demo-output [--checkpoint sam2.1_hiera_tiny.pt]
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from segrpc.client import Mask, SegmentationClient
from segrpc.client.render import overlay
from tests.photos import NAMES, Prompts, load_image, photo_path, prompts_of
from tests.server_process import ServerProcess

Logits = npt.NDArray[np.float32]


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
            rows = [row for name in NAMES for row in segment(client, name, args.output)]
    print_table(rows)
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


def print_table(rows: list[Row]) -> None:
    """Print what was found."""
    print(f"\n{'photo':14} {'prompt':9} {'score':>6} {'area':>9} {'of image':>9} {'latency':>10}")
    for row in rows:
        share = row.mask.area / (row.mask.width * row.mask.height)
        print(
            f"{row.photo:14} {row.prompt:9} {row.mask.score:6.2f} {row.mask.area:7} px {share:9.1%} "
            f"{row.milliseconds:7.0f} ms"
        )


if __name__ == "__main__":
    main()
