"""Ways to do the same work take turns."""

import pytest

from benchmarks.turns import in_turns, milliseconds


class _Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


def test_each_way_is_called_once_before_and_then_in_blocks_whose_order_turns_round():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "abc"}
    metrics = in_turns(ways, repeats=2, samples=2, kind="work")
    assert "".join(calls) == "abc" + "aabbcc" + "ccbbaa"
    assert [metric.name for metric in metrics] == ["work: a", "work: b", "work: c"]
    assert all([len(block) for block in metric.repeats] == [2, 2] for metric in metrics)


def test_a_sample_is_the_mean_of_its_calls_by_the_given_clock():
    clock = _Clock()
    (metric,) = in_turns(
        {"work": lambda: clock.work(0.25)}, repeats=1, samples=3, calls=4, clock=clock
    )
    assert metric.name == "work"
    assert metric.unit == "ms"
    assert metric.samples == pytest.approx((250, 250, 250))
    assert milliseconds(lambda: clock.work(2), clock=clock) == pytest.approx(2000)
