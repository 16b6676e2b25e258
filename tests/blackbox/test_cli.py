"""The command ``segrpc`` as a process, against a real server."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO

from tests.photos import photo_path
from tests.server_process import ServerProcess

PHOTO = str(photo_path("chelsea"))


def run(server: ServerProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "segrpc.client.cli", *arguments]
    environment = {**os.environ, "SEGRPC_SERVER": server.target}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_segment_writes_an_overlay_and_coco_results(server: ServerProcess, tmp_path: Path) -> None:
    picture, results = tmp_path / "overlay.png", tmp_path / "masks.json"
    prompts = ["--point", "200,150", "--point", "30,30,background", "--box", "10,5,390,295"]
    done = run(server, "segment", PHOTO, *prompts, "--output", str(picture), "--save-rle", str(results))
    assert done.returncode == 0, done.stderr
    assert "(best)" in done.stdout
    with Image.open(PHOTO) as photo, Image.open(picture) as overlay:
        assert overlay.size == photo.size
        assert np.any(np.asarray(overlay) != np.asarray(photo))
        width, height = photo.size

    dataset = COCO()
    dataset.dataset = {"images": [{"id": 0, "width": width, "height": height}], "categories": [{"id": 1}]}
    dataset.createIndex()
    with warnings.catch_warnings(action="ignore"):
        loaded = dataset.loadRes(str(results))
    annotations = loaded.loadAnns(loaded.getAnnIds())
    assert len(annotations) == 3
    for annotation in annotations:
        mask = coco.decode(annotation["segmentation"])
        assert mask.shape == (height, width)
        assert mask.sum() == annotation["area"]
        assert coco.toBbox(annotation["segmentation"]).tolist() == list(annotation["bbox"])


def test_segment_for_programs(server: ServerProcess) -> None:
    done = run(server, "segment", PHOTO, "--point", "200,150", "--json", "--single")
    answer = json.loads(done.stdout)
    assert answer["model"] == "grabcut"
    assert len(answer["masks"]) == 1
    assert answer["timing_ms"]["total"] <= answer["latency_ms"]


def test_encode(sam2_server: ServerProcess, tmp_path: Path) -> None:
    saved = tmp_path / "embedding.npz"
    done = run(sam2_server, "encode", PHOTO, "--save", str(saved))
    assert done.returncode == 0, done.stderr
    assert "sha256:" in done.stdout
    with np.load(saved) as arrays:
        assert arrays["image_embedding"].shape == (1, 256, 64, 64)
        assert arrays["high_resolution_features_1"].shape == (1, 64, 128, 128)
    assert json.loads(run(sam2_server, "encode", PHOTO, "--json").stdout)["model"] == "sam2.1-hiera-tiny"


def test_models_and_health(server: ServerProcess) -> None:
    assert "grabcut (default)" in run(server, "models").stdout
    assert json.loads(run(server, "models", "--json").stdout)[0]["mask_counts"] == [1, 3]
    assert run(server, "health").returncode == 0
    assert run(server, "health", "--service", "no.such.Service").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["segment", "no-such-file.jpg", "--point", "1,1"], 2, "no-such-file.jpg"),
        (["segment", PHOTO, "--point", "1"], 2, "--point"),
        (["segment", PHOTO, "--point", "1,2,maybe"], 2, "--point"),
        (["segment", PHOTO, "--box", "1,2,3"], 2, "--box"),
        (["segment", PHOTO, "--point", "9999,1"], 1, "prompts[0].points[0].x"),
        (["segment", PHOTO], 1, "prompts"),
        (["segment", PHOTO, "--point", "1,1", "--model", "sam9"], 1, "MODEL_NOT_FOUND"),
        (["segment", "file:///etc/passwd", "--point", "1,1"], 1, "URI_NOT_ALLOWED"),
        (["encode", PHOTO], 1, "CAPABILITY_MISSING"),
        (["health", "--server", "127.0.0.1:9"], 1, "UNAVAILABLE"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(
    server: ServerProcess, arguments: list[str], status: int, said: str
) -> None:
    done = run(server, *arguments)
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr
