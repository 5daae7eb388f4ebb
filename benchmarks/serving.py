"""A served pipeline under load: latency, throughput, goodput, closed and open loop.

``python -m benchmarks serving assets/demo_models`` starts a server, waits until its latencies have
settled, and then takes turns between all loads, repeat by repeat, so that whatever else the
machine does disturbs all alike. The load generator runs on the same
machine; its share is in every figure.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.progress import Progress

from benchmarks.entry import enter
from benchmarks.goodput import Probe, Slo, best_probe, confirm, goodput, search_rate
from benchmarks.in_process import PipelineName, TracedPipeline, call_of, costs_of_calls
from benchmarks.load import (
    Limits,
    Load,
    Send,
    WarmUp,
    closed_loop,
    open_loop,
    poisson_arrivals,
    warm_up,
)
from benchmarks.machine import Peaks, measure_peaks
from benchmarks.pictures import pictures
from benchmarks.reporting import report
from benchmarks.results import (
    BenchmarkResult,
    Metric,
    Point,
    Recorder,
    Series,
    Table,
    artifact_record,
)
from benchmarks.served import (
    ModelStatistics,
    read_statistics,
    sender,
    serve,
    since,
    together,
    wire_bytes,
)
from benchmarks.statistics import quantile_estimate
from weaksam_rt.model_config import ServingOptions
from weaksam_rt.model_repository import ExportedModels, load_exported_models

_SEED = 20240212


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingConfig:
    """What is offered to the server."""

    pipeline: PipelineName = "detect"
    """Which of the three."""
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Requests in flight of each closed loop."""
    loads: tuple[float, ...] = (0.3, 0.5, 0.7, 0.85)
    """Open loops, as shares of the highest closed-loop throughput, above 0."""
    slo: str = "p99=200ms"
    """Promise whose highest goodput is searched, such as p99=50ms; empty: no search."""
    slo_steps: int = 5
    """Loads that the search offers; the highest that kept the promise is offered again, so often as
    there are repeats, and the next lower one where it does not keep it again."""
    repeats: int = 5
    """Of every load, at least 1."""
    seconds: float = 5.0
    """Longest one load goes on."""
    requests: int = 2000
    """Most requests of one load."""
    warm_up_seconds: float = 20.0
    """Longest warm-up; it ends when the latencies have settled."""
    max_pictures: int = 32
    """Different pictures that are sent in turn."""
    threads: int = 0
    """Threads of one operator of an engine; 0: all cores."""
    max_queue_delay_us: int = 0
    """How long an engine waits for more requests to batch."""

    @property
    def limits(self) -> Limits:
        """Of one load."""
        return Limits(seconds=self.seconds, requests=self.requests)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """All loads of one run."""

    warm_up: WarmUp
    closed: dict[int, list[Load]]
    """By concurrency."""
    statistics: dict[int, dict[str, ModelStatistics]]
    """Triton's, by concurrency, over all repeats."""
    capacity: float
    """Highest closed-loop throughput, images a second; what the loads are shares of."""
    opened: dict[float, list[Load]]
    """By share of the capacity."""
    probes: list[Probe]
    """Of the search for the highest goodput."""
    confirmed: list[Probe]
    """What the search found, offered again."""


def main(
    models: Annotated[Path, tyro.conf.Positional],
    config: Annotated[ServingConfig, tyro.conf.arg(name="")] = ServingConfig(),
    *,
    pictures_from: Path | None = None,
    output: Path | None = None,
) -> None:
    """Measure and report.

    Args:
        models: Folder of exported models.
        config: Loads.
        pictures_from: A picture, or a folder of them; None: a photograph of 640x480.
        output: Path without suffix; result.json, .md and .html are written there.
    """
    report(measure(load_exported_models(models), config, pictures_from), output)


