"""The detector's bare ONNX Runtime session beside the same file behind Triton.

``python -m benchmarks engines assets/demo_models`` measures two things, each in turns in one run:

- One request at a time. *Overhead* is the served request (JPEG in, boxes out) minus the same work
  in this process: decode, resize, bare session, suppression. It is what the server costs: gRPC,
  queues, two hops between processes. *Beside the session* is the served request minus the bare
  session alone, so it also holds decoding and suppression, which any service must do.
- As many as it can do. The bare session's best throughput over ways to call it (batches, callers,
  threads) is the ceiling on these cores; the served pipeline also decodes, on the same cores. The
  CPU time of each process says what a request costs beside the engine, and so what share of the
  ceiling can be reached.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.progress import track

from benchmarks.entry import enter
from benchmarks.graph_cost import GraphCost, cost_of_model, load_graph
from benchmarks.in_process import TracedPipeline, call_of
from benchmarks.load import Limits, Send, closed_loop, warm_up
from benchmarks.machine import Peaks, measure_peaks
from benchmarks.pictures import photograph
from benchmarks.reporting import Where, report
from benchmarks.results import (
    BenchmarkResult,
    Metric,
    Recorder,
    Stage,
    Table,
    Waterfall,
    artifact_record,
)
from benchmarks.served import (
    LOAD_GENERATOR,
    ModelStatistics,
    cpu_seconds,
    read_statistics,
    sender,
    serve,
    since,
)
from weaksam_rt.artifacts import ModelArtifact
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.client.messages import Call, infer_request
from weaksam_rt.contracts import DETECTOR, DetectorParameters
from weaksam_rt.images import decode_image
from weaksam_rt.model_config import ServingOptions
from weaksam_rt.model_repository import ExportedModels, load_exported_models
from weaksam_rt.preprocessing import resize_for_detector
from weaksam_rt.server import EmbeddedServer

SERVED, ENGINE_SERVED, HERE, SESSION = (
    "weaksam_detect over gRPC",
    "the session behind Triton, pixels over gRPC",
    "the same work in this process",
    "bare session",
)
OVERHEAD, BESIDE = "overhead of serving", "beside the session"
SHARE = "served, share of the best bare session"
_FLOOR_REASON = "the engine's operations and bytes at the measured peaks"


@dataclass(frozen=True, kw_only=True, slots=True)
class EnginesConfig:
    """How much is measured."""

    repeats: int = 5
    """Of each part, at least 1."""
    requests: int = 20
    """Requests of one block, one at a time."""
    seconds: float = 4.0
    """Of one load as high as it goes."""
    concurrency: int = 8
    """Requests in flight at saturation."""
    threads: int = 0
    """Threads of one operator of the served session; 0: all cores."""
    max_queue_delay_us: int = 0
    """How long the engine waits for more requests to batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bare:
    """One way to call a session as fast as it goes."""

    batch: int
    callers: int
    threads: int

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.callers} callers, {self.threads or 'all'} threads"


_BARE_WAYS = (
    _Bare(batch=1, callers=1, threads=0),
    _Bare(batch=8, callers=1, threads=0),
    _Bare(batch=1, callers=2, threads=1),
    _Bare(batch=1, callers=2, threads=0),
)


def main(
    where: Where, config: Annotated[EnginesConfig, tyro.conf.arg(name="")] = EnginesConfig()
) -> None:
    """Measure and report."""
    report(measure(load_exported_models(where.models), config), where.output)


def measure(exported: ExportedModels, config: EnginesConfig) -> BenchmarkResult:
    """Both parts, on a server of the detector alone."""
    detector = next(a for a in exported.artifacts if a.model == DETECTOR)
    alone = ExportedModels(artifacts=(detector,), config=exported.config)
    recorder = Recorder(
        what="engines",
        title="A bare session beside the same engine behind Triton",
        config=asdict(config),
        artifacts=(artifact_record(detector),),
    )
    peaks, cost = measure_peaks(), _cost_of_an_image(detector)
    options = ServingOptions(
        engine_threads=config.threads, max_queue_delay_us=config.max_queue_delay_us
    )
    with serve(alone, options=options) as server:
        one, many, statistics = asyncio.run(_run(server, alone, config))
    peaks = peaks.or_higher(measure_peaks())
    metrics = [
        *_one_at_a_time_metrics(one, 1e3 * peaks.floor_s(cost.flops, cost.least_bytes)),
        *_saturation_metrics(many.rates, _highest_rate(cost, peaks)),
    ]
    return recorder.result(
        metrics,
        waterfalls=(_waterfall(metrics),),
        tables=(_batch_table(statistics, config), _cpu_table(many, config)),
        notes=_notes(metrics, statistics, many),
    )


