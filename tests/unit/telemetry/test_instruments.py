import math

import pytest

from segrpc.service.telemetry.instruments import Counter, Description, Distribution, Histogram


def test_a_counter_adds_up_by_labels() -> None:
    counter = Counter(Description("calls", "{call}", "Calls.", ("method",)))
    for method in ("a", "b", "a"):
        counter.add(2, method)
    family = counter.family()
    assert (family.kind, family.labels) == ("counter", ("method",))
    assert family.points == ((("a",), 4), (("b",), 2))


@pytest.mark.parametrize(("value", "bucket"), [(-1.0, 0), (1.0, 0), (1.001, 1), (10.0, 1), (10.5, 2), (math.inf, 2)])
def test_a_histogram_counts_a_value_in_its_bucket(value: float, bucket: int) -> None:
    histogram = Histogram(Description("time", "s", "Time."), (1.0, 10.0))
    histogram.record(value)
    assert histogram.family().points == (((), Distribution(tuple(int(i == bucket) for i in range(3)), value)),)


def test_a_histogram_keeps_labels_apart() -> None:
    histogram = Histogram(Description("time", "s", "Time.", ("stage", "model")), (1.0,))
    histogram.record(0.5, "decode", "a")
    histogram.record(2.0, "decode", "a")
    histogram.record(2.0, "decode", "b")
    assert dict(histogram.family().points) == {
        ("decode", "a"): Distribution((1, 1), 2.5),
        ("decode", "b"): Distribution((0, 1), 2.0),
    }


def test_what_was_told_does_not_change_any_more() -> None:
    histogram = Histogram(Description("time", "s", "Time."), (1.0,))
    histogram.record(0.5)
    told = histogram.family()
    histogram.record(0.5)
    assert told.points == (((), Distribution((1, 0), 0.5)),)
