"""What every engine does, whether the models run in this process or in workers."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from segrpc.service.engine.base import CancelToken, Engine, EngineOptions, SegmentJob, SegmentResult
from segrpc.service.engine.factory import EngineKind, create_engine
from segrpc.service.errors import (
    CapabilityMissingError,
    DeadlineError,
    DrainingError,
    EmbeddingMismatchError,
    ImageUndecodableError,
    InvalidFieldError,
    ModelLoadError,
    ModelNotFoundError,
    OverloadedError,
)
from segrpc.service.images.decode import decode_image, digest_of
from segrpc.service.models.registry import create_model
from segrpc.service.schemas import (
    ModelDeploymentConfig,
    ModelMetadata,
    NDArrayFloat,
    SegmentationInput,
    SegmentationOutput,
)
from tests.checkpoints import write_checkpoint
from tests.photos import photo_bytes
from tests.unit.engine.conftest import StartEngine, ask, click, encoding, picture
from tests.unit.engine.gates import Gate, embeds, log_of

SAM2 = "sam2.1-hiera-tiny"
A, B, C = picture(1), picture(2), picture(3)


async def settled(engine: Engine, image: bytes) -> None:
    """Return once what was asked before was looked for in the cache, because both queues are worked off in order."""
    await engine.encode(encoding(image), CancelToken())


async def dropped(engine: Engine, pending: int) -> None:
    """Return once no more than so many jobs are pending."""
    while engine.stats().pending > pending:  # noqa: ASYNC110 - an engine tells nobody when it drops a work
        await asyncio.sleep(0)


async def encoding_count(engine: Engine, count: int) -> None:
    """Return once so many images are being encoded or wait for it."""
    while engine.stats().encoding != count:  # noqa: ASYNC110 - an engine tells nobody of its queues
        await asyncio.sleep(0)


async def queued(engine: Engine, image: bytes, pending: int) -> None:
    """Return once what was asked before is in the queue of decodes: a work behind it was dropped from there."""
    token = CancelToken()
    marker = asyncio.create_task(engine.segment(click(image, model=engine.models[0].name), token))
    for _ in range(10):
        await asyncio.sleep(0)  # it is sent then
    token.cancel()
    await asyncio.wait({marker})
    await dropped(engine, pending)


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, tuple[ModelDeploymentConfig, ModelMetadata, SegmentationOutput]]]:
    """Real models, and what they answer to `real_click` without any engine."""
    threads = torch.get_num_threads()
    file = write_checkpoint(SAM2, tmp_path_factory.mktemp("checkpoint"))
    params = {SAM2: {"checkpoint": str(file), "threads": 2, "device": "cpu"}, "grabcut": {}}
    found = {}
    for name in params:
        model = create_model(ModelDeploymentConfig(name=name, model_params=params[name]))
        model.load_model()
        found[name] = model.config, model.metadata, model.predict(real_click(name).input)
    yield found
    torch.set_num_threads(threads)


def real_click(model: str) -> SegmentJob:
    return click(photo_bytes("chelsea"), 60.0, model, return_logits=True)


async def test_real_models_answer_as_they_do_alone(
    kind: EngineKind, alone: dict[str, tuple[ModelDeploymentConfig, ModelMetadata, SegmentationOutput]]
) -> None:
    engine = create_engine(kind, EngineOptions(tuple(config for config, _, _ in alone.values())))
    await engine.start()
    try:
        assert [(model.name, model.promptable) for model in engine.models] == [(SAM2, True), ("grabcut", True)]
        for served, (_, metadata, expected) in zip(engine.models, alone.values(), strict=True):
            assert served.metadata == metadata
            first, again = [await engine.segment(real_click(served.name), CancelToken()) for _ in range(2)]
            assert first.output == again.output == expected
            assert not first.times.embedding_cached
            assert again.times.embedding_cached
            assert (again.times.decode_image, again.times.encode_image) == (0, 0)
            assert min(first.times.decode_image, first.times.encode_image, again.times.decode_mask) > 0
            assert (first.header.width, first.header.height) == (451, 300)
        await given_embeddings(engine, photo_bytes("chelsea"))
    finally:
        await engine.stop()
    assert engine.models == ()


async def given_embeddings(engine: Engine, photo: bytes) -> None:
    """An embedding that was returned and is given back replaces the image's own."""
    encoded = await engine.encode(encoding(photo, SAM2, return_embedding=True), CancelToken())
    assert encoded.image_embedding is not None
    assert encoded.image_embedding.shape == (1, 256, 64, 64)
    assert encoded.times.embedding_cached
    expected = await ask(engine, photo, 60.0, model=SAM2)
    before = engine.stats().encodes
    other = photo_bytes("coffee")  # its size differs: the masks get that of the image
    given = {
        "image_embedding": encoded.image_embedding,
        "high_resolution_features": encoded.high_resolution_features,
    }
    same = await ask(engine, photo, 60.0, model=SAM2, **given)
    assert same.output == expected.output
    assert same.times.embedding_cached
    borrowed = await ask(engine, other, 60.0, model=SAM2, **given)
    assert borrowed.output.masks[0][0].size == (400, 600)
    assert engine.stats().encodes == before
    given["image_embedding"] = NDArrayFloat.from_numpy(np.zeros((1, 256, 32, 32)))
    with pytest.raises(EmbeddingMismatchError, match=r"\[1, 256, 64, 64\]") as caught:
        await ask(engine, photo, 60.0, model=SAM2, **given)
    assert [violation.field for violation in caught.value.violations] == ["image_embedding"]


