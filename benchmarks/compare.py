"""Two results of the same benchmark: better, worse or the same, metric by metric.

``python -m benchmarks compare before.json after.json`` ends with 0 if nothing got worse, 1 if
something did, 2 if the two cannot be compared: they measured different things, on different
machines, or on artifacts of different accuracy (``--force`` compares all the same).
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.markdown import number
from benchmarks.results import BenchmarkResult, read_result
from benchmarks.statistics import FEWEST_REPEATS, Comparison, compare
from weaksam_rt.errors import ArtifactError

NOTHING_WORSE, SOMETHING_WORSE, NOT_COMPARABLE = 0, 1, 2
_ACCURACY_TOLERANCE = 0.002
"""Absolute; what a repeated evaluation of one model may differ by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricVerdict:
    """One metric of both results."""

    name: str
    unit: str
    first: float
    """Median."""
    second: float
    comparison: Comparison


def main(
    first: Annotated[Path, tyro.conf.Positional],
    second: Annotated[Path, tyro.conf.Positional],
    *,
    least_change: float = 0.05,
    force: bool = False,
) -> int:
    """Compare two result files and exit with the verdict.

    Args:
        first: JSON file of a result: before.
        second: JSON file of a result: after.
        least_change: Relative changes of the median below this count as none.
        force: Compare whatever the machines and the accuracies.
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
    is_worse = any(v.comparison.verdict == "worse" for v in verdicts)
    return SOMETHING_WORSE if is_worse else NOTHING_WORSE


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
    """Verdicts on the metrics that both have, in the order of the first."""
    others = {metric.name: metric for metric in second.metrics}
    verdicts = []
    for metric in first.metrics:
        other = others.get(metric.name)
        if other is None:
            continue
        comparison = compare(
            metric.repeats,
            other.repeats,
            lower_is_better=metric.better == "lower",
            least_change=least_change,
        )
        (before, after) = (m.quantile(0.5) for m in (metric, other))
        assert before is not None
        assert after is not None
        verdicts.append(
            MetricVerdict(
                name=metric.name,
                unit=metric.unit,
                first=before.value,
                second=after.value,
                comparison=comparison,
            )
        )
    return verdicts


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


def _print(verdicts: list[MetricVerdict], obstacles: list[str]) -> None:
    console = Console()
    table = Table("metric", "unit", "first", "second", "change", "p", "verdict", box=None)
    for verdict in verdicts:
        c = verdict.comparison
        p_value = "" if c.p_value is None else f"{c.p_value:.3f}"
        table.add_row(
            verdict.name, verdict.unit, number(verdict.first), number(verdict.second),
            f"{100 * c.change:+.1f} %", p_value, c.verdict,
        )  # fmt: skip
    console.print(table)
    if any(v.comparison.p_value is None for v in verdicts):
        console.print(f"Without p: fewer than {FEWEST_REPEATS} repeats say nothing.")
    for obstacle in obstacles:
        console.print(f"Compared by force although {obstacle}.", markup=False)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
