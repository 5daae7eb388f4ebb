"""A result as Markdown: every table that belongs into a document."""

from collections.abc import Iterator, Sequence

from benchmarks.results import QUANTILES, BenchmarkResult, Metric, Series, Table, Waterfall


def markdown(result: BenchmarkResult) -> str:
    """The whole result, without its raw samples."""
    parts = [f"# {result.title}\n", _surroundings(result)]
    if result.notes:
        parts.append("\n".join(f"- {note}" for note in result.notes) + "\n")
    parts += [metric_table(result.metrics)] if result.metrics else []
    parts += [_titled(table.title, table.header, table.rows) for table in result.tables]
    parts += [_series_table(series) for series in result.series]
    parts += [_waterfall_table(fall) for fall in result.waterfalls]
    return "\n".join(parts)


def metric_table(metrics: Sequence[Metric]) -> str:
    """Quantiles with 95 % intervals, and the floor where one is known."""
    header = (
        "metric",
        "unit",
        *map(quantile_name, QUANTILES),
        "repeats x samples",
        "of the floor",
    )
    return _table(header, list(map(_metric_row, metrics)))


def metric_rows(metrics: Sequence[Metric]) -> Table:
    """The same as a table for other writers."""
    header = (
        "metric",
        "unit",
        *map(quantile_name, QUANTILES),
        "repeats x samples",
        "of the floor",
    )
    return Table(title="Metrics", header=header, rows=tuple(map(_metric_row, metrics)))


def surroundings(result: BenchmarkResult) -> Iterator[tuple[str, str]]:
    """What the figures depend on, as names and texts."""
    machine, (before, after) = result.machine, (result.clocks[0], result.clocks[-1])
    yield "command", f"`{result.command}`"
    yield "commit", result.commit[:12] + ("+changes" if result.commit.endswith("+changes") else "")
    yield (
        "machine",
        (
            f"{machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB, "
            f"{', '.join(machine.gpus) or 'no GPU'}, {machine.system}"
        ),
    )
    yield (
        "clocks",
        (
            f"{_clock(before.megahertz)} before, {_clock(after.megahertz)} after; load average "
            f"{before.load_average:.1f} and {after.load_average:.1f}"
        ),
    )
    yield "versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())
    yield "config", ", ".join(f"{name} {value}" for name, value in result.config.items()) or "none"
    reasons = dict.fromkeys(m.floor_reason for m in result.metrics if m.floor is not None)
    if reasons:
        yield "floor", "; ".join(reasons)
    for record in result.artifacts:
        accuracy = ", ".join(f"{name} {value:.4g}" for name, value in record.accuracy.items())
        yield (
            record.model,
            f"{record.engine}, SHA-256 {record.sha256[:12]}; {accuracy or 'accuracy not recorded'}",
        )


def number(value: float) -> str:
    """Three significant digits, without an exponent where a reader can do without."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.3g}"
    digits = max(0, 2 - int(f"{abs(value):e}".split("e")[1]))
    return f"{value:,.{digits}f}"


def quantile_name(q: float) -> str:
    """p99 for 0.99."""
    return f"p{100 * q:g}"


def _surroundings(result: BenchmarkResult) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in surroundings(result)) + "\n"


def _metric_row(metric: Metric) -> tuple[str, ...]:
    cells = [_estimate(metric, q) for q in QUANTILES]
    sizes = sorted({len(repeat) for repeat in metric.repeats})
    count = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"
    near = metric.percent_of_floor
    floor = ""
    if near is not None and metric.floor is not None:
        share = f"{near:.0f}" if near >= 1 else f"{near:.2g}"
        floor = f"{share} % of {number(metric.floor)}"
    return (metric.name, metric.unit, *cells, f"{len(metric.repeats)} x {count}", floor)


def _estimate(metric: Metric, q: float) -> str:
    estimate = metric.quantile(q)
    if estimate is None:
        return ""
    if estimate.low == estimate.high:
        return number(estimate.value)
    return f"{number(estimate.value)} ({number(estimate.low)} to {number(estimate.high)})"


def _clock(megahertz: float | None) -> str:
    return "unknown" if megahertz is None else f"{megahertz:.0f} MHz"


def _series_table(series: Series) -> str:
    rows = [
        (number(p.x), number(p.y), f"{number(p.low)} to {number(p.high)}") for p in series.points
    ]
    return _titled(
        f"{series.plot}: {series.name}", (series.x_label, series.y_label, "95 % interval"), rows
    )


def _waterfall_table(fall: Waterfall) -> str:
    total = sum(stage.milliseconds for stage in fall.stages)
    rows = [
        (stage.name, number(stage.milliseconds), f"{100 * stage.milliseconds / total:.0f} %")
        for stage in fall.stages
    ]
    return _titled(fall.title, ("stage", "ms", "share"), [*rows, ("all", number(total), "100 %")])


def _titled(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"## {title}\n\n{_table(header, rows)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [_line(header), "|" + " --- |" + " ---: |" * (len(header) - 1), *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
