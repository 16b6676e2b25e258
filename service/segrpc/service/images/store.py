"""The images that clients have sent, by owner and digest."""

from collections import OrderedDict
from threading import Lock

from segrpc.service.admission.ledger import Ledger
from segrpc.service.admission.limits import Resource
from segrpc.service.errors import ImageNotFoundError, InvalidFieldError
from segrpc.service.images.decode import is_digest
from segrpc.service.images.known import KnownImage

Key = tuple[str, str]  # owner, digest


class ImageStore:
    """Keeps images while there is room; then the one that was not used for longest goes first.

    Whoever uses up its own share makes room among its own files. When the room of all is used up, the owner that has
    most of it gives: one who has little loses nothing to those who have much.

    A file that two owners sent is kept for each: to one it must not matter what the other has.

    All methods may be called from any thread.

    Args:
        ledger: Knows how many bytes the files may have together, and those of one owner.
    """

    def __init__(self, ledger: Ledger | None = None) -> None:
        self._ledger = ledger or Ledger()
        self._files: dict[str, OrderedDict[str, KnownImage]] = {}  # by owner and digest; the longest unused first
        self._lock = Lock()

    def put(self, image: KnownImage) -> None:
        """Keep an image. One whose file is larger than all that there may be is not kept."""
        owner, digest, nbytes = image.owner, image.digest, len(image.data)
        with self._lock:
            own = self._files.get(owner)
            if own is not None and digest in own:
                own.move_to_end(digest)
            elif self._make_room(owner, nbytes):
                self._files.setdefault(owner, OrderedDict())[digest] = image
                self._ledger.add(Resource.IMAGE_BYTES, owner, nbytes)

    def get(self, owner: str, digest: str) -> KnownImage:
        """Return an owner's image of a digest.

        Raises:
            InvalidFieldError: If the digest is malformed.
            ImageNotFoundError: If the image is not, or no longer, at hand.
        """
        if not is_digest(digest):
            raise InvalidFieldError.of("digest", "must be sha256: and 64 lower-case hexadecimal digits")
        with self._lock:
            own = self._files.get(owner)
            if own is None or digest not in own:
                raise ImageNotFoundError(f"the server has no image {digest}, or no longer; send the image again")
            own.move_to_end(digest)
            return own[digest]

    def shrink(self, nbytes: int) -> int:
        """Let files go until so many bytes are free, or none is left; return how many were freed."""
        freed = 0
        with self._lock:
            while freed < nbytes and self._files:
                freed += self._drop_oldest(self._largest())
        return freed

    def __contains__(self, key: Key) -> bool:
        owner, digest = key
        with self._lock:
            return digest in self._files.get(owner, {})

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._files.values()))

    @property
    def nbytes(self) -> int:
        """How many bytes the files have together."""
        return self._ledger.used(Resource.IMAGE_BYTES)

    def _make_room(self, owner: str, nbytes: int) -> bool:
        while refusal := self._ledger.refusal(Resource.IMAGE_BYTES, owner, nbytes):
            if refusal.amount > refusal.allowed:
                return False
            self._drop_oldest(self._largest() if refusal.owner is None else owner)
        return True

    def _largest(self) -> str:
        return max(self._files, key=lambda owner: self._ledger.used(Resource.IMAGE_BYTES, owner))

    def _drop_oldest(self, owner: str) -> int:
        own = self._files[owner]
        _, oldest = own.popitem(last=False)
        if not own:
            del self._files[owner]
        self._ledger.add(Resource.IMAGE_BYTES, owner, -len(oldest.data))
        return len(oldest.data)
