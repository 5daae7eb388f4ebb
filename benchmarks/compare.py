"""Two results of the same benchmark: better, worse or the same, metric by metric.

``python -m benchmarks compare before.json after.json`` ends with 0 if nothing was found to be
worse, 1 if something was, 2 if the two cannot be compared: they measured different things, on
different machines, or on artifacts of different accuracy (``--force`` compares all the same), or
the second lacks a metric of the first (``--allow-missing`` compares the rest). Compared are the
medians, and the highest of p99 and p90 that every repeat has samples beyond. A 0 is no proof of
equality: the summary says how many verdicts could not be reached, and why.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.entry import enter
from benchmarks.markdown import number, quantile_name
from benchmarks.results import BenchmarkResult, Metric, read_result
from benchmarks.statistics import FEWEST_REPEATS, Comparison, compare
from weaksam_rt.errors import ArtifactError

NOTHING_WORSE, SOMETHING_WORSE, NOT_COMPARABLE = 0, 1, 2
_ACCURACY_TOLERANCE = 0.002
"""Absolute; what a repeated evaluation of one model may differ by."""
_TAILS = (0.99, 0.9)


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricVerdict:
    """One quantile of one metric of both results."""

    name: str
    unit: str
    quantile: float
    """In (0, 1); of the samples of each repeat."""
    first: float
    """Median of the repeats' quantiles."""
    second: float
    comparison: Comparison


def main(
    first: Annotated[Path, tyro.conf.Positional],
    second: Annotated[Path, tyro.conf.Positional],
    *,
    least_change: float = 0.05,
    force: bool = False,
    allow_missing: bool = False,
) -> int:
    """Compare two result files and exit with the verdict.

    Args:
        first: JSON file of a result: before.
        second: JSON file of a result: after.
        least_change: Relative changes below this count as none.
        force: Compare whatever the machines and the accuracies.
        allow_missing: Metrics of the first that the second lacks are no failure.
    """
    error = Console(stderr=True)
    try:
        before, after = read_result(first), read_result(second)
    except ArtifactError as failure:
        error.print(str(failure), markup=False)
        return NOT_COMPARABLE
    obstacles = list(hindrances(before, after))
    if obstacles and not force:
        error.print("These results cannot be compared:", *obstacles, sep="\n- ", markup=False)
        error.print("--force compares them all the same.")
        return NOT_COMPARABLE
    verdicts = compare_results(before, after, least_change=least_change)
    if not verdicts:
        error.print("The two results have no metric in common.")
        return NOT_COMPARABLE
    _print(verdicts, obstacles)
    for name in without_partner(after, before):
        Console().print(f"Only in the second: {name}", markup=False)
    missing = without_partner(before, after)
    for name in missing:
        error.print(f"Missing in the second: {name}", markup=False)
    if any(v.comparison.verdict == "worse" for v in verdicts):
        return SOMETHING_WORSE
    if missing and not allow_missing:
        error.print(
            f"{len(missing)} of {len(before.metrics)} metrics of the first were not compared; "
            "--allow-missing if they need not be."
        )
        return NOT_COMPARABLE
    return NOTHING_WORSE


def hindrances(first: BenchmarkResult, second: BenchmarkResult) -> Iterator[str]:
    """Why the two must not be compared, one sentence each; none: they may."""
    if first.what != second.what:
        yield f"the first measured {first.what}, the second {second.what}"
    if first.machine != second.machine:
        yield f"the machines differ: {first.machine} and {second.machine}"
    if first.config != second.config:
        names = sorted({*first.config, *second.config})
        differing = [n for n in names if first.config.get(n) != second.config.get(n)]
        yield f"the settings differ in {', '.join(differing)}"
    before = {record.model: record for record in first.artifacts}
    after = {record.model: record for record in second.artifacts}
    for model in sorted({*before, *after}):
        if model not in before or model not in after:
            yield f"{model} took part in only one of them"
        elif before[model].sha256 != after[model].sha256:
            yield from _accuracy_hindrances(model, before[model].accuracy, after[model].accuracy)


