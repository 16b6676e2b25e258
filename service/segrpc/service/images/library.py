"""The images of a server: from any source to bytes with a digest."""

from concurrent.futures import ThreadPoolExecutor
from typing import Final

from segrpc.service.errors import InvalidFieldError
from segrpc.service.images.decode import ImageLimits, digest_of, read_header
from segrpc.service.images.known import KnownImage
from segrpc.service.images.look_ups import LookUps
from segrpc.service.images.sources import SourcePolicy, read_uri
from segrpc.service.images.store import ImageStore

FETCHERS: Final = 32  # URIs that are read at the same time; more wait


class ImageLibrary:
    """Finds images by bytes, URI or digest, and keeps them for a while. What reads files may block: use threads.

    Each image belongs to the owner that the methods are given, and nobody else finds it by its digest.

    Args:
        store: Where images are kept.
        policy: Which URIs may be read.
        limits: What images must keep to.

    Attributes:
        fetchers: The threads for `from_uri`, which may wait long for somebody else: it must not take those that all
            other work needs.
    """

    def __init__(self, store: ImageStore, policy: SourcePolicy, limits: ImageLimits) -> None:
        self._store = store
        self._policy = policy
        self._limits = limits
        self._look_ups = LookUps()
        self.fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="segrpc-fetch")

    def from_data(self, owner: str, data: bytes) -> KnownImage:
        """Look at an encoded file and keep it.

        Raises:
            InvalidFieldError: If it is empty.
            ImageTooLargeError: If it has too many bytes or pixels.
            ImageUndecodableError: If it is no image.
        """
        if not data:
            raise InvalidFieldError.of("data", "is empty; must be an encoded image")
        image = KnownImage(digest_of(data), data, read_header(data, self._limits), owner)
        self._store.put(image)
        return image

    def from_uri(self, owner: str, uri: str) -> KnownImage:
        """Read a URI, as far as the policy allows, and keep the image.

        Raises:
            UriNotAllowedError: If the policy forbids it.
            ImageFetchError: If it does not give a file.
        """
        return self.from_data(owner, read_uri(uri, self._policy, self._limits, self._look_ups))

    def from_digest(self, owner: str, digest: str) -> KnownImage:
        """Find an image that the owner has sent before. Never blocks.

        Raises:
            InvalidFieldError: If the digest is malformed.
            ImageNotFoundError: If the image is not at hand.
        """
        return self._store.get(owner, digest)
