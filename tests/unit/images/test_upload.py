import pytest

from segrpc.service.errors import (
    ChunkOffsetError,
    DigestMismatchError,
    ImageTooLargeError,
    InvalidFieldError,
)
from segrpc.service.images.decode import digest_of
from segrpc.service.images.upload import Upload

DATA = b"0123456789"


def upload(size: int = len(DATA), digest: str = "", max_bytes: int = len(DATA), max_chunk_bytes: int = 4) -> Upload:
    return Upload(size, digest, max_bytes, max_chunk_bytes)


def field_of(error: pytest.ExceptionInfo[InvalidFieldError]) -> str:
    (violation,) = error.value.violations
    return violation.field


@pytest.mark.parametrize("digest", ["", digest_of(DATA)])
def test_chunks_of_any_length_become_the_file(digest: str) -> None:
    unfinished = upload(digest=digest)
    for start, end in ((0, 4), (4, 5), (5, 9), (9, 10)):
        assert unfinished.received == start
        unfinished.add(start, DATA[start:end])
    assert unfinished.received == len(DATA)
    assert unfinished.finish() == DATA


def test_the_smallest_file_is_one_byte() -> None:
    single = upload(size=1, max_bytes=1, max_chunk_bytes=1)
    single.add(0, b"x")
    assert single.finish() == b"x"
    for size in (0, -1):
        with pytest.raises(InvalidFieldError) as caught:
            upload(size=size)
        assert field_of(caught) == "header.size"


def test_the_announced_size_is_limited() -> None:
    with pytest.raises(ImageTooLargeError, match="has 11 bytes; at most 10 are allowed"):
        upload(size=11)


@pytest.mark.parametrize("digest", ["sha256:", "0" * 64, digest_of(DATA).upper(), digest_of(DATA) + "0"])
def test_a_malformed_digest_is_refused_before_any_chunk(digest: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        upload(digest=digest)
    assert field_of(caught) == "header.digest"


@pytest.mark.parametrize("data", [b"", b"01234"])
def test_a_chunk_has_its_bounds(data: bytes) -> None:
    unfinished = upload()
    with pytest.raises(InvalidFieldError, match=f"has {len(data)} bytes; a chunk has 1 to 4") as caught:
        unfinished.add(0, data)
    assert field_of(caught) == "chunk.data"
    assert unfinished.received == 0


@pytest.mark.parametrize("offset", [0, 3, 5, 2**63])
def test_a_chunk_follows_the_one_before(offset: int) -> None:
    unfinished = upload()
    unfinished.add(0, b"0123")
    with pytest.raises(ChunkOffsetError, match=f"offset is {offset}, but the next byte expected is 4"):
        unfinished.add(offset, b"45")
    unfinished.add(4, b"45")  # what was refused was not kept
    assert unfinished.received == 6


def test_nothing_may_follow_the_last_byte() -> None:
    unfinished = upload(size=6)
    unfinished.add(0, b"0123")
    with pytest.raises(ChunkOffsetError, match="ends at 7, beyond the announced size of 6"):
        unfinished.add(4, b"456")
    unfinished.add(4, b"45")
    with pytest.raises(ChunkOffsetError, match="beyond"):
        unfinished.add(6, b"6")
    assert unfinished.finish() == b"012345"


def test_a_file_that_ends_early_is_refused() -> None:
    unfinished = upload(digest=digest_of(DATA))
    with pytest.raises(ChunkOffsetError, match="after 0 of 10 bytes"):
        unfinished.finish()
    unfinished.add(0, b"012")
    with pytest.raises(ChunkOffsetError, match="after 3 of 10 bytes"):
        unfinished.finish()


def test_other_bytes_than_announced_are_refused() -> None:
    other = upload(digest=digest_of(DATA[::-1]), max_chunk_bytes=10)
    other.add(0, DATA)
    with pytest.raises(DigestMismatchError) as caught:
        other.finish()
    assert digest_of(DATA) in caught.value.message
    assert digest_of(DATA[::-1]) in caught.value.message
