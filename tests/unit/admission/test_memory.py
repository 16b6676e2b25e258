"""The process's memory, and what goes when there is too much of it."""

import mmap

import pytest

from segrpc.service.admission.ledger import BIG_BYTES, Ledger
from segrpc.service.admission.limits import Limits, Resource
from segrpc.service.admission.memory import RELIEF_SECONDS, MemoryGuard, resident_bytes
from segrpc.service.errors import OverloadedError


class Process:
    """A process whose memory the test decides upon, with a cache that frees what it is told to, as far as it can."""

    def __init__(self, resident: int, cached: int = 0) -> None:
        self.resident, self.cached, self.now = resident, cached, 0.0
        self.asked: list[int] = []
        self.guard = MemoryGuard(100, lambda: self.resident, lambda: self.now)
        self.guard.add_cache(self._shrink)

    def _shrink(self, nbytes: int) -> int:
        self.asked.append(nbytes)
        freed = min(nbytes, self.cached)
        self.cached -= freed
        self.resident -= freed
        return freed


def test_within_the_budget_nothing_happens() -> None:
    process = Process(resident=100, cached=50)
    process.guard.check()
    assert process.asked == []


def test_caches_go_before_anything_is_refused() -> None:
    process = Process(resident=120, cached=50)
    process.guard.check()
    assert (process.asked, process.resident, process.cached) == ([20], 100, 30)


def test_when_caches_do_not_help_it_is_refused_and_trying_costs_nothing() -> None:
    process = Process(resident=120, cached=5)
    for _ in range(3):
        with pytest.raises(OverloadedError, match=r"may hold 100 bytes \(memory_bytes\)") as caught:
            process.guard.check()
        assert caught.value.retry_after
    assert process.asked == [20]
    process.now += RELIEF_SECONDS
    assert process.guard.relieve()
    assert process.asked == [20, 15]
    process.resident = 100
    process.guard.check()


def test_what_is_large_is_refused_and_clicks_go_on() -> None:
    ledger = Ledger(Limits(), Process(resident=120).guard)
    for resource, amount in ((Resource.SESSIONS, 1), (Resource.IN_FLIGHT_BYTES, BIG_BYTES + 1)):
        with pytest.raises(OverloadedError, match="memory_bytes"):
            ledger.take(resource, "", amount)
        assert ledger.used(resource) == 0
    for resource, amount in ((Resource.STREAMS, 1), (Resource.REQUESTS, 1), (Resource.IN_FLIGHT_BYTES, BIG_BYTES)):
        ledger.take(resource, "", amount)


def test_memory_that_is_used_is_seen() -> None:
    size = 64 * 2**20
    before = resident_bytes()
    with mmap.mmap(-1, size) as block:
        block.write(b"x" * size)
        assert resident_bytes() > before + size * 3 // 4
