"""How much of everything may be taken: by all callers together, and by one."""

import math
from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator

from segrpc.service.identity.principal import KINDS

MiB = 2**20
GiB = 2**30


class Resource(StrEnum):
    """What is limited; as a text the name of the limit in the settings and in the file of limits."""

    STREAMS = "max_streams"
    REQUESTS = "max_requests"
    SESSIONS = "max_open_sessions"
    SESSION_BYTES = "session_bytes"
    IMAGE_BYTES = "image_store_bytes"
    IN_FLIGHT_BYTES = "in_flight_bytes"

    @property
    def noun(self) -> str:
        """What it is, for people."""
        return _NOUNS[self]


_NOUNS = {
    Resource.STREAMS: "streams",
    Resource.REQUESTS: "requests",
    Resource.SESSIONS: "open sessions",
    Resource.SESSION_BYTES: "bytes of sessions",
    Resource.IMAGE_BYTES: "bytes of images",
    Resource.IN_FLIGHT_BYTES: "bytes in flight",
}


class Allowance(BaseModel):
    """What one principal may take; what is None follows from `Limits.principal_share`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_streams: int | None = Field(default=None, gt=0)
    max_requests: int | None = Field(default=None, gt=0)
    max_open_sessions: int | None = Field(default=None, gt=0)
    session_bytes: ByteSize | None = Field(default=None, gt=0)
    image_store_bytes: ByteSize | None = Field(default=None, gt=0)
    in_flight_bytes: ByteSize | None = Field(default=None, gt=0)


class Limits(BaseModel):
    """What may be taken at once.

    Attributes:
        max_streams: Streams of ``Refine``.
        max_requests: Calls of all other methods.
        max_open_sessions: Interactive sessions, attached to a stream or not.
        session_bytes: What they take: images, logits and masks.
        image_store_bytes: Image files that are known by digest.
        in_flight_bytes: Messages that are being answered, and announced uploads.
        principal_share: The part of each of these that one principal may have, above 0, at most 1. Callers who are not
            identified cannot be told apart: for them only the limits of all count.
        principals: Principals, by name, that may take more or less than the share.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_streams: int = Field(default=1024, gt=0)
    max_requests: int = Field(default=1024, gt=0)
    max_open_sessions: int = Field(default=1024, gt=0)
    session_bytes: ByteSize = Field(default=ByteSize(2 * GiB), gt=0)
    image_store_bytes: ByteSize = Field(default=ByteSize(1 * GiB), gt=0)
    in_flight_bytes: ByteSize = Field(default=ByteSize(1 * GiB), gt=0)
    principal_share: float = Field(default=0.5, gt=0, le=1)
    principals: Mapping[str, Allowance] = Field(default_factory=dict)

    def of_all(self, resource: Resource) -> int:
        """Return how much all may take together."""
        limit: int = getattr(self, resource)
        return limit

    def of_one(self, resource: Resource, owner: str) -> int:
        """Return how much one principal may take."""
        if not owner:
            return self.of_all(resource)
        own = self.principals.get(owner)
        given = None if own is None else getattr(own, resource)
        return self._shares[resource] if given is None else min(given, self.of_all(resource))

    @field_validator("principals")
    @classmethod
    def _check_names(cls, principals: Mapping[str, Allowance]) -> Mapping[str, Allowance]:
        for name in principals:
            kind, colon, rest = name.partition(":")
            if kind not in KINDS or not colon or not rest:
                raise ValueError(f"{name!r} must be a principal's whole name, such as key:alice or jwt:4711")
        return principals

    @cached_property
    def _shares(self) -> dict[Resource, int]:
        return {resource: share_of(self.of_all(resource), self.principal_share) for resource in Resource}


def share_of(limit: int, share: float) -> int:
    """Return the part of a limit that one may have; at least 1, or nobody could have anything."""
    return max(1, math.floor(limit * share))