def measure(
    exported: ExportedModels, config: ServingConfig, pictures_from: Path | None = None
) -> BenchmarkResult:
    """All loads on a server of its own."""
    data = pictures(pictures_from, config.max_pictures)
    recorder = Recorder(
        what="serving",
        title=f"weaksam_{config.pipeline} under load",
        config={**asdict(config), "pictures": len(data), "bytes": sum(map(len, data)) // len(data)},
        artifacts=tuple(map(artifact_record, exported.artifacts)),
    )
    peaks = measure_peaks()
    calls = [call_of(config.pipeline, one) for one in data]
    options = ServingOptions(
        engine_threads=config.threads, max_queue_delay_us=config.max_queue_delay_us
    )
    with serve(exported, options=options) as server:
        wire = wire_bytes(server.grpc_address, calls[0])
        measured = asyncio.run(_run(server.grpc_address, calls, config))
    peaks = peaks.or_higher(measure_peaks())
    floor_ms = asyncio.run(_floor_ms(exported, config.pipeline, data[0], peaks))
    return recorder.result(
        _metrics(measured, config, floor_ms),
        series=_series(measured, config),
        tables=(
            _offered_table(measured),
            _statistics_table(measured),
            _wire_table(wire.request, wire.response),
        ),
        notes=_notes(measured, config, peaks),
    )


async def _floor_ms(
    exported: ExportedModels, pipeline: PipelineName, data: bytes, peaks: Peaks
) -> float:
    """Least time of the engines' work of one request on this machine."""
    trace = await TracedPipeline(exported, pipeline).trace(data)
    costs = costs_of_calls(trace.calls, exported.artifacts)
    each = [cost for model_costs in costs.values() for cost in model_costs]
    return 1e3 * sum(peaks.floor_s(cost.flops, cost.least_bytes) for cost in each)


async def _run(address: str, calls: Sequence[Any], config: ServingConfig) -> _Measured:
    async with sender(address, calls) as send:
        with Progress(transient=True) as progress:
            task = progress.add_task("warm-up", total=None)
            limits = Limits(seconds=config.warm_up_seconds, requests=config.requests)
            warmed = await warm_up(send, concurrency=max(config.concurrency), limits=limits)
            progress.update(task, description="closed loops")
            closed, statistics = await _closed_loops(send, address, config)
            capacity = max(_mean_throughput(loads) for loads in closed.values())
            progress.update(task, description="open loops")
            opened = await _open_loops(send, capacity, config)
            progress.update(task, description="highest goodput")
            probes, confirmed = await _highest_goodput(send, capacity, config)
    return _Measured(
        warm_up=warmed,
        closed=closed,
        statistics=statistics,
        capacity=capacity,
        opened=opened,
        probes=probes,
        confirmed=confirmed,
    )


async def _closed_loops(
    send: Send, address: str, config: ServingConfig
) -> tuple[dict[int, list[Load]], dict[int, dict[str, ModelStatistics]]]:
    loads: dict[int, list[Load]] = {c: [] for c in config.concurrency}
    seen: dict[int, list[dict[str, ModelStatistics]]] = {c: [] for c in config.concurrency}
    for _ in range(config.repeats):
        for concurrency, done in loads.items():
            before = await asyncio.to_thread(read_statistics, address)
            done.append(await closed_loop(send, concurrency=concurrency, limits=config.limits))
            after = await asyncio.to_thread(read_statistics, address)
            seen[concurrency].append(since(before, after))
    return loads, {concurrency: together(parts) for concurrency, parts in seen.items()}


async def _open_loops(
    send: Send, capacity: float, config: ServingConfig
) -> dict[float, list[Load]]:
    loads: dict[float, list[Load]] = {share: [] for share in config.loads}
    for repeat in range(config.repeats):
        for share, done in loads.items():
            arrivals = poisson_arrivals(share * capacity, limits=config.limits, seed=_SEED + repeat)
            done.append(await open_loop(send, arrivals))
    return loads


async def _highest_goodput(
    send: Send, capacity: float, config: ServingConfig
) -> tuple[list[Probe], list[Probe]]:
    """The search's probes, and those that were offered again."""
    if not config.slo:
        return [], []
    probed = 0

    async def offer(rate: float) -> Load:
        nonlocal probed
        probed += 1
        seconds = 2 * config.seconds  # the tail needs more requests than the middle
        limits = Limits(seconds=seconds, requests=2 * config.requests)
        arrivals = poisson_arrivals(rate, limits=limits, seed=_SEED - probed)
        return await open_loop(send, arrivals)

    slo = Slo.parse(config.slo)
    probes = await search_rate(slo, offer, highest=1.1 * capacity, steps=config.slo_steps)
    return probes, await confirm(slo, offer, probes, repeats=config.repeats)


def _mean_throughput(loads: Sequence[Load]) -> float:
    return float(np.mean([load.throughput for load in loads]))


# ---------------------------------------------------------------------------------------------
# What is reported
# ---------------------------------------------------------------------------------------------


def _metrics(measured: _Measured, config: ServingConfig, floor_ms: float) -> list[Metric]:
    reason = "the engines' operations at the measured peak"
    metrics = []
    for concurrency, loads in measured.closed.items():
        metrics.append(
            Metric(
                name=f"latency, closed loop, {concurrency} in flight",
                unit="ms",
                repeats=_latencies(loads),
                floor=floor_ms,
                floor_reason=reason,
            )
        )
        metrics.append(
            Metric(
                name=f"throughput, closed loop, {concurrency} in flight",
                unit="images/s",
                better="higher",
                repeats=tuple((load.throughput,) for load in loads),
                floor=1e3 / floor_ms,
                floor_reason=reason,
            )
        )
    for share, loads in measured.opened.items():
        metrics.append(
            Metric(
                name=f"latency, open loop, {share:.0%} of capacity",
                unit="ms",
                repeats=_latencies(loads),
                floor=floor_ms,
                floor_reason=reason,
            )
        )
    best = best_probe(measured.confirmed)
    if best is not None:
        slo = Slo.parse(config.slo)
        metrics.append(
            Metric(
                name="highest goodput under the promise",
                unit="images/s",
                better="higher",
                repeats=tuple((goodput(best.rate, load, slo),) for load in best.loads),
                floor=1e3 / floor_ms,
                floor_reason=reason,
            )
        )
    return metrics


def _latencies(loads: Sequence[Load]) -> tuple[tuple[float, ...], ...]:
    return tuple(load.latencies_ms for load in loads if load.latencies_ms)


def _series(measured: _Measured, config: ServingConfig) -> list[Series]:
    throughput = [
        _point(concurrency, [load.throughput for load in loads])
        for concurrency, loads in measured.closed.items()
    ]
    series = [
        Series(
            plot="Throughput against concurrency",
            name="closed loop",
            x_label="requests in flight",
            y_label="images/s",
            points=tuple(throughput),
        )
    ]
    if config.slo:
        slo = Slo.parse(config.slo)
        offered = {share * measured.capacity: loads for share, loads in measured.opened.items()}
        # What is offered again stands for the probe of the same rate.
        offered |= {p.rate: list(p.loads) for p in (*measured.probes, *measured.confirmed)}
        points = [
            _point(rate, [goodput(rate, load, slo) for load in loads])
            for rate, loads in sorted(offered.items())
        ]
        series.append(
            Series(
                plot="Goodput against offered load",
                name=f"within {slo.limit_ms:g} ms of the intended sending",
                x_label="offered images/s",
                y_label="images/s in time",
                points=tuple(points),
            )
        )
    return series


def _point(x: float, figures: Sequence[float]) -> Point:
    estimate = quantile_estimate([(figure,) for figure in figures], 0.5)
    return Point(x=x, y=estimate.value, low=estimate.low, high=estimate.high)


def _statistics_table(measured: _Measured) -> Table:
    rows = [
        (
            str(concurrency),
            model,
            str(s.requests),
            f"{s.mean_batch:.2f}",
            *(f"{value:.2f}" for value in s.milliseconds.values()),
        )
        for concurrency, by_model in measured.statistics.items()
        for model, s in by_model.items()
    ]
    return Table(
        title="Triton's own account of all repeats, ms a request (a pipeline's infer holds its "
        "models')",
        header=(
            "in flight",
            "model",
            "requests",
            "mean batch",
            "queue",
            "input",
            "infer",
            "output",
        ),
        rows=tuple(rows),
    )


def _wire_table(request: int, response: int) -> Table:
    return Table(
        title="Bytes on the wire, as protocol messages",
        header=("request", "response"),
        rows=((f"{request:,}", f"{response:,}"),),
    )


def _offered_table(measured: _Measured) -> Table:
    return Table(
        title="What the open loops offered; capacity is the highest closed-loop throughput",
        header=("share of capacity", "images/s"),
        rows=tuple(
            (f"{share:.0%}", f"{share * measured.capacity:.1f}")
            for share in (*measured.opened, 1.0)
        ),
    )


def _notes(measured: _Measured, config: ServingConfig, peaks: Peaks) -> list[str]:
    loads = [
        load for done in (*measured.closed.values(), *measured.opened.values()) for load in done
    ]
    errors, requests = sum(x.num_errors for x in loads), sum(len(x.samples) for x in loads)
    warmed = measured.warm_up
    state = "settled" if warmed.settled else "NOT settled: the figures hold a warm-up"
    notes = [
        f"Warm-up: {warmed.requests} requests, {state}.",
        f"{errors} of {requests} requests failed.",
        f"Measured peaks of this machine: {peaks.flops / 1e9:.0f} GFLOP/s in a float32 matrix "
        f"product, {peaks.bytes / 1e9:.1f} GB/s in a copy.",
        "Open loops: Poisson arrivals drawn beforehand, latency from the intended sending.",
    ]
    if config.slo:
        notes.append(_promise(Slo.parse(config.slo), measured))
    return notes


def _promise(slo: Slo, measured: _Measured) -> str:
    best = best_probe(measured.confirmed)
    found = "no load kept it" if best is None else f"highest load that kept it {best.rate:.1f}/s"
    return (
        f"Promise {slo}: {found} (offered a second: {_outcomes(measured.probes)}; offered again: "
        f"{_outcomes(measured.confirmed)})."
    )


def _outcomes(probes: Sequence[Probe]) -> str:
    tried = [f"{p.rate:.1f} {'kept' if p.is_met else 'broken'}" for p in probes]
    return ", ".join(tried) or "none"


if __name__ == "__main__":
    enter(main)
