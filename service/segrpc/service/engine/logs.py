"""How the server's processes log: alike, to standard error."""

import logging
import sys

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def configure_logging(level: str) -> None:
    """Log to standard error.

    Args:
        level: The lowest level that is written, such as ``INFO``.
    """
    logging.basicConfig(level=level, format=FORMAT, stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs whole URLs, which may hold secrets
