"""The table from errors to statuses covers the whole tree."""

import re
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from segrpc.service import errors
from segrpc.service.admission.ledger import Ledger
from segrpc.service.admission.limits import Limits, Resource
from segrpc.service.rpc.status import code_of, internal_status, status_of


def leaves(kind: type[errors.SegrpcError]) -> list[type[errors.SegrpcError]]:
    below = [leaf for child in kind.__subclasses__() for leaf in leaves(child)]
    return below or [kind]


OF_OPERATORS = (errors.ModelLoadError, errors.ConfigurationError)
CLIENT_ERRORS = [kind for kind in leaves(errors.SegrpcError) if kind not in OF_OPERATORS]


@pytest.mark.parametrize("kind", CLIENT_ERRORS)
def test_each_error_has_a_code_and_a_reason(kind: type[errors.SegrpcError]) -> None:
    assert code_of(kind("text")) is not grpc.StatusCode.INTERNAL
    assert kind.reason or kind is errors.DeadlineError


def test_reasons_are_unique() -> None:
    reasons = [kind.reason for kind in CLIENT_ERRORS]
    assert len(set(reasons)) == len(reasons)


def test_the_documented_table_is_complete() -> None:
    table = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text("utf-8").partition("## Errors")[2]
    documented = {
        word for line in table.splitlines() if line.startswith("|") for word in re.findall(r"[A-Z_]{7,}", line)
    }
    for kind in CLIENT_ERRORS:
        assert {kind.reason or "DEADLINE_EXCEEDED", code_of(kind("text")).name} <= documented, kind


def test_the_whole_status_fits_into_trailers() -> None:
    many = [errors.Violation(f"prompts[{i}].points[{i}].x", "far " * 1000) for i in range(1000)]
    assert len(status_of(errors.InvalidFieldError.of_all(many), "r" * 128).SerializeToString()) < 6000


def details_of(status: status_pb2.Status) -> list[str]:
    return [detail.TypeName() for detail in status.details]


def test_details() -> None:
    status = status_of(errors.OverloadedError("full", retry_after=1.5), "mine")
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert details_of(status) == ["google.rpc.ErrorInfo", "google.rpc.RetryInfo", "google.rpc.RequestInfo"]
    retry = error_details_pb2.RetryInfo()
    status.details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1500


def test_a_principals_own_limit() -> None:
    ledger = Ledger(Limits(max_requests=2, principal_share=0.5))
    ledger.take(Resource.REQUESTS, "key:alice")
    with pytest.raises(errors.OverloadedError) as own:
        ledger.take(Resource.REQUESTS, "key:alice")
    status = status_of(own.value, "")
    assert details_of(status) == ["google.rpc.ErrorInfo", "google.rpc.RetryInfo", "google.rpc.QuotaFailure"]
    failure = error_details_pb2.QuotaFailure()
    status.details[2].Unpack(failure)
    (violation,) = failure.violations
    assert violation.subject == "key:alice"
    assert "1 requests at once (max_requests)" in violation.description

    ledger.take(Resource.REQUESTS, "key:bob")
    with pytest.raises(errors.OverloadedError) as together:
        ledger.take(Resource.REQUESTS, "key:carol")
    assert "google.rpc.QuotaFailure" not in details_of(status_of(together.value, ""))


def test_a_bug_shows_its_id_only() -> None:
    status = internal_status("id-1")
    assert status.message.endswith("id-1")
    assert details_of(status) == ["google.rpc.ErrorInfo"]
