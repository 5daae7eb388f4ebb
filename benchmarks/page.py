"""A result as one page for a browser without network: tables and plots, no scripts."""

import html
import io
import math
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.markdown import metric_rows, surroundings
from benchmarks.results import BenchmarkResult, Metric, Series, Table, Waterfall

_FEWEST_FOR_A_CURVE = 20
"""A distribution of fewer samples is not drawn."""
_SIZE = (7.2, 4.0)
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body{{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:84rem;padding:0 1rem}}
table{{border-collapse:collapse;margin:.6rem 0 1.6rem}}
th,td{{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right;vertical-align:top}}
th:first-child,td:first-child,.about td{{text-align:left}}
.plots{{display:flex;flex-wrap:wrap;gap:1rem}}svg{{max-width:100%;height:auto}}
.scroll{{overflow-x:auto}}
</style></head><body>
"""


def page(result: BenchmarkResult) -> str:
    """The page as HTML; every text is escaped."""
    about = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>"
        for name, text in surroundings(result)
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in result.notes)
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


def plots(result: BenchmarkResult) -> Iterator[str]:
    """Every plot of the result as SVG: distributions, curves, waterfalls."""
    by_unit: dict[str, list[Metric]] = {}
    for metric in result.metrics:
        if len(metric.samples) >= _FEWEST_FOR_A_CURVE:
            by_unit.setdefault(metric.unit, []).append(metric)
    for unit, metrics in by_unit.items():
        yield _distribution_plot(unit, metrics)
    by_plot: dict[str, list[Series]] = {}
    for series in result.series:
        by_plot.setdefault(series.plot, []).append(series)
    for title, curves in by_plot.items():
        yield _curve_plot(title, curves)
    for fall in result.waterfalls:
        yield _waterfall_plot(fall)


def _distribution_plot(unit: str, metrics: Sequence[Metric]) -> str:
    figure, axes = _figure(f"Distribution, {unit}")
    for metric in metrics:
        values = np.sort(metric.samples)
        # Share of samples above: on this axis the tail, which users feel, has room.
        above = 1 - np.arange(len(values)) / len(values)
        axes.step(values, above, where="post", label=metric.name)
    axes.set(xlabel=unit, ylabel="share of samples above", xscale="log", yscale="log")
    axes.set_yticks([1, 0.5, 0.1, 0.01], ["all", "p50", "p90", "p99"])
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
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)
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
