"""The README's `buf curl` commands: reflection, health, and a segmentation in JSON."""

import base64
import json
import subprocess
import sys
from pathlib import Path

from tests.server_process import ServerProcess

BUF = Path(sys.executable).parent / "buf"


def curl(server: ServerProcess, method: str, *options: str, body: str | None = None) -> str:
    command = [str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", *options]
    if body is not None:
        command += ["-d", "@-"]
    url = f"http://{server.target}/{method}".rstrip("/")
    done = subprocess.run([*command, url], input=body, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reflection_lists_the_services(server: ServerProcess) -> None:
    listed = curl(server, "", "--list-methods").split()
    assert {"segrpc.v1.SegmentationService/Refine", "segrpc.v1.ModelService/GetModel"} <= set(listed)
    assert "grpc.health.v1.Health/Check" in listed


def test_health_of_a_service(server: ServerProcess) -> None:
    body = json.dumps({"service": "segrpc.v1.SegmentationService"})
    assert json.loads(curl(server, "grpc.health.v1.Health/Check", body=body)) == {"status": "SERVING"}


def test_an_image_in_base64_is_segmented(server: ServerProcess, photo: bytes) -> None:
    image = base64.b64encode(photo).decode("ascii")
    body = json.dumps({"image": {"data": image}, "prompts": [{"points": [{"x": 220, "y": 150}]}]})
    answer = json.loads(curl(server, "segrpc.v1.SegmentationService/Segment", body=body))
    assert len(answer["predictions"][0]["masks"]) == 3
