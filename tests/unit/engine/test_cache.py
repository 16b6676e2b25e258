"""The cache of embeddings: two tiers, budgets and pins."""

from dataclasses import replace

import pytest

from segrpc.service.engine.base import Flushed
from segrpc.service.engine.cache import CachedImage, EmbeddingCache
from segrpc.service.engine.work import Holdings
from segrpc.service.images.decode import ImageHeader
from segrpc.service.models.base import Embedding
from segrpc.service.models.grabcut import GrabCut
from segrpc.service.schemas import ModelDeploymentConfig

HEADER = ImageHeader(4, 3, 1)


class OnDevice(GrabCut):
    """A model whose embeddings are on a device, and can be moved."""

    def offload(self, embedding: Embedding) -> Embedding | None:
        return replace(embedding, features=f"host {embedding.features}")

    def restore(self, embedding: Embedding) -> Embedding:
        return replace(embedding, features=embedding.features.removeprefix("host "))


CONFIG = ModelDeploymentConfig(name="grabcut")
MOVABLE, FIXED = OnDevice(CONFIG), GrabCut(CONFIG)


def image(name: str, nbytes: int = 10) -> CachedImage:
    return CachedImage(Embedding(4, 3, name, nbytes), HEADER)


def put(
    cache: EmbeddingCache, *names: str, model: GrabCut = FIXED, owner: str = "", pin: bool = False, nbytes: int = 10
) -> None:
    for name in names:
        cache.put(("model", name), image(name, nbytes), model, owner=owner, pin=pin)


def held(cache: EmbeddingCache, *names: str) -> list[str | None]:
    found = [cache.get(("model", name)) for name in names]
    return [None if one is None else str(one.embedding.features) for one in found]


def test_the_least_recently_used_makes_room() -> None:
    cache = EmbeddingCache(25)
    put(cache, "a", "b")
    assert held(cache, "a") == ["a"]
    put(cache, "c")
    assert held(cache, "b", "a", "c") == [None, "a", "c"]
    assert (cache.holdings().cached_embeddings, cache.holdings().cached_bytes) == (2, 20)


def test_the_newest_stays_whatever_the_budget() -> None:
    cache = EmbeddingCache(1)
    put(cache, "a")
    assert held(cache, "a") == ["a"]
    put(cache, "b")
    assert held(cache, "a", "b") == [None, "b"]


def test_an_image_that_comes_again_replaces_itself() -> None:
    cache = EmbeddingCache(25)
    put(cache, "a", "a")
    assert (cache.holdings().cached_embeddings, cache.holdings().cached_bytes) == (1, 10)


def test_who_has_more_than_its_share_makes_room_for_others_and_itself() -> None:
    cache = EmbeddingCache(60, share=0.5)
    put(cache, "b1", owner="bob")
    put(cache, *(f"a{i}" for i in range(10)), owner="alice")
    assert held(cache, "b1", "a4", "a5") == ["b1", None, "a5"]  # while there was room, alice had more than her share
    put(cache, "b2", "b3", owner="bob")
    assert held(cache, "b1", "b2", "b3", "a6", "a7", "a8") == ["b1", "b2", "b3", None, None, "a8"]
    put(cache, "b4", owner="bob")  # which is beyond his share
    assert held(cache, "b1", "b2", "b3", "b4", "a5", "a8", "a9") == [None, "b2", "b3", "b4", "a5", "a8", "a9"]


def test_while_all_are_within_their_shares_the_least_recently_used_makes_room() -> None:
    cache = EmbeddingCache(60, share=0.5)
    for owner in ("alice", "bob", "carol"):
        put(cache, f"{owner}1", f"{owner}2", owner=owner)
    assert held(cache, "alice1") == ["alice1"]
    put(cache, "carol3", owner="carol")
    assert held(cache, "alice1", "alice2", "bob1", "carol1") == ["alice1", None, "bob1", "carol1"]


