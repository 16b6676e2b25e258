"""Counting who has how much of what, and refusing what would be too much."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import repeat
from typing import Any

import pytest

from segrpc.service.admission.ledger import Ledger
from segrpc.service.admission.limits import Allowance, Limits, Resource
from segrpc.service.errors import OverloadedError

ALICE, BOB, ANYBODY = "key:alice", "key:bob", ""
STREAMS = Resource.STREAMS


def ledger_of(**limits: Any) -> Ledger:
    return Ledger(Limits(**limits))


def refused(ledger: Ledger, owner: str, amount: int = 1, resource: Resource = STREAMS) -> OverloadedError:
    with pytest.raises(OverloadedError) as caught:
        ledger.take(resource, owner, amount)
    return caught.value


def test_one_may_have_its_share_and_others_theirs() -> None:
    ledger = ledger_of(max_streams=4)
    for _ in range(2):
        ledger.take(STREAMS, ALICE)
    assert str(refused(ledger, ALICE)).startswith("'key:alice' may have 2 streams at once (max_streams); 2 are taken")
    for _ in range(2):
        ledger.take(STREAMS, BOB)
    assert "all callers together may have 4 streams" in str(refused(ledger, "key:carol"))
    ledger.add(STREAMS, ALICE, -1)
    ledger.take(STREAMS, "key:carol")
    assert (ledger.used(STREAMS), ledger.used(STREAMS, ALICE), ledger.used(STREAMS, BOB)) == (4, 1, 2)


def test_callers_that_are_not_identified_have_the_limit_of_all_only() -> None:
    ledger = ledger_of(max_streams=4)
    for _ in range(4):
        ledger.take(STREAMS, ANYBODY)
    assert "all callers together" in str(refused(ledger, ANYBODY))


def test_a_principal_of_its_own_limit() -> None:
    principals = {ALICE: Allowance(max_streams=3), BOB: Allowance(max_streams=100, max_requests=1)}
    ledger = ledger_of(max_streams=4, max_requests=4, principals=principals)
    ledger.take(STREAMS, ALICE, 3)
    assert "3 streams" in str(refused(ledger, ALICE))
    ledger.add(STREAMS, ALICE, -3)
    ledger.take(STREAMS, BOB, 4)  # never more than all may have
    assert "4 streams" in str(refused(ledger, BOB))
    ledger.take(Resource.REQUESTS, ALICE, 2)  # what it says nothing about follows from the share
    assert "2 requests" in str(refused(ledger, ALICE, resource=Resource.REQUESTS))


def test_everybody_may_have_one_however_small_the_share() -> None:
    ledger = ledger_of(max_streams=4, principal_share=0.01)
    ledger.take(STREAMS, ALICE)
    assert "may have 1 streams" in str(refused(ledger, ALICE))


def test_who_waits_is_told_how_long_unless_it_is_hopeless() -> None:
    ledger = ledger_of(in_flight_bytes=1000)
    ledger.take(Resource.IN_FLIGHT_BYTES, ANYBODY, 600)
    error = refused(ledger, ANYBODY, 600, Resource.IN_FLIGHT_BYTES)
    assert "600 are taken and 600 more are asked for" in str(error)
    assert error.retry_after == 1.0
    error = refused(ledger, ANYBODY, 1001, Resource.IN_FLIGHT_BYTES)
    assert "this alone has 1001" in str(error)
    assert error.retry_after is None


def test_what_is_held_is_given_back_whatever_happens() -> None:
    ledger = ledger_of(max_streams=1)
    with suppress(KeyError), ledger.held(STREAMS, ALICE):
        assert ledger.used(STREAMS, ALICE) == 1
        with pytest.raises(OverloadedError), ledger.held(STREAMS, ALICE):
            raise AssertionError("it was not refused")
        raise KeyError
    assert (ledger.used(STREAMS), ledger.used(STREAMS, ALICE)) == (0, 0)


def test_new_limits_count_at_once_and_take_nothing_away() -> None:
    ledger = ledger_of(max_streams=2)
    for _ in range(2):
        ledger.take(STREAMS, ANYBODY)
    ledger.limits = Limits(max_streams=1)
    assert ledger.used(STREAMS) == 2
    ledger.add(STREAMS, ANYBODY, -1)
    assert "may have 1 streams" in str(refused(ledger, ANYBODY))
    ledger.limits = Limits(max_streams=2)
    ledger.take(STREAMS, ANYBODY)


def test_threads_may_share_it() -> None:
    ledger = ledger_of(max_streams=5, principal_share=0.6)

    def work(owner: str) -> int:
        most = 0
        for _ in range(500):
            with suppress(OverloadedError), ledger.held(STREAMS, owner):
                most = max(most, ledger.used(STREAMS), ledger.used(STREAMS, owner) + 2)
        return most

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(work, [ALICE, BOB] * 4)) <= 5
    assert [ledger.used(STREAMS, *owner) for owner in ((), (ALICE,), (BOB,))] == list(repeat(0, 3))