Times = dict[str, list[list[float]]]
"""Samples by name and repeat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Saturated:
    """As many as it could do."""

    rates: Times
    """Images a second."""
    cpu_ms: dict[str, float]
    """CPU time of a request by part of the service."""
    bare_cpu_ms: dict[str, float]
    """CPU time of an image by way to call the bare session."""


async def _run(
    server: EmbeddedServer, exported: ExportedModels, config: EnginesConfig
) -> tuple[Times, _Saturated, dict[str, ModelStatistics]]:
    address = server.grpc_address
    (detector,) = exported.artifacts
    data = photograph()
    assert isinstance(detector.parameters, DetectorParameters)
    pixels, _ = resize_for_detector(decode_image(data), detector.parameters.image_size)
    async with (
        sender(address, [call_of("detect", data)]) as send,
        sender(address, [engine_call(detector, pixels)]) as send_pixels,
    ):
        limits = Limits(seconds=20, requests=400)
        await warm_up(send, concurrency=2, limits=limits)
        one = await _one_at_a_time(send, send_pixels, exported, pixels, config)
        many, statistics = await _saturation(send, server, detector, pixels, config)
        return one, many, statistics


def engine_call(artifact: ModelArtifact, pixels: NDArray[np.uint8]) -> Call[Any]:
    """The request that asks an engine itself, with the pixels of one image."""
    request = infer_request(artifact.contract, {"image": pixels})
    return Call(request=request, parse=lambda response: response)


async def _one_at_a_time(
    send: Send,
    send_pixels: Send,
    exported: ExportedModels,
    pixels: NDArray[np.uint8],
    config: EnginesConfig,
) -> Times:
    (detector,) = exported.artifacts
    here = TracedPipeline(exported, "detect", threads=config.threads)
    session = OnnxRuntimeModel(detector, num_threads=config.threads)
    data, inputs = photograph(), {"image": pixels[None]}

    async def bare(number: int) -> object:
        return session(inputs)

    async def whole(number: int) -> object:
        return await here.trace(data)

    ways = {SERVED: send, ENGINE_SERVED: send_pixels, HERE: whole, SESSION: bare}
    times: Times = {name: [] for name in ways}
    for way in ways.values():  # wakes everything
        await closed_loop(way, concurrency=1, limits=Limits(seconds=5, requests=5))
    for _ in track(range(config.repeats), "one at a time", transient=True):
        for name, way in ways.items():
            limits = Limits(seconds=60, requests=config.requests)
            load = await closed_loop(way, concurrency=1, limits=limits)
            times[name].append(list(load.latencies_ms))
    return times


async def _saturation(
    send: Send,
    server: EmbeddedServer,
    detector: ModelArtifact,
    pixels: NDArray[np.uint8],
    config: EnginesConfig,
) -> tuple[_Saturated, dict[str, ModelStatistics]]:
    sessions = {
        threads: OnnxRuntimeModel(detector, num_threads=threads)
        for threads in {way.threads for way in _BARE_WAYS}
    }
    rates: Times = {SERVED: [], **{f"{SESSION}, {way}": [] for way in _BARE_WAYS}}
    cpu: dict[str, float] = defaultdict(float)
    bare_cpu: dict[str, list[float]] = {name: [] for name in rates if name != SERVED}
    num_served = 0
    before = read_statistics(server.grpc_address)
    for _ in track(range(config.repeats), "saturation", transient=True):
        limits = Limits(seconds=config.seconds, requests=100_000)
        spent = cpu_seconds(server.pid)
        load = await closed_loop(send, concurrency=config.concurrency, limits=limits)
        for part, seconds in cpu_seconds(server.pid).items():
            cpu[part] += seconds - spent[part]
        num_served += len(load.latencies_ms)
        rates[SERVED].append([load.throughput])
        for way in _BARE_WAYS:
            name = f"{SESSION}, {way}"
            inputs = {"image": np.repeat(pixels[None], way.batch, axis=0)}
            work = partial(sessions[way.threads], inputs)
            start, began = time.perf_counter(), time.process_time()
            images = way.batch * bare_rate(work, callers=way.callers, seconds=config.seconds)
            rates[name].append([images])
            wall = time.perf_counter() - start
            bare_cpu[name].append(1e3 * (time.process_time() - began) / (images * wall))
    saturated = _Saturated(
        rates=rates,
        cpu_ms={part: 1e3 * seconds / num_served for part, seconds in cpu.items()},
        bare_cpu_ms={name: float(np.median(times)) for name, times in bare_cpu.items()},
    )
    return saturated, since(before, read_statistics(server.grpc_address))


def bare_rate(work: Callable[[], object], *, callers: int, seconds: float) -> float:
    """Calls a second of ``callers`` threads that call again at once for ``seconds``."""
    work()
    start = time.perf_counter()

    def call(_: int) -> int:
        done = 0
        while time.perf_counter() - start < seconds:
            work()
            done += 1
        return done

    with ThreadPoolExecutor(callers) as pool:
        total = sum(pool.map(call, range(callers)))
    return total / (time.perf_counter() - start)


# ---------------------------------------------------------------------------------------------
# What is reported
# ---------------------------------------------------------------------------------------------


def _cost_of_an_image(detector: ModelArtifact) -> GraphCost:
    assert isinstance(detector.parameters, DetectorParameters)
    side = detector.parameters.image_size
    return cost_of_model(load_graph(detector.path), {"image": (1, side, side, 3)})


def _highest_rate(cost: GraphCost, peaks: Peaks) -> float:
    """Images a second at the peaks; any batch reads the weights once, so an image's share of them
    may be next to nothing.
    """
    return 1 / peaks.floor_s(cost.flops, cost.io_bytes)


def _one_at_a_time_metrics(times: Times, floor_ms: float) -> list[Metric]:
    metrics = [
        Metric(
            name=name,
            unit="ms",
            repeats=tuple(map(tuple, repeats)),
            floor=floor_ms,
            floor_reason=_FLOOR_REASON,
        )
        for name, repeats in times.items()
    ]
    # Differences of medians of neighbouring blocks: requests of two ways are no pairs.
    for name, less in ((OVERHEAD, HERE), (BESIDE, SESSION)):
        pairs = zip(times[SERVED], times[less], strict=True)
        difference = tuple((float(np.median(a) - np.median(b)),) for a, b in pairs)
        metrics.append(Metric(name=name, unit="ms", repeats=difference))
    return metrics


def _saturation_metrics(rates: Times, highest: float) -> list[Metric]:
    metrics = [
        Metric(
            name=f"saturated: {name}",
            unit="images/s",
            better="higher",
            repeats=tuple(map(tuple, repeats)),
            floor=highest,
            floor_reason=_FLOOR_REASON,
        )
        for name, repeats in rates.items()
    ]
    best = _best_bare(rates)
    shares = tuple((s[0] / b[0],) for s, b in zip(rates[SERVED], rates[best], strict=True))
    metrics.append(Metric(name=SHARE, unit="share", better="higher", repeats=shares))
    return metrics


def _best_bare(rates: Times) -> str:
    """Name of the way to call the bare session that made most images a second."""
    bare = {name: repeats for name, repeats in rates.items() if name != SERVED}
    return max(bare, key=lambda name: float(np.median(bare[name])))


def _waterfall(metrics: Sequence[Metric]) -> Waterfall:
    median = {m.name: float(np.median(m.samples)) for m in metrics}
    stages = (
        Stage(name=SESSION, milliseconds=median[SESSION]),
        Stage(
            name="decode, resize, suppress", milliseconds=max(0.0, median[HERE] - median[SESSION])
        ),
        Stage(name=OVERHEAD, milliseconds=max(0.0, median[OVERHEAD])),
    )
    return Waterfall(title="One request, medians", stages=stages)


def _batch_table(statistics: dict[str, ModelStatistics], config: EnginesConfig) -> Table:
    rows = [
        (name, str(s.requests), str(s.executions), f"{s.mean_batch:.2f}")
        for name, s in statistics.items()
    ]
    return Table(
        title=f"Batches at {config.concurrency} requests in flight",
        header=("model", "requests", "calls", "mean batch"),
        rows=tuple(rows),
    )


def _cpu_table(saturated: _Saturated, config: EnginesConfig) -> Table:
    whole = sum(saturated.cpu_ms.values())
    parts = sorted(saturated.cpu_ms.items(), key=lambda item: -item[1])
    rows = [(name, f"{ms:.2f}", f"{ms / whole:.0%}") for name, ms in parts]
    rows += [(name, f"{ms:.2f}", "") for name, ms in saturated.bare_cpu_ms.items()]
    return Table(
        title=f"CPU time of an image at {config.concurrency} requests in flight",
        header=("part", "ms", "share of what is served"),
        rows=tuple(rows),
    )


def _notes(
    metrics: Sequence[Metric], statistics: dict[str, ModelStatistics], saturated: _Saturated
) -> list[str]:
    medians = {m.name: float(np.median(m.samples)) for m in metrics}
    cpu = saturated.cpu_ms
    outside = sum(cpu.values()) - cpu[DETECTOR]
    ceiling = cpu[DETECTOR] / sum(cpu.values())
    return [
        f"Overhead of serving: {medians[OVERHEAD]:.2f} ms; beside the session: "
        f"{medians[BESIDE]:.2f} ms.",
        f"Saturated: served {medians[SHARE]:.2f} of the best bare session "
        f"({_best_bare(saturated.rates).removeprefix(SESSION + ', ')}); it also decodes and "
        "answers, and the load generator runs on the same cores.",
        f"An image takes {cpu[DETECTOR]:.1f} ms of CPU in the engine's process and {outside:.1f} "
        f"ms outside it, {cpu[LOAD_GENERATOR]:.1f} of them in the load generator: with every core "
        f"busy, at most {ceiling:.2f} of what the engine's process does alone can be served.",
        f"Mean batch of the engine at saturation: {statistics[DETECTOR].mean_batch:.2f}.",
    ]


if __name__ == "__main__":
    enter(main)
