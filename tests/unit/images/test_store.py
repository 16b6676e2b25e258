from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from pydantic import ByteSize

from segrpc.service.admission.ledger import Ledger
from segrpc.service.admission.limits import Limits
from segrpc.service.errors import ImageNotFoundError, InvalidFieldError
from segrpc.service.images.decode import ImageHeader, digest_of
from segrpc.service.images.known import KnownImage
from segrpc.service.images.store import ImageStore

ME, YOU, THEM = "me", "you", "them"


def store_of(nbytes: int, **limits: Any) -> ImageStore:
    return ImageStore(Ledger(Limits(image_store_bytes=ByteSize(nbytes), principal_share=1, **limits)))


def put(store: ImageStore, owner: str, data: bytes) -> str:
    """Keep a file and return its digest."""
    image = KnownImage(digest_of(data), data, ImageHeader(1, 1, 1), owner)
    store.put(image)
    return image.digest


def test_files_are_found_by_digest() -> None:
    store = ImageStore()
    digest = put(store, ME, b"one")
    assert digest == digest_of(b"one")
    assert store.get(ME, digest).data == b"one"
    assert (ME, digest) in store
    assert put(store, ME, b"one") == digest
    assert (len(store), store.nbytes) == (1, 3)


def test_the_file_that_was_not_used_for_longest_goes_first() -> None:
    store = store_of(10)
    first, second, third = put(store, ME, b"aaaa"), put(store, ME, b"bbbb"), digest_of(b"cccc")
    store.get(ME, first)
    assert put(store, ME, b"cccc") == third
    assert [(ME, digest) in store for digest in (first, second, third)] == [True, False, True]
    put(store, ME, b"aaaa")  # counts as use
    put(store, ME, b"dddd")
    assert [(ME, digest) in store for digest in (first, third)] == [True, False]
    assert (len(store), store.nbytes) == (2, 8)


def test_one_large_file_may_push_out_several() -> None:
    store = store_of(10)
    for data in (b"aaaa", b"bb", b"cc"):
        put(store, ME, data)
    put(store, ME, b"d" * 9)
    assert (len(store), store.nbytes) == (1, 9)


def test_a_file_above_the_budget_is_not_kept_and_pushes_nothing_out() -> None:
    store = store_of(10)
    kept = put(store, ME, b"a" * 10)
    assert (ME, put(store, ME, b"b" * 11)) not in store
    assert (ME, kept) in store


@pytest.mark.parametrize("digest", ["", "sha256:", "a" * 64, digest_of(b"").upper()])
def test_malformed_digests(digest: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        ImageStore().get(ME, digest)
    assert caught.value.violations[0].field == "digest"


def test_unknown_digests() -> None:
    with pytest.raises(ImageNotFoundError, match="send the image again"):
        ImageStore().get(ME, digest_of(b"unknown"))


def test_nobody_finds_what_another_has() -> None:
    store = ImageStore()
    digest = put(store, ME, b"one")
    with pytest.raises(ImageNotFoundError):
        store.get(YOU, digest)
    put(store, YOU, b"one")
    assert (len(store), store.nbytes) == (2, 6)  # each pays for a copy: nobody's is gone sooner for another's sake


def test_an_owner_that_has_its_share_makes_room_among_its_own_files() -> None:
    store = ImageStore(Ledger(Limits(image_store_bytes=ByteSize(10), principal_share=0.5)))
    other = put(store, YOU, b"aaaa")
    first, second = put(store, ME, b"bbbb"), put(store, ME, b"cccc")
    assert [key in store for key in ((YOU, other), (ME, first), (ME, second))] == [True, False, True]
    assert (ME, put(store, ME, b"d" * 6)) not in store
    assert (ME, second) in store


def test_when_all_is_used_up_the_one_who_has_most_gives() -> None:
    store = store_of(10)
    few = put(store, YOU, b"aa")
    many = [put(store, ME, data) for data in (b"bbbb", b"cccc")]
    new = put(store, THEM, b"ddd")
    assert [key in store for key in ((YOU, few), (ME, many[0]), (ME, many[1]), (THEM, new))] == [
        True,
        False,
        True,
        True,
    ]


def test_shrinking_frees_what_was_asked_for() -> None:
    store = store_of(10)
    few, old, new = put(store, YOU, b"a"), put(store, ME, b"bbbb"), put(store, ME, b"cccc")
    assert store.shrink(3) == 4
    assert [key in store for key in ((YOU, few), (ME, old), (ME, new))] == [True, False, True]
    assert store.shrink(100) == 5
    assert (len(store), store.nbytes, store.shrink(1)) == (0, 0, 0)


def test_threads_may_share_it() -> None:
    store = store_of(500)

    def work(seed: int) -> None:
        for i in range(300):
            digest = put(store, ME, bytes([seed]) * (i % 90 + 1))
            with suppress(ImageNotFoundError):  # pushed out by another thread
                assert digest_of(store.get(ME, digest).data) == digest
            assert store.nbytes <= 500

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(store) > 0
