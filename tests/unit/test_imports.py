"""What starting imports, in processes of its own: nobody waits for what is not needed."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        ("segrpc.service.cli", {"torch", "sam2", "cv2", "httpx", "huggingface_hub"}),
        ("segrpc.service.engine.worker", {"torch", "sam2", "cv2", "httpx", "grpc", "google"}),
        ("segrpc.service.models.grabcut", {"torch", "sam2", "httpx", "grpc", "google"}),
        ("segrpc.client.cli", {"torch", "cv2", "httpx", "pydantic", "pycocotools.coco"}),
    ],
)
def test_what_is_not_needed_is_not_imported(module: str, unneeded: set[str]) -> None:
    command = [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"]
    imported = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.split()
    assert module in imported
    assert not unneeded & set(imported)
