import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.statistics import compare, end_of_warm_up, quantile_estimate, trend


def repeats(rng, num, size, *, level=10.0, between=0.02, within=0.1):
    """Samples as a machine gives them: repeats differ from each other as well."""
    levels = level * np.exp(between * rng.standard_normal(num))
    return [list(x * np.exp(within * rng.standard_normal(size))) for x in levels]


def test_the_interval_of_a_quantile_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        estimate = quantile_estimate(repeats(rng, 5, 40), 0.5)
        covered += estimate.low <= 10.0 <= estimate.high
    assert 0.91 <= covered / 300 <= 0.99


def test_one_repeat_of_few_samples_has_a_wide_interval_and_one_sample_none():
    one = quantile_estimate([[3.0]], 0.5)
    assert one.low == one.value == one.high == 3.0
    few = quantile_estimate([list(np.random.default_rng(0).normal(10, 1, 30))], 0.5)
    assert few.low < few.value < few.high


@given(st.lists(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=9), min_size=2, max_size=5))
def test_a_quantile_lies_in_its_interval_and_scales_with_the_unit(samples):
    estimate = quantile_estimate(samples, 0.9)
    assert estimate.low <= estimate.value <= estimate.high
    scaled = quantile_estimate([[1000 * x for x in repeat] for repeat in samples], 0.9)
    assert scaled.value == pytest.approx(1000 * estimate.value)
    assert scaled.low == pytest.approx(1000 * estimate.low)


def test_equal_programs_are_rarely_found_to_differ():
    rng = np.random.default_rng(1)
    verdicts = [
        compare(repeats(rng, 5, 30), repeats(rng, 5, 30), lower_is_better=True, least_change=0.02)
        for _ in range(200)
    ]
    assert sum(v.verdict in ("better", "worse") for v in verdicts) <= 12


@pytest.mark.parametrize(("lower_is_better", "verdict"), [(True, "worse"), (False, "better")])
def test_a_fifth_more_is_found(lower_is_better, verdict):
    rng = np.random.default_rng(2)
    found = [
        compare(
            repeats(rng, 5, 30),
            repeats(rng, 5, 30, level=12.0),
            lower_is_better=lower_is_better,
            least_change=0.05,
        ).verdict
        for _ in range(50)
    ]
    assert found.count(verdict) >= 48


def test_a_trifle_is_the_same_however_certain_and_three_repeats_decide_nothing():
    exact = [[10.0]] * 8
    certain = compare(exact, [[10.1]] * 8, lower_is_better=True, least_change=0.05)
    assert certain.p_value < 0.01
    assert certain.verdict == "same"
    few = compare(exact[:3], [[20.0]] * 3, lower_is_better=True, least_change=0.05)
    assert few.verdict == "undecided"
    assert few.change == pytest.approx(1.0)


def test_a_difference_that_sinks_below_zero_further_gets_less():
    found = compare([[-1.0]] * 5, [[-2.0]] * 5, lower_is_better=True, least_change=0.05)
    assert found.change == -1.0
    assert found.verdict == "better"


def test_the_warm_up_ends_where_the_values_settle():
    rng = np.random.default_rng(3)
    settled = list(10 + rng.normal(0, 0.5, 150))
    slow = list(np.linspace(60, 12, 30))
    assert 20 <= end_of_warm_up(slow + settled) <= 40
    assert end_of_warm_up(settled) <= 30
    assert end_of_warm_up(list(np.linspace(60, 10, 120))) is None  # still on its way
    assert end_of_warm_up(settled[:20]) is None  # too few to say


def test_a_leak_is_seen_through_noise_and_noise_is_no_leak():
    rng = np.random.default_rng(4)
    times = np.arange(120.0)
    noise = rng.normal(0, 3, 120)
    assert not trend(times, list(500 + noise)).grows
    leak = trend(times, list(500 + 0.2 * times + noise))
    assert leak.grows
    assert leak.low < 0.2 < leak.high
