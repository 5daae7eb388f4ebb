"""Which latencies of a load belong to which part of a release."""

import pytest

from benchmarks.swap import Answer, SwapConfig, Window, latency_metrics, place_of

_WINDOWS = (
    Window(name="a", kind="build", start=10.0, end=20.0),
    Window(name="a", kind="swap", start=20.0, end=25.0),
    Window(name="b", kind="build", start=40.0, end=50.0),
    Window(name="b", kind="swap", start=50.0, end=55.0),
)


def _answer(sent_at, latency_ms=100.0):
    return Answer(
        image=0, sent_at=sent_at, latency_ms=latency_ms, version=1, detections=None, error=""
    )


@pytest.mark.parametrize(
    ("sent_at", "latency_ms", "expected"),
    [
        (1.0, 100.0, ("steady", 0)),
        (9.95, 100.0, ("build", 0)),  # it was still on its way when the build began
        (15.0, 100.0, ("build", 0)),
        (19.95, 100.0, ("swap", 1)),  # a swap counts before a build
        (30.0, 100.0, ("steady", 2)),
        (30.0, 11_000.0, ("build", 2)),
        (52.0, 100.0, ("swap", 3)),
        (60.0, 100.0, ("steady", 4)),
    ],
)
def test_a_request_belongs_to_what_went_on_while_it_was_on_its_way(sent_at, latency_ms, expected):
    assert place_of(_answer(sent_at, latency_ms), _WINDOWS) == expected


def test_each_window_and_each_time_between_is_a_repeat():
    sent = (1.0, 2.0, 15.0, 22.0, 30.0, 45.0, 46.0, 52.0, 60.0)
    steady, build, swap = latency_metrics(
        [_answer(at, 1e3 * at) for at in sent[:1]] + [_answer(at, 10 * at) for at in sent[1:]],
        _WINDOWS,
    )
    assert steady.repeats == ((1000.0, 20.0), (300.0,), (600.0,))
    assert build.repeats == ((150.0,), (450.0, 460.0))
    assert swap.repeats == ((220.0,), (520.0,))


def test_a_part_that_no_request_fell_into_is_an_error():
    with pytest.raises(RuntimeError, match="no request fell into a window of the kind swap"):
        latency_metrics([_answer(1.0), _answer(15.0)], _WINDOWS)
    with pytest.raises(ValueError, match="requests is 99, expected at least 100"):
        SwapConfig(requests=99)