def compare_results(
    first: BenchmarkResult, second: BenchmarkResult, *, least_change: float
) -> list[MetricVerdict]:
    """Verdicts on the medians and tails of the metrics that both have, in the order of the
    first.
    """
    others = {metric.name: metric for metric in second.metrics}
    return [
        _verdict(metric, others[metric.name], q, least_change)
        for metric in first.metrics
        if metric.name in others
        for q in _quantiles(metric, others[metric.name])
    ]


def without_partner(first: BenchmarkResult, second: BenchmarkResult) -> list[str]:
    """Names of the metrics of the first that the second lacks."""
    names = {metric.name for metric in second.metrics}
    return [metric.name for metric in first.metrics if metric.name not in names]


def summary(verdicts: Sequence[MetricVerdict]) -> str:
    """How many verdicts of which kind, and why the others could not be reached."""
    counts = Counter(v.comparison.verdict for v in verdicts)
    found = ", ".join(
        f"{counts[kind]} {kind}" for kind in ("better", "worse", "same") if counts[kind]
    )
    text = f"Of {len(verdicts)} comparisons: {found or 'no verdict'}"
    if not counts["undecided"]:
        return f"{text}."
    few = sum(v.comparison.p_value is None for v in verdicts)
    reasons = {
        f"{few} for fewer than {FEWEST_REPEATS} repeats: measure again with more": few,
        f"{counts['undecided'] - few} as the change may be chance": counts["undecided"] - few,
    }
    why = "; ".join(reason for reason, number in reasons.items() if number)
    return f"{text}; {counts['undecided']} UNDECIDED ({why})."


def _quantiles(first: Metric, second: Metric) -> Iterator[float]:
    """The median, and the highest tail that all repeats of both have samples beyond; where more is
    better the tail is at the low end.
    """
    yield 0.5
    fewest = min(len(repeat) for repeat in (*first.repeats, *second.repeats))
    for tail in _TAILS:
        if round(fewest * (1 - tail), 6) >= 1:
            yield tail if first.better == "lower" else 1 - tail
            return


def _verdict(first: Metric, second: Metric, q: float, least_change: float) -> MetricVerdict:
    before, after = (
        float(np.median([np.quantile(repeat, q) for repeat in metric.repeats]))
        for metric in (first, second)
    )
    return MetricVerdict(
        name=first.name,
        unit=first.unit,
        quantile=q,
        first=before,
        second=after,
        comparison=compare(
            first.repeats,
            second.repeats,
            lower_is_better=first.better == "lower",
            least_change=least_change,
            q=q,
        ),
    )


def _accuracy_hindrances(
    model: str, before: Mapping[str, float], after: Mapping[str, float]
) -> Iterator[str]:
    if not before or not after:
        yield f"{model} is another file, and its accuracy is not recorded"
        return
    for name in sorted({*before, *after}):
        left, right = before.get(name), after.get(name)
        if left is None or right is None or abs(left - right) > _ACCURACY_TOLERANCE:
            yield f"{model} is another file of another accuracy: {name} {left} and {right}"


def _print(verdicts: Sequence[MetricVerdict], obstacles: Sequence[str]) -> None:
    console = Console()
    table = Table("metric", "", "unit", "first", "second", "change", "p", "verdict", box=None)
    for verdict in verdicts:
        c = verdict.comparison
        p_value = "" if c.p_value is None else f"{c.p_value:.3f}"
        table.add_row(
            verdict.name, quantile_name(verdict.quantile), verdict.unit, number(verdict.first),
            number(verdict.second), f"{100 * c.change:+.1f} %", p_value, c.verdict,
        )  # fmt: skip
    console.print(table)
    for obstacle in obstacles:
        console.print(f"Compared by force although {obstacle}.", markup=False)
    console.print(summary(verdicts), markup=False, style="bold")


if __name__ == "__main__":
    enter(main)
