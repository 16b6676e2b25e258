"""The reference predictor and a server with the same checkpoint."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sam2.build_sam import build_sam2

from segrpc.client import SegmentationClient
from segrpc.service.models.sam2.catalog import VARIANTS
from tests.checkpoints import write_checkpoint
from tests.parity.reference import THREADS, Memory, PatientReference
from tests.server_process import ServerProcess


class Pair:
    """The reference in this process and a client of a server with the same weights."""

    def __init__(self, reference: PatientReference, client: SegmentationClient, checkpoint: Path) -> None:
        self.reference = reference
        self.client = client
        self.checkpoint = checkpoint


@pytest.fixture(scope="session")
def memory() -> Memory:
    """What references made of images, for both modules: they look at the same ones."""
    return Memory()


@pytest.fixture(scope="module")
def make_pair(tmp_path_factory: pytest.TempPathFactory, memory: Memory) -> Iterator[Callable[..., Pair]]:
    """Make pairs of a model name; one server at a time is kept, because the large ones fill the memory."""
    torch.set_num_threads(THREADS)
    open_now: list[tuple[ServerProcess, SegmentationClient, Path]] = []

    def close() -> None:
        while open_now:
            server, client, checkpoint = open_now.pop()
            client.close()
            server.__exit__(None, None, None)
            checkpoint.unlink()

    def make(name: str, *, contrast: float = 1.0, decoder: str = "reference") -> Pair:
        close()
        folder = tmp_path_factory.mktemp(name)
        checkpoint = write_checkpoint(name, folder, contrast=contrast)
        options = ["--checkpoint", str(checkpoint), "--threads", str(THREADS), "--decoder", decoder]
        server = ServerProcess(*options, log=folder / "log")
        client = SegmentationClient(server.target, timeout=240)
        open_now.append((server, client, checkpoint))
        model = build_sam2(VARIANTS[name].config, str(checkpoint), device="cpu")
        memory.share(model)
        return Pair(PatientReference(model), client, checkpoint)

    yield make
    close()
