"""What a session is opened on."""

from collections.abc import Iterator
from dataclasses import dataclass

from segrpc.client.codec import EncodedFile, image_message
from segrpc.client.errors import NotFoundError, SegmentationError
from segrpc.client.flow import INLINE_BYTES, SentImages, image_chunks, upload_header
from segrpc.v1.refine_pb2 import RefineConfig, RefineRequest


@dataclass(frozen=True, slots=True)
class ExistingSession:
    """A session that was detached, or is open elsewhere."""

    session_id: str
    resume_token: str


class NewSession:
    """A new session on an image, which goes by its digest if the server has been sent it before.

    Args:
        file: The image.
        sent: The digests that the server has been sent.
    """

    def __init__(self, file: EncodedFile, sent: SentImages) -> None:
        self._file = file
        self._sent = sent
        self._by_digest = file.digest in sent

    def opening(self, config: RefineConfig) -> Iterator[RefineRequest]:
        """Return the messages that open it: with the image's digest, with the file, or with the file in chunks."""
        in_chunks = not self._by_digest and len(self._file.data) > INLINE_BYTES
        if in_chunks:
            config.upload.CopyFrom(upload_header(self._file))
        else:
            config.image.CopyFrom(image_message(self._file, by_digest=self._by_digest))
        yield RefineRequest(config=config)
        for chunk in image_chunks(self._file) if in_chunks else ():
            yield RefineRequest(image=chunk)

    def arrived(self) -> None:
        """Note that the server has the image."""
        if self._file.data:
            self._sent.add(self._file.digest)

    def forgotten(self, error: SegmentationError | None) -> bool:
        """Return whether the server does not know the digest any more, so that the file is to be sent."""
        unknown = isinstance(error, NotFoundError) and error.reason == "IMAGE_NOT_FOUND"
        if not (unknown and self._by_digest):
            return False
        self._sent.discard(self._file.digest)
        self._by_digest = False
        return True
