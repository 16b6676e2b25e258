"""A short run of every target, without coverage: its corpus and mutations of it. The long one is `make fuzz`."""

import random

import pytest

from tests.fuzz.targets import TARGETS, mutated, seeds, target

ROUNDS = 2000
SEED = 20_240_607


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_and_mutations_of_it(name: str) -> None:
    run, corpus, chance = target(name), seeds(name), random.Random(SEED)
    assert corpus
    for data in corpus:
        run(data)
    for i in range(ROUNDS):
        data = mutated(chance.choice(corpus), chance)
        try:
            run(data)
        except Exception as error:
            raise AssertionError(f"mutation {i} of {name}: {data!r}") from error