def test_shares_are_of_bytes_and_of_each_tier() -> None:
    cache = EmbeddingCache(20, 60, share=0.5)
    put(cache, "b1", owner="bob", model=MOVABLE)
    put(cache, *(f"a{i}" for i in range(10)), owner="alice", model=MOVABLE, nbytes=20)
    assert cache.holdings().host_bytes == 50  # bob's, and two of alice's, which are as large as four
    assert held(cache, "a6", "a7", "b1") == [None, "a7", "b1"]


def test_what_is_pinned_stays_although_its_owner_has_more_than_its_share() -> None:
    cache = EmbeddingCache(30, share=0.5)
    put(cache, "a1", "a2", owner="alice", pin=True)
    put(cache, "b1", "b2", owner="bob")
    assert held(cache, "a1", "a2", "b1", "b2") == ["a1", "a2", None, "b2"]


def test_what_leaves_the_device_comes_back_from_the_host() -> None:
    cache = EmbeddingCache(10, 20)
    put(cache, "a", "b", "c", model=MOVABLE)
    holdings = cache.holdings()
    assert (holdings.cached_embeddings, holdings.host_embeddings, holdings.host_bytes) == (1, 2, 20)
    assert held(cache, "a") == ["a"]  # and "c" went in its place
    holdings = cache.holdings()
    assert (holdings.cached_bytes, holdings.host_bytes) == (10, 20)
    assert held(cache, "b", "c") == ["b", "c"]


def test_the_host_has_a_budget_of_its_own() -> None:
    cache = EmbeddingCache(10, 10)
    put(cache, "a", "b", "c", model=MOVABLE)
    assert held(cache, "a") == [None]
    assert held(cache, "b", "c") == ["b", "c"]
    cache = EmbeddingCache(10, 9)
    put(cache, "a", "b", model=MOVABLE)
    assert held(cache, "a", "b") == [None, "b"]


def test_what_cannot_be_moved_is_dropped() -> None:
    cache = EmbeddingCache(10, 100)
    put(cache, "a", "b")
    assert held(cache, "a", "b") == [None, "b"]
    assert cache.holdings().host_embeddings == 0


def test_what_is_pinned_stays_until_it_is_released_as_often() -> None:
    cache = EmbeddingCache(10)
    put(cache, "a", pin=True)
    assert cache.pin(("model", "a")) is not None
    put(cache, "b", "c")
    assert held(cache, "a", "b", "c") == ["a", None, "c"]
    cache.release(("model", "a"))
    put(cache, "b")
    assert held(cache, "a") == ["a"]
    put(cache, "b")
    cache.release(("model", "a"))
    assert held(cache, "a", "b") == [None, "b"]
    cache.release(("model", "a"))  # more often than pinned


def test_what_is_not_there_cannot_be_pinned() -> None:
    cache = EmbeddingCache(10)
    assert cache.pin(("model", "a")) is None
    put(cache, "a", "b")
    assert held(cache, "a") == [None]


@pytest.mark.parametrize("pin", [False, True])
def test_clearing_drops_all(pin: bool) -> None:
    cache = EmbeddingCache(10, 100)
    put(cache, "a", "b", model=MOVABLE, pin=pin)
    cache.clear()
    assert held(cache, "a", "b") == [None, None]
    assert cache.holdings().cached_bytes == cache.holdings().host_bytes == 0


def test_flushing_keeps_what_somebody_is_about_to_use() -> None:
    cache = EmbeddingCache(15, 100)
    put(cache, "a", "b", model=MOVABLE)  # "a" has to go to the host
    put(cache, "c", model=MOVABLE, pin=True)
    flushed = cache.flush()
    assert (flushed.count, flushed.nbytes) == (2, 20)
    assert held(cache, "a", "b", "c") == [None, None, "c"]
    cache.release(("model", "c"))
    assert cache.flush().count == 1
    assert (cache.holdings(), cache.flush()) == (Holdings(), Flushed())
