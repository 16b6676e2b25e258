"""Limits in a TOML file, which may change while the server runs.

At the top are limits for all, by the names that they have in the settings, which they replace; each principal may have
a table of its own::

    max_streams = 500
    principal_share = 0.25

    [principals."key:alice"]
    max_streams = 200
    image_store_bytes = "512MiB"
"""

import tomllib
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from segrpc.service.admission.limits import Limits
from segrpc.service.errors import ConfigurationError
from segrpc.service.schemas import violations_of


def read_limits(file: Path, defaults: Limits, check: Callable[[Limits], None]) -> Limits:
    """Read a file of limits.

    Args:
        file: The file.
        defaults: What holds where it says nothing.
        check: Raises ConfigurationError for limits that do not go together with the rest of the settings.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not as the module describes it.
    """
    given = tomllib.loads(file.read_text("utf-8"))
    try:
        limits = Limits.model_validate({**defaults.model_dump(), **given})
        check(limits)
    except ValidationError as error:
        raise ValueError("; ".join(f"{v.field}: {v.description}" for v in violations_of(error))) from None
    except ConfigurationError as error:
        raise ValueError(error.message) from None
    return limits
