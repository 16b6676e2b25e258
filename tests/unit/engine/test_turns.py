"""Owners take turns in a queue."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segrpc.service.engine.turns import TurnQueue


def filled(*items: str) -> TurnQueue[str]:
    """A queue of items such as ``a1``, which is a's first."""
    queue: TurnQueue[str] = TurnQueue()
    for item in items:
        queue.put(item[0], item)
    return queue


def rest(queue: TurnQueue[str]) -> list[str]:
    taken = []
    while queue:
        taken.append(queue.take())
    return taken


def test_owners_take_turns_and_each_ones_items_keep_their_order() -> None:
    queue = filled("a1", "a2", "a3", "a4", "b1", "b2", "c1")
    assert rest(queue) == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]
    with pytest.raises(IndexError):
        queue.take()


def test_one_owner_is_served_in_the_order_of_coming() -> None:
    assert rest(filled("a1", "a2", "a3")) == ["a1", "a2", "a3"]


def test_who_had_the_last_turn_has_none_before_who_comes() -> None:
    queue = filled("a1", "a2", "a3")
    assert queue.take() == "a1"
    queue.put("b", "b1")
    assert queue.take() == "b1"
    assert queue.take() == "a2"
    queue.put("b", "b2")  # who asks again when it was answered
    assert queue.take() == "b2"


def test_who_comes_back_is_behind_those_who_wait() -> None:
    queue = filled("a1", "b1", "b2", "c1")
    assert queue.take() == "a1"
    queue.put("a", "a2")
    assert rest(queue) == ["b1", "c1", "a2", "b2"]


def test_what_was_put_back_is_next_of_its_owner_and_after_the_others() -> None:
    queue = filled("a1", "a2", "b1", "b2", "c1")
    assert queue.take() == "a1"
    queue.put_back("a", "a1")
    assert rest(queue) == ["b1", "c1", "a1", "b2", "a2"]
    queue.put_back("c", "c1")
    queue.put("a", "a3")
    assert rest(queue) == ["c1", "a3"]


def test_what_was_taken_out_takes_no_turn() -> None:
    queue = filled("a1", "a2", "b1", "b2", "c1")
    assert queue.discard("b", "b1")
    assert queue.discard("c", "c1")
    assert not queue.discard("c", "c1")
    assert not queue.discard("a", "a3")
    assert rest(queue) == ["a1", "b2", "a2"]


# None takes an item; a name puts one of that owner, in capitals one that needs two turns.
steps = st.lists(st.none() | st.sampled_from("abcdABCD"), max_size=60)


@given(steps)
def test_nobody_has_two_turns_before_one_who_waits(steps: list[str | None]) -> None:
    queue: TurnQueue[int] = TurnQueue()
    waiting: dict[str, list[int]] = {}
    again: set[int] = set()  # items that need another turn
    turns: dict[str, Counter[str]] = {}  # of others, since an owner has waited for its turn
    for number, step in enumerate([*steps, *[None] * (2 * len(steps))]):
        if step is not None:
            owner = step.lower()
            queue.put(owner, number)
            waiting.setdefault(owner, []).append(number)
            turns.setdefault(owner, Counter())
            if step.isupper():
                again.add(number)
        elif queue:
            taken = queue.take()
            (served,) = (name for name, items in waiting.items() if items[0] == taken)
            turns.pop(served)
            for name in turns:
                turns[name][served] += 1
                assert turns[name][served] <= 1
            if taken in again:
                again.remove(taken)
                queue.put_back(served, taken)
            else:
                waiting[served].pop(0)
            if waiting[served]:
                turns[served] = Counter()
            else:
                del waiting[served]
    assert not waiting