async def test_many_first_requests_encode_once(start_engine: StartEngine, tmp_path: Path) -> None:
    engine = await start_engine("held")
    await ask(engine, B)
    gate = Gate(tmp_path, "embed")
    asked = [asyncio.create_task(ask(engine, A, 100.0 + i)) for i in range(8)]
    await gate.reached()
    await settled(engine, B)
    await gate.open()
    results = await asyncio.gather(*asked)
    assert embeds(tmp_path) == engine.stats().encodes == 2
    assert [result.times.embedding_cached for result in results] == [False] * 8
    waited = [result for result in results if result.times.encode_image == 0]
    assert len(waited) == 7
    assert all(result.times.queue > 0 for result in waited)
    assert len({result.output.masks[0][0].counts for result in results}) > 1


async def test_a_click_never_waits_for_an_encoding(start_engine: StartEngine, tmp_path: Path) -> None:
    engine = await start_engine("held")
    expected = await ask(engine, A)
    gate = Gate(tmp_path, "embed")
    held = asyncio.create_task(ask(engine, B))
    await gate.reached()
    assert (await ask(engine, A)).output == expected.output
    assert not held.done()
    await gate.open()
    await held


async def test_an_encoding_is_dropped_when_nobody_needs_it(start_engine: StartEngine, tmp_path: Path) -> None:
    engine = await start_engine("held")
    await ask(engine, C)
    gate = Gate(tmp_path, "embed")
    first = asyncio.create_task(ask(engine, A))
    await gate.reached()
    leaving = [asyncio.create_task(ask(engine, B, x)) for x in (1.0, 2.0)]
    await settled(engine, C)
    for task in leaving:
        task.cancel()
    for task in leaving:
        with pytest.raises(asyncio.CancelledError):
            await task
    await dropped(engine, 1)
    await gate.open()
    await first
    assert (embeds(tmp_path), engine.stats().encodes) == (2, 2)


async def test_an_encoding_goes_on_while_one_needs_it(start_engine: StartEngine, tmp_path: Path) -> None:
    engine = await start_engine("held")
    await ask(engine, C)
    gate = Gate(tmp_path, "embed")
    first = asyncio.create_task(ask(engine, A))
    await gate.reached()
    leaving, staying = (asyncio.create_task(ask(engine, B, x)) for x in (1.0, 2.0))
    await settled(engine, C)
    leaving.cancel()
    await asyncio.wait({leaving})
    await gate.open()
    await first
    assert len((await staying).output.masks) == 1
    assert embeds(tmp_path) == 3


