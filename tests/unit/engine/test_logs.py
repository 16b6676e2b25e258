import json
import logging
import sys

import pytest

from segrpc.service.engine.logs import FIELDS, JsonFormatter, TextFormatter

HOSTILE = "a\nb\r\x1b[31mred\x07\u202e\u2028\x85\x00"


def record(message: str, *arguments: object, error: bool = False, **fields: object) -> logging.LogRecord:
    caught = None
    if error:
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            caught = sys.exc_info()
    made = logging.LogRecord("segrpc.test", logging.WARNING, __file__, 1, message, arguments, caught)
    setattr(made, FIELDS, fields)
    return made


def test_a_text_record_is_one_line_that_no_terminal_acts_upon() -> None:
    line = TextFormatter().format(record("asked for %s", HOSTILE, request_id=HOSTILE, model="sam2.1", seconds=1.5))
    assert line.isprintable()
    assert "WARNING segrpc.test asked for a\\nb\\r\\x1b[31mred" in line
    assert line.endswith(" model=sam2.1 seconds=1.5")


@pytest.mark.parametrize("forged", ["x status=OK", "x' status='OK", 'x" status="OK', "", "ä"])
def test_a_text_value_cannot_pass_for_another_field(forged: str) -> None:
    line = TextFormatter().format(record("done", request_id=forged, status="INTERNAL"))
    assert line.endswith(f" request_id={forged!r} status=INTERNAL")


def test_no_line_of_a_traceback_can_pass_for_a_record() -> None:
    lines = TextFormatter().format(record("bug", error=True)).split("\n")
    assert all(line.isprintable() for line in lines)
    assert lines[0].endswith("WARNING segrpc.test bug")
    assert lines[1] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") for line in lines[1:])


def test_a_json_record_is_one_object_in_ascii() -> None:
    line = JsonFormatter().format(record("asked for %s", HOSTILE, error=True, request_id=HOSTILE, seconds=1.5))
    assert line.isascii()
    assert line.isprintable()
    told = json.loads(line)
    assert told["message"] == f"asked for {HOSTILE}"
    assert (told["level"], told["logger"]) == ("WARNING", "segrpc.test")
    assert (told["request_id"], told["seconds"]) == (HOSTILE, 1.5)
    assert told["exception"].endswith(f"ValueError: {HOSTILE}")
    assert told["time"].endswith("+00:00")
