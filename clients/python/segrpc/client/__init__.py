"""The Python client of segrpc: `SegmentationClient`, and `AsyncSegmentationClient` for asyncio."""

from segrpc.client.aio import AsyncSegmentationClient
from segrpc.client.errors import (
    DeadlineExceededError,
    FieldViolation,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    PreconditionError,
    SegmentationError,
    ServerError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from segrpc.client.flow import EncodeOptions, SegmentOptions
from segrpc.client.sync import SegmentationClient
from segrpc.client.types import (
    Embedding,
    EncodedImage,
    ImageInfo,
    Limits,
    Mask,
    ModelInfo,
    Prediction,
    SegmentationResult,
    Timing,
)

__all__ = [
    "AsyncSegmentationClient",
    "DeadlineExceededError",
    "Embedding",
    "EncodeOptions",
    "EncodedImage",
    "FieldViolation",
    "ImageInfo",
    "InvalidRequestError",
    "Limits",
    "Mask",
    "ModelInfo",
    "NotFoundError",
    "OverloadedError",
    "PermissionDeniedError",
    "PreconditionError",
    "Prediction",
    "SegmentOptions",
    "SegmentationClient",
    "SegmentationError",
    "SegmentationResult",
    "ServerError",
    "Timing",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
]
