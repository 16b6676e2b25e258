"""The core by itself: what it holds of works that it has done."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from segrpc.service.engine.base import CancelToken, EngineOptions
from segrpc.service.engine.cache import CachedImage
from segrpc.service.engine.core import Core
from segrpc.service.engine.work import DecodeWork, EncodeWork, FlushWork, Order, Ticket
from segrpc.service.schemas import ModelDeploymentConfig
from tests.unit.engine.conftest import many_clicks, picture

A = picture(1)


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    """A core with the model ``held``."""
    made = Core(EngineOptions((ModelDeploymentConfig(name="held", model_params={"folder": str(tmp_path)}),)))
    made.load()
    yield made
    made.unload()


@pytest.fixture
def held_before() -> Iterator[int]:
    """How many embeddings others hold. What the test does not let go stays: nothing is collected."""
    gc.collect()
    gc.disable()
    yield embeddings()
    gc.enable()


def clicks(count: int, token: CancelToken | None = None) -> Ticket:
    job = many_clicks(A, count)
    work = DecodeWork(job.model, job.digest, job.input.model_copy(update={"image": None}), "float32")
    return Ticket(work, token or CancelToken())


def do(core: Core, work: Order) -> None:
    """Do a work that needs one turn."""
    ticket = Ticket(work, CancelToken())
    assert not (core.encode if isinstance(work, EncodeWork) else core.decode)([ticket])
    ticket.future.result(0)


def embeddings() -> int:
    """How many embeddings there are in the process."""
    return sum(type(one) is CachedImage for one in gc.get_objects())


def encode(core: Core) -> None:
    digest = many_clicks(A, 1).digest
    do(core, EncodeWork("held", digest, A))
    core.release("held", digest)


@pytest.mark.parametrize("count", [1, 3])
def test_an_embedding_is_let_go_after_the_last_prompt(core: Core, held_before: int, count: int) -> None:
    encode(core)
    ticket = clicks(count)
    for _ in range(count - 1):
        assert list(core.decode([ticket])) == [ticket]
    assert not core.decode([ticket])
    assert len(ticket.future.result(0).output.masks) == count  # type: ignore[union-attr]
    do(core, FlushWork())
    assert embeddings() == held_before


@pytest.mark.parametrize("count", [1, 3])
def test_a_work_whose_prompts_take_turns_is_decoded_with_no_other(core: Core, count: int) -> None:
    encode(core)
    ticket = clicks(count)
    while core.decode([ticket]):
        pass
    assert ticket.future.result(0).times.batch == 1


def test_an_embedding_is_let_go_when_the_caller_leaves(core: Core, held_before: int) -> None:
    encode(core)
    token = CancelToken()
    ticket = clicks(3, token)
    assert list(core.decode([ticket])) == [ticket]
    token.cancel()
    assert not core.decode([ticket])
    assert ticket.future.exception(0) is not None
    do(core, FlushWork())
    assert embeddings() == held_before
