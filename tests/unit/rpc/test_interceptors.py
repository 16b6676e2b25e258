"""How the boundary tells why a call ended; the rest of it is asked over real connections."""

import pytest

from segrpc.service.rpc.interceptors import TRAVEL_SECONDS, ran_out_of_time
from segrpc.service.telemetry.call import Call

SOON, LATER = TRAVEL_SECONDS / 2, TRAVEL_SECONDS * 2


@pytest.mark.parametrize(
    ("status", "finished", "streams", "remaining", "expected"),
    [
        ("CANCELLED", False, False, 0.0, True),
        ("CANCELLED", False, False, SOON, True),  # the client's clock ran out first
        ("CANCELLED", False, False, LATER, False),
        ("CANCELLED", False, True, None, False),  # no deadline
        ("OK", False, True, SOON, True),  # a stream that was cut off
        ("OK", False, True, LATER, False),  # half-closed
        ("OK", True, True, SOON, False),
        ("OK", False, False, SOON, False),  # answered just in time
        ("OK", False, False, 0.0, True),
        ("INVALID_ARGUMENT", False, True, 0.0, False),
    ],
)
def test_a_call_whose_time_was_over_is_told_from_others(
    status: str, finished: bool, streams: bool, remaining: float | None, expected: bool
) -> None:
    record = Call("/segrpc.v1.SegmentationService/Refine", status=status, finished=finished)
    assert ran_out_of_time(record, remaining, streams=streams) is expected
