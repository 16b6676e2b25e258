"""The images that clients have sent, by owner and digest."""

from collections import OrderedDict
from threading import Lock

from segrpc.service.errors import ImageNotFoundError, InvalidFieldError
from segrpc.service.images.decode import digest_of, is_digest

Key = tuple[str, str]  # owner, digest


class ImageStore:
    """Keeps encoded files until their budget is used up; then the one that was not used for longest goes first.

    A file that two owners sent is kept for each: to one it must not matter what the other has.

    All methods may be called from any thread.

    Args:
        max_bytes: The budget: how many bytes the files may have together.
    """

    def __init__(self, max_bytes: int = 2**30) -> None:
        self._max_bytes = max_bytes
        self._files: OrderedDict[Key, bytes] = OrderedDict()
        self._nbytes = 0
        self._lock = Lock()

    def put(self, owner: str, data: bytes) -> str:
        """Keep a file and return its digest. A file larger than the whole budget is not kept."""
        digest = digest_of(data)
        key = owner, digest
        with self._lock:
            if key in self._files:
                self._files.move_to_end(key)
            elif len(data) <= self._max_bytes:
                self._files[key] = data
                self._nbytes += len(data)
                while self._nbytes > self._max_bytes:
                    _, oldest = self._files.popitem(last=False)
                    self._nbytes -= len(oldest)
        return digest

    def get(self, owner: str, digest: str) -> bytes:
        """Return an owner's file of a digest.

        Raises:
            InvalidFieldError: If the digest is malformed.
            ImageNotFoundError: If the file is not, or no longer, at hand.
        """
        if not is_digest(digest):
            raise InvalidFieldError.of("digest", "must be sha256: and 64 lower-case hexadecimal digits")
        key = owner, digest
        with self._lock:
            if key not in self._files:
                raise ImageNotFoundError(f"the server has no image {digest}, or no longer; send the image again")
            self._files.move_to_end(key)
            return self._files[key]

    def __contains__(self, key: Key) -> bool:
        with self._lock:
            return key in self._files

    def __len__(self) -> int:
        with self._lock:
            return len(self._files)

    @property
    def nbytes(self) -> int:
        """How many bytes the files have together."""
        with self._lock:
            return self._nbytes
