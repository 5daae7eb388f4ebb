"""Numbers from samples: quantiles with intervals, the end of a warm-up, trends, comparisons.

Samples of one repeat follow each other and resemble each other, so they are not independent, and an
interval from all of them together would be far too narrow. Repeats are the unit here: intervals
and tests are over one figure for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
FEWEST_REPEATS = 4
"""With 4 repeats a side the rank test can reach p = 0.03; with 3 it cannot reach 0.05."""
_BOOTSTRAP_RESAMPLES = 500

Verdict = Literal["better", "worse", "same", "undecided"]
Samples = Sequence[Sequence[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A figure and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two sets of repeats of one metric."""

    change: float
    """Relative change of the quantile's median over the repeats, from the first to the second."""
    p_value: float | None
    """Of equal distributions; None where there are too few repeats."""
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Trend:
    """A straight line through samples over time."""

    slope: float
    """Per unit of time."""
    low: float
    """Lower end of the slope's interval."""
    high: float

    @property
    def grows(self) -> bool:
        """The whole interval lies above zero."""
        return self.low > 0


def quantile_estimate(repeats: Samples, q: float) -> Estimate:
    """A quantile of all samples.

    The interval is Student's over the quantiles of the repeats, of their logarithms where all are
    above zero. A single repeat has the bootstrap's instead, which takes its samples for
    independent; a single sample has none.

    Args:
        repeats: Samples by repeat, none empty.
        q: In [0, 1].
    """
    pooled = np.concatenate([np.asarray(repeat, float) for repeat in repeats])
    value = float(np.quantile(pooled, q))
    if len(repeats) > 1:
        return _student(value, np.array([np.quantile(repeat, q) for repeat in repeats]))
    if len(pooled) < 2 or np.ptp(pooled) == 0:
        return Estimate(value=value, low=value, high=value)
    interval = stats.bootstrap(
        (pooled,), lambda x, axis: np.quantile(x, q, axis=axis), method="percentile",
        n_resamples=_BOOTSTRAP_RESAMPLES, confidence_level=CONFIDENCE, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return Estimate(value=value, low=float(interval.low), high=float(interval.high))


def compare(
    first: Samples,
    second: Samples,
    *,
    lower_is_better: bool,
    least_change: float,
    significance: float = 0.05,
    q: float = 0.5,
) -> Comparison:
    """Whether the second set is better or worse than the first.

    A verdict needs both: a change of at least ``least_change``, and a rank test over the quantiles
    of the repeats below ``significance``. Without the first, many repeats would make a finding of
    any trifle; without the second, noise would.

    Args:
        first: Samples by repeat, none empty.
        second: The same.
        lower_is_better: Which way is good.
        least_change: Relative; the median of the repeats' quantiles must change by so much.
        significance: In (0, 1).
        q: The quantile of each repeat that is compared, in [0, 1].

    Source:
        Mann-Whitney U, exact for few repeats (scipy).
    """
    before, after = (np.array([np.quantile(r, q) for r in side]) for side in (first, second))
    base = float(np.median(before))
    # A difference of times may lie below zero, and more is more there too.
    change = (float(np.median(after)) - base) / abs(base) if base else float("inf")
    if min(len(before), len(after)) < FEWEST_REPEATS:
        return Comparison(change=change, p_value=None, verdict="undecided")
    p_value = float(stats.mannwhitneyu(before, after, method="auto").pvalue)
    if abs(change) < least_change:
        verdict: Verdict = "same"
    elif p_value >= significance:
        verdict = "undecided"
    else:
        verdict = "better" if (change < 0) == lower_is_better else "worse"
    return Comparison(change=change, p_value=p_value, verdict=verdict)


def end_of_warm_up(values: Sequence[float]) -> int | None:
    """How many leading values belong to the warm-up; None: the values never settled.

    The cut leaves the rest with the smallest standard error of its mean: dropping a slow start
    lowers it, dropping good values raises it. It is sought in the first half; a cut at its end says
    that the values were still on their way. Fewer than 40 values say nothing.

    Source:
        MSER-5 (White, Simulation 69(6), 1997): batches of 5.
    """
    size, fewest_batches = 5, 8
    num_batches = len(values) // size
    if num_batches < fewest_batches:
        return None
    batches = (
        np.asarray(values[: size * num_batches], float).reshape(num_batches, size).mean(axis=1)
    )
    half = num_batches // 2
    errors = [np.var(batches[cut:]) / (num_batches - cut) for cut in range(half + 1)]
    cut = int(np.argmin(errors))
    return None if cut == half else cut * size


def trend(times: Sequence[float], values: Sequence[float]) -> Trend:
    """The robust slope through ``values`` over ``times``.

    Source:
        Theil-Sen's median of pairwise slopes and its interval (scipy).
    """
    fit = stats.theilslopes(values, times, alpha=CONFIDENCE)
    return Trend(slope=float(fit.slope), low=float(fit.low_slope), high=float(fit.high_slope))


def _student(value: float, figures: NDArray[np.float64]) -> Estimate:
    """Student's interval around ``value``, as wide as the scatter of ``figures`` says."""
    in_logarithms = bool((figures > 0).all()) and value > 0
    scale = np.log(figures) if in_logarithms else figures
    reach = float(stats.sem(scale) * stats.t.ppf((1 + CONFIDENCE) / 2, len(figures) - 1))
    if in_logarithms:
        factor = float(np.exp(reach))
        return Estimate(value=value, low=value / factor, high=value * factor)
    return Estimate(value=value, low=value - reach, high=value + reach)
