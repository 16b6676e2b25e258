"""From what names an image to the bytes of its file."""

import base64
import binascii
import os
import re
import stat
from pathlib import Path
from typing import Final
from urllib.parse import unquote_to_bytes, urlsplit

from segrpc.service.errors import ImageFetchError, InvalidFieldError, UriNotAllowedError
from segrpc.service.images.decode import DEFAULT_LIMITS, ImageLimits, check_size, format_of
from segrpc.service.images.look_ups import LookUps
from segrpc.service.images.policy import DEFAULT_POLICY, SourcePolicy

__all__ = ["SourcePolicy", "read_source", "read_uri"]

_SCHEME: Final = re.compile(r"(data|file|https?):|[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def read_source(
    source: str | Path | bytes, policy: SourcePolicy = DEFAULT_POLICY, limits: ImageLimits = DEFAULT_LIMITS
) -> bytes:
    """Read an image file from any source that the Python types know. Blocks.

    Args:
        source: The file itself, its path, a ``data:``, ``file:``, ``http:`` or ``https:`` URL, or its base64.
        policy: What may be read.
        limits: How large the file may be.

    Raises:
        InvalidFieldError: If a URL is malformed.
        UriNotAllowedError: If the policy forbids it.
        ImageFetchError: If the policy allows it, but it does not give a file.
        ImageTooLargeError: If the file has too many bytes.
    """
    if isinstance(source, bytes):
        check_size(len(source), limits)
        return source
    if isinstance(source, str) and _SCHEME.match(source):
        return read_uri(source, policy, limits)
    data = _image_in_base64(source) if isinstance(source, str) else None
    if data is None:
        return _read_file(Path(source), policy, limits)
    check_size(len(data), limits)
    return data


def read_uri(
    uri: str,
    policy: SourcePolicy = DEFAULT_POLICY,
    limits: ImageLimits = DEFAULT_LIMITS,
    look_ups: LookUps | None = None,
) -> bytes:
    """Read an image file from a URI that a client sent. Blocks.

    Args:
        uri: A ``data:``, ``file:``, ``http:`` or ``https:`` URL; nothing else.
        policy: What may be read.
        limits: How large the file may be.
        look_ups: See `segrpc.service.images.fetch.fetch`.

    Raises:
        InvalidFieldError: If it is malformed.
        UriNotAllowedError: If the policy forbids it.
        ImageFetchError: If the policy allows it, but it does not give a file.
        ImageTooLargeError: If the file has too many bytes.
    """
    match uri.partition(":")[0].lower():
        case "data":
            data = _read_data_url(uri)
            check_size(len(data), limits)
            return data
        case "file":
            return _read_file(_path_of(uri), policy, limits)
        case "http" | "https":
            # Imported here: httpx takes longer to import than gRPC, and workers and most servers fetch nothing.
            from segrpc.service.images.fetch import fetch

            return fetch(uri, policy, limits, look_ups)
        case _:
            raise InvalidFieldError.of("uri", f"{_shown(uri)} must begin with data:, file:, http: or https:")


def _read_data_url(uri: str) -> bytes:
    head, comma, payload = uri.partition(",")
    if not comma:
        raise InvalidFieldError.of("uri", "has no comma; must be data:image/png;base64,... or the like")
    data = unquote_to_bytes(payload)
    if not head.lower().endswith(";base64"):
        return data
    try:
        return _decode_base64(data)
    except binascii.Error as error:
        raise InvalidFieldError.of("uri", f"holds no valid base64: {error}") from error


def _image_in_base64(text: str) -> bytes | None:
    """Decode base64, or return None if the text is no base64 of an image: it may be a path, ``/9j/4AAQ`` included."""
    try:
        head = b"".join(text[:64].encode().split())[:24]
        if len(head) < 24 or format_of(_decode_base64(head)) is None:
            return None
        return _decode_base64(text.encode())
    except (binascii.Error, UnicodeError):
        return None


def _decode_base64(text: bytes) -> bytes:
    """Decode base64 as browsers do: with white space, and without padding if need be.

    Raises:
        binascii.Error: If it is no base64.
    """
    compact = b"".join(text.split())
    return base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)


def _path_of(uri: str) -> Path:
    """Return the path that a file URL names."""
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise InvalidFieldError.of("uri", f"{_shown(uri)} is no valid URL: {error}") from error
    if parts.netloc.lower() not in ("", "localhost") or not parts.path.startswith("/"):
        raise InvalidFieldError.of("uri", f"{_shown(uri)} must name a file of the server, as file:///folder/name does")
    if parts.query or parts.fragment:
        raise InvalidFieldError.of("uri", f"{_shown(uri)} has a query or fragment; write ? as %3F and # as %23")
    return Path(os.fsdecode(unquote_to_bytes(parts.path)))


def _read_file(path: Path, policy: SourcePolicy, limits: ImageLimits) -> bytes:
    root, relative = _locate(path, policy)
    try:
        place = _find_beneath(root, relative)
        try:
            status = os.fstat(place)
            if not stat.S_ISREG(status.st_mode):
                raise ImageFetchError(f"{_shown(str(path))} is no regular file")
            check_size(status.st_size, limits)
            # The very file that was looked at. Only now is it opened: that alone makes some devices and pipes act.
            with Path(f"/proc/self/fd/{place}").open("rb") as file:
                data = file.read(limits.max_bytes + 1)
        finally:
            os.close(place)
    except OSError as error:
        raise ImageFetchError(f"{_shown(str(path))} cannot be read: {error.strerror}") from error
    check_size(len(data), limits)
    return data


def _locate(path: Path, policy: SourcePolicy) -> tuple[Path, Path]:
    """Return the media root that a path lies in, and the path below it, free of links.

    ``..`` is taken away textually and first, so that nothing outside of the roots is looked at, except where links in
    them lead: the answer tells nothing of what is there.
    """
    plain = Path(os.path.normpath(path.absolute()))
    try:
        roots = [(Path(os.path.normpath(root.absolute())), root.resolve()) for root in policy.media_roots]
        if any(plain.is_relative_to(root) for pair in roots for root in pair):
            real = plain.resolve()
            for _, root in roots:
                if real.is_relative_to(root):
                    return root, real.relative_to(root)
    except (OSError, RuntimeError) as error:  # links in a circle
        raise ImageFetchError(f"{_shown(str(path))} cannot be read: its links lead nowhere") from error
    except ValueError as error:
        raise InvalidFieldError.of("uri", f"{_shown(str(path))} is no valid path: {error}") from error
    raise UriNotAllowedError(
        f"{_shown(str(path))} may not be read: the server reads files only in folders that its operator names with "
        "--media-root (in Python: SourcePolicy.media_roots)"
    )


def _find_beneath(root: Path, relative: Path) -> int:
    """Find a file below a folder, step by step and following no link: the path may have changed since it was resolved.

    Returns:
        A descriptor that stands for the file, which is not opened.

    Raises:
        OSError: If that is not possible.
    """
    place = os.open(root, os.O_PATH | os.O_DIRECTORY)
    for name in relative.parts:
        try:
            below = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=place)
        finally:
            os.close(place)
        place = below
    return place


def _shown(text: str) -> str:
    """Return a text as it may stand in a message."""
    return repr(text if len(text) <= 100 else text[:97] + "...")
