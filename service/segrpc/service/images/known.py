"""An image that the server has."""

from dataclasses import dataclass, field

from segrpc.service.images.decode import ImageHeader


@dataclass(frozen=True, slots=True)
class KnownImage:
    """An encoded image that was looked at.

    Attributes:
        digest: ``sha256:`` and 64 hexadecimal digits of ``data``.
        data: The encoded file.
        header: Its size and orientation.
        owner: Whose image it is.
    """

    digest: str
    data: bytes = field(repr=False)
    header: ImageHeader
    owner: str = ""

    @property
    def key(self) -> str:
        """The name of the image in caches: owners share nothing there, or one could tell what another has sent."""
        return f"{self.owner} {self.digest}" if self.owner else self.digest
