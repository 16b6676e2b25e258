"""Engines of both kinds with the test models, which worker processes find by their entry points."""

import io
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from PIL import Image

from segrpc.service.engine.base import CancelToken, EncodeJob, Engine, EngineOptions, SegmentJob, SegmentResult
from segrpc.service.engine.factory import EngineKind, create_engine
from segrpc.service.images.decode import digest_of
from segrpc.service.schemas import ModelDeploymentConfig, SegmentationInput
from tests.unit.engine.gates import unblock
from tests.unit.engine.models import ENTRY_POINTS

StartEngine: TypeAlias = Callable[..., Awaitable[Engine]]

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def _installed_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make the test models an installed package, for this process and for the workers that it starts."""
    site = tmp_path_factory.mktemp("site")
    info = site / "engine_test_models-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: engine-test-models\nVersion: 1.0\n")
    points = (f"{name} = tests.unit.engine.models:{name.title().replace('-', '')}" for name in ENTRY_POINTS)
    (info / "entry_points.txt").write_text("[segrpc.models]\n" + "\n".join(points))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", f"{ROOT}:{site}")
        yield


@pytest.fixture(params=["inline", "process"])
def kind(request: pytest.FixtureRequest) -> EngineKind:
    chosen: EngineKind = request.param
    return chosen


@pytest.fixture
async def start_engine(kind: EngineKind, tmp_path: Path) -> AsyncIterator[StartEngine]:
    """Start an engine with the test models named; it is stopped after the test, and must be idle then."""
    async with AsyncExitStack() as stack:

        async def start(*models: str, **options: Any) -> Engine:
            return await stack.enter_async_context(running(kind, tmp_path, *models, **options))

        yield start


@asynccontextmanager
async def running(kind: EngineKind, folder: Path, *models: str, **options: Any) -> AsyncIterator[Engine]:
    """Run an engine with the test models named; ``held`` and ``together`` use the folder."""
    params = {name: {"folder": str(folder)} for name in ("held", "together")}
    configs = tuple(ModelDeploymentConfig(name=name, model_params=params.get(name, {})) for name in models)
    engine = create_engine(kind, EngineOptions(configs, **options))
    await engine.start()
    try:
        yield engine
    finally:
        unblock(folder)
        await engine.stop()
        assert engine.stats().pending == 0


def picture(seed: int, width: int = 200, height: int = 30) -> bytes:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def click(image: bytes, x: float = 120.0, model: str = "held", owner: str = "", **more: Any) -> SegmentJob:
    """A job with one click; the model ``held`` takes its ``x`` as the threshold of brightness."""
    given = SegmentationInput(image=image, points=[[[x, 5]]], **more)
    return SegmentJob(model, digest_of(image), given, owner=owner)


def many_clicks(image: bytes, count: int, model: str = "held", owner: str = "", **more: Any) -> SegmentJob:
    """A job with so many prompts, of a click each."""
    given = SegmentationInput(image=image, points=[[[100.0 + i, 5]] for i in range(count)], **more)
    return SegmentJob(model, digest_of(image), given, owner=owner)


def encoding(image: bytes, model: str = "held", **more: Any) -> EncodeJob:
    """A job that has an image encoded."""
    return EncodeJob(model, digest_of(image), image, **more)


async def ask(engine: Engine, image: bytes, x: float = 120.0, **more: Any) -> SegmentResult:
    """Have a click answered."""
    return await engine.segment(click(image, x, **more), CancelToken())