async def test_who_leaves_is_let_go_at_once_and_counts_until_the_work_ends(
    start_engine: StartEngine, tmp_path: Path
) -> None:
    engine = await start_engine("held", max_pending_encodes=2)
    gate = Gate(tmp_path, "embed")
    token = CancelToken()
    left = asyncio.create_task(engine.segment(click(A), token))
    await gate.reached()
    token.cancel()
    with pytest.raises(DeadlineError, match="caller left"):
        await left
    assert engine.stats().pending == 1
    queued = asyncio.create_task(ask(engine, B))
    await encoding_count(engine, 2)
    with pytest.raises(OverloadedError, match="2 jobs") as caught:
        await ask(engine, C)
    assert caught.value.retry_after is not None
    assert caught.value.retry_after > 0
    await gate.step()
    await gate.reached()
    await gate.open()
    await queued
    assert engine.stats().pending == 0
    assert len((await ask(engine, C)).output.masks) == 1


async def test_a_deadline_stops_the_work_before_its_next_stage(start_engine: StartEngine, tmp_path: Path) -> None:
    engine = await start_engine("held")
    with pytest.raises(DeadlineError, match="deadline passed"):
        await engine.segment(click(A), CancelToken(0.0))
    with pytest.raises(DeadlineError, match="deadline passed"):
        await engine.encode(encoding(A), CancelToken(0.0))
    assert embeds(tmp_path) == 0
    gate = Gate(tmp_path, "embed")
    late = asyncio.create_task(engine.segment(click(A), CancelToken(0.5)))
    await gate.reached()
    with pytest.raises(DeadlineError, match="deadline passed"):
        await late  # the model is still held
    await gate.open()


async def test_errors_say_what_was_wrong(start_engine: StartEngine, tmp_path: Path) -> None:
    engine = await start_engine("held", "bright", "own-error")
    for _ in range(2):  # without and with an embedding at hand
        with pytest.raises(InvalidFieldError, match="201 lies outside") as caught:
            await ask(engine, A, 201.0)
        assert [violation.field for violation in caught.value.violations] == ["points[0][0][0]"]
        with pytest.raises(CapabilityMissingError, match="not 2"):
            await ask(engine, A, num_multimask_outputs=2)
        await ask(engine, A)
    with pytest.raises(ImageUndecodableError):
        await ask(engine, b"no image")
    with pytest.raises(ModelNotFoundError, match="served are: held, bright"):
        await ask(engine, A, model="other")
    with pytest.raises(CapabilityMissingError, match="embeddings"):
        await engine.encode(encoding(B, return_embedding=True), CancelToken())
    with pytest.raises(CapabilityMissingError, match="embeddings"):
        await engine.encode(encoding(B, "bright"), CancelToken())
    with pytest.raises(OverloadedError, match="too much and too soon") as overloaded:
        await ask(engine, A, model="own-error")
    assert overloaded.value.retry_after == 7.0
    assert embeds(tmp_path) == 1


async def test_a_bug_of_a_model_is_no_error_of_ours_and_keeps_its_words(start_engine: StartEngine) -> None:
    engine = await start_engine("broken")
    with pytest.raises((KeyError, RuntimeError), match="the bug's own words"):
        await ask(engine, A, model="broken")


async def test_a_model_that_only_predicts(start_engine: StartEngine) -> None:
    engine = await start_engine("bright")
    assert not engine.models[0].promptable
    result = await ask(engine, A, model="bright")
    np.testing.assert_array_equal(result.output.masks[0][0].to_mask(), decode_image(A).pixels.mean(axis=2) > 100)
    with pytest.raises(InvalidFieldError):
        await ask(engine, A, 201.0, model="bright")


async def test_an_image_encoded_ahead_is_at_hand(start_engine: StartEngine, tmp_path: Path) -> None:
    engine = await start_engine("held")
    first, again = [await engine.encode(encoding(A), CancelToken()) for _ in range(2)]
    assert (first.times.embedding_cached, again.times.embedding_cached) == (False, True)
    assert (first.header, first.image_embedding) == (again.header, None)
    assert (await ask(engine, A)).times.embedding_cached
    assert embeds(tmp_path) == 1


async def test_a_tiny_budget_still_answers(start_engine: StartEngine) -> None:
    engine = await start_engine("held", cache_bytes=1)
    jobs = [(image, x) for x in (90.0, 120.0, 150.0) for image in (A, B, C)]
    together = await asyncio.gather(*(ask(engine, *job) for job in jobs))
    alone = [await ask(engine, *job) for job in jobs]
    assert [result.output for result in together] == [result.output for result in alone]
    assert engine.stats().cached_embeddings == 1


