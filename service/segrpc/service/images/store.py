"""The images that clients have sent, by digest."""

from collections import OrderedDict
from threading import Lock

from segrpc.service.errors import ImageNotFoundError, InvalidFieldError
from segrpc.service.images.decode import digest_of, is_digest


class ImageStore:
    """Keeps encoded files until their budget is used up; then the one that was not used for longest goes first.

    All methods may be called from any thread.

    Args:
        max_bytes: The budget: how many bytes the files may have together.
    """

    def __init__(self, max_bytes: int = 2**30) -> None:
        self._max_bytes = max_bytes
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._nbytes = 0
        self._lock = Lock()

    def put(self, data: bytes) -> str:
        """Keep a file and return its digest. A file larger than the whole budget is not kept."""
        digest = digest_of(data)
        with self._lock:
            if digest in self._files:
                self._files.move_to_end(digest)
            elif len(data) <= self._max_bytes:
                self._files[digest] = data
                self._nbytes += len(data)
                while self._nbytes > self._max_bytes:
                    _, oldest = self._files.popitem(last=False)
                    self._nbytes -= len(oldest)
        return digest

    def get(self, digest: str) -> bytes:
        """Return the file of a digest.

        Raises:
            InvalidFieldError: If the digest is malformed.
            ImageNotFoundError: If the file is not, or no longer, at hand.
        """
        if not is_digest(digest):
            raise InvalidFieldError.of("digest", "must be sha256: and 64 lower-case hexadecimal digits")
        with self._lock:
            if digest not in self._files:
                raise ImageNotFoundError(f"the server has no image {digest}, or no longer; send the image again")
            self._files.move_to_end(digest)
            return self._files[digest]

    def __contains__(self, digest: str) -> bool:
        with self._lock:
            return digest in self._files

    def __len__(self) -> int:
        with self._lock:
            return len(self._files)

    @property
    def nbytes(self) -> int:
        """How many bytes the files have together."""
        with self._lock:
            return self._nbytes
