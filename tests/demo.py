"""What ``make demo`` runs: start a server, segment the shipped photos over a real socket, write overlays.

python -m tests.demo --output demo-output [--checkpoint sam2.1_hiera_tiny.pt]
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from segrpc.client import Mask, SegmentationClient, SegmentationResult
from segrpc.client.render import overlay

from tests.photos import NAMES, Prompts, load_image, photo_path, prompts_of
from tests.server_process import ServerProcess


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
    """Segment a photo by points, by a box, and refine the better start; write an overlay of each."""
    image, prompts = load_image(name), prompts_of(name)
    rows = []
    for step, prompt in (("points", prompts.points_only()), ("box", prompts.box_only())):
        rows.append(ask(client, name, step, prompt, image, output))
    best = max(rows, key=lambda row: row.mask.score)
    print(f"{name}: refining the mask of the {best.prompt}")
    start = prompts.points_only() if best.prompt == "points" else prompts.box_only()
    first = client.segment(photo_path(name), **start.arguments(), return_logits=True)
    assert first.logits is not None
    chosen = first.predictions[0].masks.index(first.predictions[0].best)
    refined = ask(client, name, "refined", prompts, image, output, mask_input=first.logits[0, chosen])
    return [*rows, refined]


def ask(
    client: SegmentationClient,
    name: str,
    step: str,
    prompts: Prompts,
    image: Image.Image,
    output: Path,
    mask_input: object = None,
) -> Row:
    """Ask for one mask and write its overlay."""
    start = time.perf_counter()
    result: SegmentationResult = client.segment(
        photo_path(name),
        **prompts.arguments(),
        mask_input=mask_input,
        multimask_output=mask_input is None,
    )
    elapsed = time.perf_counter() - start
    mask = result.predictions[0].best
    picture = overlay(image, [mask], **prompts.arguments())
    picture.save(output / f"{name}-{step}.png")
    return Row(name, step, mask, elapsed * 1e3)


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
