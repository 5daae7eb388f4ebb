"""A result as one page for a browser without network: tables and plots, no scripts."""

import html
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.markdown import metric_rows, surroundings
from benchmarks.results import BenchmarkResult, Metric, Series, Table, Waterfall

_FEWEST_FOR_A_CURVE = 20
"""A distribution of fewer samples is not drawn."""
_SIZE = (7.2, 4.6)
_QUANTILES = {1: "all", 0.5: "p50", 0.1: "p90", 0.01: "p99", 0.001: "p99.9"}
"""By the share of samples above."""
_NARROW = 8
"""Greatest quotient of the ends of an axis that is not logarithmic."""
_LONG_LABEL = 45
"""Characters; longer ones do not stand two in a row."""
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body{{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:84rem;padding:0 1rem}}
table{{border-collapse:collapse;margin:.6rem 0 1.6rem}}
th,td{{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right;vertical-align:top}}
th:first-child,td:first-child,.about td{{text-align:left}}
.plots{{display:flex;flex-wrap:wrap;gap:1rem}}
.plots svg{{flex:1 1 34rem;max-width:46rem;height:auto}}
.scroll{{overflow-x:auto}}
</style></head><body>
"""


def page(result: BenchmarkResult) -> str:
    """The page as HTML; every text is escaped."""
    about = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{_with_code(text)}</td></tr>"
        for name, text in surroundings(result)
    )
    notes = "".join(f"<li>{_with_code(note)}</li>" for note in result.notes)
    tables = ([metric_rows(result.metrics)] if result.metrics else []) + list(result.tables)
    return "\n".join(
        [
            _HEAD.format(title=html.escape(result.title)),
            f"<h1>{html.escape(result.title)}</h1>",
            f'<table class="about">{about}</table>',
            f"<ul>{notes}</ul>" if notes else "",
            '<div class="plots">',
            *plots(result),
            "</div>",
            *map(_table, tables),
            "</body></html>",
            "",
        ]
    )


def _with_code(text: str) -> str:
    """Escaped; what Markdown has between backticks is code here too."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))


def plots(result: BenchmarkResult) -> Iterator[str]:
    """Every plot of the result as SVG: distributions, curves, waterfalls."""
    groups: dict[tuple[str, str], dict[str, Metric]] = {}
    for metric in result.metrics:
        if len(metric.samples) >= _FEWEST_FOR_A_CURVE:
            kind, _, way = metric.name.rpartition(": ")
            groups.setdefault((kind, metric.unit), {})[way] = metric
    for (kind, unit), metrics in groups.items():
        yield _distribution_plot(kind or "Distribution", unit, metrics)
    by_plot: dict[str, list[Series]] = {}
    for series in result.series:
        by_plot.setdefault(series.plot, []).append(series)
    for title, curves in by_plot.items():
        yield _curve_plot(title, curves)
    for fall in result.waterfalls:
        yield _waterfall_plot(fall)


def _distribution_plot(title: str, unit: str, metrics: Mapping[str, Metric]) -> str:
    figure, axes = _figure(title)
    for name, metric in metrics.items():
        values = np.sort(metric.samples)
        # Share of samples above: on this axis the tail, which users feel, has room.
        above = 1 - np.arange(len(values)) / len(values)
        axes.step(values, above, where="post", label=name)
    axes.set(xlabel=unit, ylabel="share of samples above", xscale="log", yscale="log")
    most = max(len(metric.samples) for metric in metrics.values())
    shown = [q for q in _QUANTILES if q * most >= 1]
    axes.set_yticks(shown, [_QUANTILES[q] for q in shown])
    axes.set_ylim(0.8 / most, 1.2)
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    if high < _NARROW * low:  # a logarithmic axis would have no round number to show
        axes.set_xscale("linear")
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    return _svg(figure, axes)


def _curve_plot(title: str, curves: Sequence[Series]) -> str:
    figure, axes = _figure(title)
    for series in curves:
        x, y = [p.x for p in series.points], [p.y for p in series.points]
        reach = [[p.y - p.low for p in series.points], [p.high - p.y for p in series.points]]
        axes.errorbar(x, y, yerr=np.maximum(reach, 0), marker="o", capsize=3, label=series.name)
    axes.set(xlabel=curves[0].x_label, ylabel=curves[0].y_label)
    axes.set_ylim(bottom=0)
    return _svg(figure, axes)


def _waterfall_plot(fall: Waterfall) -> str:
    figure, axes = _figure(fall.title)
    start = 0.0
    for row, stage in enumerate(fall.stages):
        axes.barh(row, stage.milliseconds, left=start, color="#d65a31")
        axes.text(
            start + stage.milliseconds, row, f" {stage.milliseconds:.2f}", va="center", fontsize=8
        )
        start += stage.milliseconds
    axes.set_yticks(range(len(fall.stages)), [stage.name for stage in fall.stages])
    axes.invert_yaxis()
    axes.set(xlabel="ms", xlim=(0, 1.12 * start if start > 0 and math.isfinite(start) else 1))
    return _svg(figure, axes)


def _figure(title: str) -> tuple[Figure, Axes]:
    # A figure of its own, not pyplot's: no window system, no global state.
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Figure, axes: Axes) -> str:
    if labels := axes.get_legend_handles_labels()[1]:
        # Below: inside it hides curves.
        columns = 1 if max(map(len, labels)) > _LONG_LABEL else 2
        figure.legend(loc="outside lower left", fontsize=8, ncols=columns, frameon=False)
    file = io.StringIO()
    # No date and no random ids: the same result gives the same page.
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in table.rows)
    return (
        f"<h2>{html.escape(table.title)}</h2>"
        f'<div class="scroll"><table><tr>{row(table.header, "th")}</tr>{body}</table></div>'
    )