async def test_flushed_embeddings_are_made_again(start_engine: StartEngine, tmp_path: Path) -> None:
    engine = await start_engine("held")
    before = [await ask(engine, image) for image in (A, B)]
    held = engine.stats()
    flushed = await engine.flush()
    assert (flushed.count, flushed.nbytes) == (held.cached_embeddings, held.cached_bytes) == (2, held.cached_bytes)
    assert engine.stats().cached_embeddings == engine.stats().cached_bytes == 0
    after = await ask(engine, A)
    assert (after.output, after.times.embedding_cached) == (before[0].output, False)
    assert embeds(tmp_path) == 3


async def test_hits_and_misses_are_counted(start_engine: StartEngine) -> None:
    engine = await start_engine("held")
    for image in (A, B, A, A):
        await ask(engine, image)
    assert (engine.stats().cache_hits, engine.stats().cache_misses, engine.stats().encodes) == (2, 2, 2)


async def test_images_are_never_mixed(start_engine: StartEngine) -> None:
    engine = await start_engine("held")
    images = [picture(10 + i, 200 + i, 20 + i) for i in range(6)]
    jobs = [(image, 80.0 + 20 * x) for x in range(4) for image in images]
    results = await asyncio.gather(*(ask(engine, *job) for job in jobs))
    for (image, x), result in zip(jobs, results, strict=True):
        assert result.output == (await ask(engine, image, x)).output
        assert result.output.masks[0][0].size == decode_image(image).pixels.shape[:2]
    assert len({result.output.masks[0][0].counts for result in results}) == len(jobs)


async def test_stopping_waits_for_the_work_and_refuses_more(start_engine: StartEngine, tmp_path: Path) -> None:
    engine = await start_engine("held")
    gate = Gate(tmp_path, "decode")
    running = asyncio.create_task(ask(engine, A))
    await gate.reached()
    stopping = asyncio.create_task(engine.stop())
    await asyncio.sleep(0)
    with pytest.raises(DrainingError):
        await ask(engine, B)
    assert not stopping.done()
    await gate.open()
    assert len((await running).output.masks) == 1
    await stopping
    assert (engine.models, engine.stats().pending, engine.stats().worker_pids) == ((), 0, ())


async def test_a_model_that_cannot_be_loaded_says_why(kind: EngineKind) -> None:
    engine = create_engine(kind, EngineOptions((ModelDeploymentConfig(name="unloadable"),)))
    with pytest.raises(ModelLoadError, match="the weights of unloadable are missing; fetch them"):
        await engine.start()
    await engine.stop()


async def test_prompts_of_several_callers_go_together_to_a_model_that_batches(
    start_engine: StartEngine, tmp_path: Path
) -> None:
    engine = await start_engine("together")
    alone = [await ask(engine, A, x, model="together") for x in (100.0, 120.0, 140.0)]
    gate = Gate(tmp_path, "decode")
    first = asyncio.create_task(ask(engine, A, model="together"))
    await gate.reached()
    background = SegmentationInput(image=A, points=[[[120, 5]]], labels=[[0]])
    waiting = [
        asyncio.create_task(engine.segment(job, CancelToken()))
        for job in (
            *(click(A, x, "together") for x in (100.0, 120.0, 140.0)),
            SegmentJob("together", digest_of(A), background),
        )
    ]
    await queued(engine, A, pending=len(waiting) + 1)
    # The gate is opened for good in the call of the four, behind which nothing waits.
    await gate.step()
    await gate.reached()
    await gate.open()
    await first
    *good, bad = await asyncio.gather(*waiting, return_exceptions=True)
    assert [isinstance(one, SegmentResult) and one.output for one in good] == [one.output for one in alone]
    assert "a background click" in str(bad)
    # One of the four breaks the call for all, so that each is tried by itself.
    assert [line for line in log_of(tmp_path) if line.startswith("decode")][3:] == [
        "decode 1",
        "decode 4",
        "decode 1",
        "decode 1",
        "decode 1",
        "decode 1",
    ]
