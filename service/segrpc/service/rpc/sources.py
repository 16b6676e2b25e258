"""Finding the image that a message names, and blaming errors on the field that named it."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from segrpc.service.errors import InvalidFieldError, InvalidInputError, Violation
from segrpc.service.images.known import KnownImage
from segrpc.service.images.library import ImageLibrary
from segrpc.v1 import types_pb2


async def find_image(images: ImageLibrary, owner: str, message: types_pb2.Image, field: str) -> KnownImage:
    """Find an image by bytes, URI or digest, and keep it.

    Args:
        images: Finds images.
        owner: Whose images they are.
        message: What names it.
        field: The path of the message in the request.

    Raises:
        SegrpcError: If there is no such image; see `ImageLibrary`.
    """
    source = message.WhichOneof("source")
    if source is None:
        raise InvalidFieldError.of(field, "is required: give data, uri or digest")
    finders: dict[str, Callable[[str, Any], KnownImage]] = {
        "data": images.from_data,
        "uri": images.from_uri,
        "digest": images.from_digest,
    }
    threads = images.fetchers if source == "uri" else None
    find = partial(finders[source], owner, getattr(message, source))
    try:
        if source == "digest":
            return find()
        return await asyncio.get_running_loop().run_in_executor(threads, find)
    except InvalidFieldError as error:
        raise InvalidFieldError.of(f"{field}.{source}", error.violations[0].description) from None
    except InvalidInputError as error:
        raise type(error)(error.message, [Violation(f"{field}.{source}", error.message)]) from None
