"""How the server's processes log: alike, to standard error, so that nothing that clients send can forge a line."""

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

FIELDS = "fields"
"""The name under which a record carries values for programs: ``log.info(..., extra={FIELDS: {"status": "OK"}})``."""

_PLAIN = re.compile(r"[A-Za-z0-9._/-]+")


def configure_logging(level: str, log_format: LogFormat = "text") -> None:
    """Log to standard error.

    Args:
        level: The lowest level that is written, such as ``INFO``.
        log_format: ``text`` for people, ``json`` for programs.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs whole URLs, which may hold secrets


class TextFormatter(logging.Formatter):
    """A line for each record, its fields as ``name=value``; lines of a traceback are indented below it.

    What a terminal would act upon, and line breaks, are written as escapes.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Turn a record into lines."""
        fields = "".join(f" {name}={_value(value)}" for name, value in _fields(record).items())
        head = f"{self.formatTime(record)} {record.levelname} {record.name} {escaped(record.getMessage())}{fields}"
        return "\n    ".join([head, *map(escaped, _traceback(self, record).split("\n"))]) if record.exc_info else head


class JsonFormatter(logging.Formatter):
    """A JSON object of one line, in ASCII, for each record: ``time`` (UTC), ``level``, ``logger``, ``message``, fields.

    A traceback is in ``exception``.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Turn a record into a line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        head = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        tail = {"exception": _traceback(self, record)} if record.exc_info else {}
        return json.dumps(head | _fields(record) | tail, default=str)


def escaped(text: str) -> str:
    r"""Write what is not printable as escapes, such as ``\n`` and ``\x1b``."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    found: dict[str, Any] = getattr(record, FIELDS, {})
    return found


def _value(value: object) -> str:
    if not isinstance(value, str):
        return escaped(str(value))
    return value if _PLAIN.fullmatch(value) else repr(value)


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info else ""
