"""Putting an image together from chunks."""

from segrpc.service.errors import (
    ChunkOffsetError,
    DigestMismatchError,
    ImageTooLargeError,
    InvalidFieldError,
)
from segrpc.service.images.decode import digest_of, is_digest


class Upload:
    """Collects the chunks of one encoded file; they come in order and leave no gap.

    Args:
        size: The announced size in bytes.
        digest: The announced digest, or empty.
        max_bytes: The largest file that is taken.
        max_chunk_bytes: The largest chunk that is taken.

    Raises:
        InvalidFieldError: If the size or the digest is malformed.
        ImageTooLargeError: If the size is above ``max_bytes``.
    """

    def __init__(self, size: int, digest: str, max_bytes: int, max_chunk_bytes: int) -> None:
        if size < 1:
            raise InvalidFieldError.of("header.size", f"is {size}; must be the size of the file in bytes, at least 1")
        if size > max_bytes:
            raise ImageTooLargeError(f"the image has {size} bytes; at most {max_bytes} are allowed")
        if digest and not is_digest(digest):
            raise InvalidFieldError.of("header.digest", "must be sha256: and 64 lower-case hexadecimal digits")
        self._size = size
        self._digest = digest
        self._max_chunk_bytes = max_chunk_bytes
        self._received = bytearray()

    @property
    def received(self) -> int:
        """How many bytes have arrived."""
        return len(self._received)

    @property
    def complete(self) -> bool:
        """Whether all bytes have arrived."""
        return len(self._received) == self._size

    def add(self, offset: int, data: bytes) -> None:
        """Take the next chunk.

        Raises:
            InvalidFieldError: If it is empty or too large.
            ChunkOffsetError: If it does not follow the one before, or runs past the announced size.
        """
        if not 1 <= len(data) <= self._max_chunk_bytes:
            text = f"has {len(data)} bytes; a chunk has 1 to {self._max_chunk_bytes}"
            raise InvalidFieldError.of("chunk.data", text)
        if offset != self.received:
            raise ChunkOffsetError(f"the chunk's offset is {offset}, but the next byte expected is {self.received}")
        if offset + len(data) > self._size:
            raise ChunkOffsetError(f"the chunk ends at {offset + len(data)}, beyond the announced size of {self._size}")
        self._received += data

    def finish(self) -> bytes:
        """Return the whole file.

        Raises:
            ChunkOffsetError: If bytes are missing.
            DigestMismatchError: If it is not the file that was announced.
        """
        if self.received != self._size:
            raise ChunkOffsetError(f"the stream ended after {self.received} of {self._size} bytes")
        data = bytes(self._received)
        if self._digest and digest_of(data) != self._digest:
            raise DigestMismatchError(f"the bytes have the digest {digest_of(data)}, announced was {self._digest}")
        return data
