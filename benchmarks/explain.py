"""Where a request's time goes, stage by stage, beside what the machine could do at best.

``python -m benchmarks explain assets/demo_models --pipeline propose`` measures the machine's peaks,
sends requests to a server, does the same work in this process call by call, and names the stage
that costs most and the line of configuration that changes it.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmarks.entry import enter
from benchmarks.graph_cost import GraphCost, cost_of_model, load_graph
from benchmarks.in_process import (
    EngineCall,
    PipelineName,
    Trace,
    TracedPipeline,
    call_of,
    costs_of_calls,
)
from benchmarks.machine import Peaks, measure_peaks
from benchmarks.memory import measured_memory
from benchmarks.pictures import pictures
from benchmarks.reporting import report
from benchmarks.results import (
    BenchmarkResult,
    Metric,
    Recorder,
    Stage,
    Table,
    Waterfall,
    artifact_record,
)
from benchmarks.served import sender, serve
from weaksam_rt.contracts import (
    DETECTOR,
    PROMPT_CLUSTERING,
    SAM_IMAGE_ENCODER,
    SAM_MASK_DECODER,
    VIT_CLASSIFIER,
)
from weaksam_rt.model_config import ServingOptions
from weaksam_rt.model_repository import ExportedModels, load_exported_models

ENCODE, DECODE, BETWEEN, SERVING = (
    "build the request",
    "decode the picture",
    "between the models",
    "gRPC, queues, hops between processes",
)

ADVICE: Mapping[str, str] = {
    DECODE: "weaksam_detect decodes no more than the detector sees: send JPEG, and fewer pixels",
    BETWEEN: "pipeline.toml: [proposals] points_per_side (each point is 3 masks), "
    "[detection] max_detections",
    SERVING: "ServingOptions.pipeline_instances (instance_group count in the pipelines' "
    "config.pbtxt); under load the same line is the queue",
    ENCODE: "the client: send the file's bytes as they are",
    DETECTOR: "ServingOptions.engine_threads (intra_op_num_threads in detector/config.pbtxt), or a "
    "detector of a smaller image_size",
    VIT_CLASSIFIER: "pipeline.toml: flip = false halves it; give the tags and only the maps remain",
    PROMPT_CLUSTERING: 'pipeline.toml: [clustering] backend = "cuda" where there is a GPU',
    SAM_IMAGE_ENCODER: "ServingOptions.engine_threads (intra_op_num_threads in "
    "sam_image_encoder/config.pbtxt), or a smaller SAM",
    SAM_MASK_DECODER: "pipeline.toml: [proposals] points_per_side (its square is the prompts) and "
    "max_prompts_per_call",
}
"""What changes the time of a stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainConfig:
    """How much is measured."""

    pipeline: PipelineName = "detect"
    """Which of the three."""
    repeats: int = 5
    """Blocks of requests, at least 1."""
    requests: int = 8
    """Requests of one block, at least 1; a block to the server takes turns with one here."""
    threads: int = 0
    """Threads of one operator of an engine; 0: all cores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rounds:
    """One repeat: the same requests by the server and in this process."""

    served_ms: tuple[float, ...]
    encode_ms: tuple[float, ...]
    traces: tuple[Trace, ...]


def main(
    models: Annotated[Path, tyro.conf.Positional],
    config: Annotated[ExplainConfig, tyro.conf.arg(name="")] = ExplainConfig(),
    *,
    picture: Path | None = None,
    output: Path | None = None,
) -> None:
    """Measure and explain.

    Args:
        models: Folder of exported models.
        config: How much is measured.
        picture: What is sent; None: a photograph of 640x480.
        output: Path without suffix; result.json, .md and .html are written there.
    """
    (data,) = pictures(picture, 1)
    report(explain(load_exported_models(models), data, config), output)


def explain(exported: ExportedModels, data: bytes, config: ExplainConfig) -> BenchmarkResult:
    """The stages of one pipeline's request on ``data``, an encoded picture."""
    recorder = Recorder(
        what="explain",
        title=f"Where weaksam_{config.pipeline} spends its time",
        config={**asdict(config), "bytes": len(data)},
        artifacts=tuple(map(artifact_record, exported.artifacts)),
    )
    peaks = measure_peaks()
    with serve(exported, options=ServingOptions(engine_threads=config.threads)) as server:
        rounds = asyncio.run(_measure(server.grpc_address, exported, data, config))
    peaks = peaks.or_higher(measure_peaks())
    calls = rounds[0].traces[0].calls
    costs = costs_of_calls(calls, exported.artifacts)
    metrics = _metrics(rounds, costs, peaks)
    stages = _stages(metrics)
    return recorder.result(
        metrics,
        waterfalls=(Waterfall(title="One request, medians", stages=stages),),
        tables=(
            _roofline_table(stages, calls, costs, peaks),
            model_table(exported, calls, peaks, threads=config.threads),
        ),
        notes=_notes(stages, costs, peaks),
    )


async def _measure(
    address: str, exported: ExportedModels, data: bytes, config: ExplainConfig
) -> list[_Rounds]:
    here = TracedPipeline(exported, config.pipeline, threads=config.threads)
    call = call_of(config.pipeline, data)
    async with sender(address, [call]) as send:

        async def block() -> _Rounds:
            served, encoded = [], []
            for number in range(config.requests):
                start = time.perf_counter()
                await send(number)
                served.append(1e3 * (time.perf_counter() - start))
            for _ in range(config.requests):
                start = time.perf_counter()
                call_of(config.pipeline, data)
                encoded.append(1e3 * (time.perf_counter() - start))
            traces = [await here.trace(data) for _ in range(config.requests)]
            return _Rounds(served_ms=tuple(served), encode_ms=tuple(encoded), traces=tuple(traces))

        await block()  # the first one wakes everything
        return [await block() for _ in range(config.repeats)]


def _metrics(
    rounds: Sequence[_Rounds], costs: Mapping[str, Sequence[GraphCost]], peaks: Peaks
) -> list[Metric]:
    def metric(name: str, values: Sequence[Sequence[float]]) -> Metric:
        floor = _floor_ms(costs[name], peaks) if name in costs else None
        reason = "operations and bytes at the measured peaks" if floor is not None else ""
        return Metric(
            name=name,
            unit="ms",
            repeats=tuple(map(tuple, values)),
            floor=floor,
            floor_reason=reason,
        )

    models = list(rounds[0].traces[0].by_model())
    return [
        metric("request, served", [r.served_ms for r in rounds]),
        metric(ENCODE, [r.encode_ms for r in rounds]),
        metric(DECODE, [[t.decode for t in r.traces] for r in rounds]),
        *(metric(m, [[t.by_model()[m] for t in r.traces] for r in rounds]) for m in models),
        metric(BETWEEN, [[t.between_the_models for t in r.traces] for r in rounds]),
    ]


def _stages(metrics: Sequence[Metric]) -> tuple[Stage, ...]:
    """Medians; what the server takes beyond the work done here is the last stage."""
    medians = {metric.name: float(np.median(metric.samples)) for metric in metrics}
    whole = medians.pop("request, served")
    # The request is built before it is sent: it is no part of the served time.
    encode = medians.pop(ENCODE)
    rest = max(0.0, whole - sum(medians.values()))
    return tuple(
        Stage(name=name, milliseconds=ms)
        for name, ms in ((ENCODE, encode), *medians.items(), (SERVING, rest))
    )


def bottleneck(stages: Sequence[Stage]) -> Stage:
    """The stage that costs most."""
    return max(stages, key=lambda stage: stage.milliseconds)


def _floor_ms(costs: Sequence[GraphCost], peaks: Peaks) -> float:
    return 1e3 * sum(peaks.floor_s(cost.flops, cost.least_bytes) for cost in costs)


def _roofline_table(
    stages: Sequence[Stage],
    calls: Sequence[EngineCall],
    costs: Mapping[str, Sequence[GraphCost]],
    peaks: Peaks,
) -> Table:
    num_calls = {model: sum(call.model == model for call in calls) for model in costs}
    rows = []
    for stage in stages:
        if stage.name not in costs:
            rows.append((stage.name, "", f"{stage.milliseconds:.2f}", *[""] * 6))
            continue
        each = costs[stage.name]
        flops, moved = sum(c.flops for c in each), sum(c.least_bytes for c in each)
        seconds, floor_ms = stage.milliseconds / 1e3, _floor_ms(each, peaks)
        bound = "operations" if flops / peaks.flops >= moved / peaks.bytes else "bytes"
        rows.append(
            (
                stage.name,
                str(num_calls[stage.name]),
                f"{stage.milliseconds:.2f}",
                f"{flops / 1e9:.2f}",
                f"{moved / 1e6:.1f}",
                f"{flops / seconds / 1e9:.1f}",
                f"{floor_ms:.2f}",
                f"{100 * floor_ms / stage.milliseconds:.0f} %",
                bound,
            )
        )
    return Table(
        title="Stages beside the roofline",
        header=(
            "stage", "calls", "ms", "GFLOP", "MB", "GFLOP/s", "floor, ms", "of the roofline",
            "bound by",
        ),
        rows=tuple(rows),
    )  # fmt: skip


def model_table(
    exported: ExportedModels, calls: Sequence[EngineCall], peaks: Peaks, *, threads: int = 0
) -> Table:
    """Operations, memory and floor of every engine, predicted from its graph, beside the memory
    that a process takes for it when it opens it as a server does, with ``threads`` threads.

    The engines that the request did not call are shown at the smallest sizes of their contracts.
    """
    rows = []
    for artifact in exported.artifacts:
        shapes = next((c.shapes for c in calls if c.model == artifact.model), None)
        if shapes is None:
            shapes = {
                spec.name: tuple(1 if size == -1 else size for size in spec.shape)
                if not artifact.contract.is_batched
                else (1, *(1 if size == -1 else size for size in spec.shape))
                for spec in artifact.contract.inputs
            }
        cost = cost_of_model(load_graph(artifact.path), shapes)
        taken = measured_memory(artifact.path.parent, shapes, threads=threads)
        predicted = taken.num_sessions * cost.weight_bytes + cost.activation_bytes
        rows.append(
            (
                artifact.model,
                ", ".join("x".join(map(str, shape)) for shape in shapes.values()),
                f"{cost.flops / 1e9:.2f}",
                f"{taken.num_sessions} x {cost.weight_bytes / 1e6:.1f}",
                f"{cost.activation_bytes / 1e6:.1f}",
                f"{predicted / 1e6:.1f}",
                f"{taken.num_bytes / 1e6:.1f}",
                f"{taken.num_bytes / predicted:.2f}",
                f"{1e3 * peaks.floor_s(cost.flops, cost.least_bytes):.2f}",
            )
        )
    return Table(
        title="Models: predicted from the graph, and the memory that a process took",
        header=(
            "model", "inputs", "GFLOP", "weights, MB", "activations, MB", "both, MB",
            "measured, MB", "measured / predicted", "floor, ms",
        ),
        rows=tuple(rows),
    )  # fmt: skip


def _notes(
    stages: Sequence[Stage], costs: Mapping[str, Sequence[GraphCost]], peaks: Peaks
) -> list[str]:
    worst = bottleneck(stages)
    total = sum(stage.milliseconds for stage in stages)
    share = f"{100 * worst.milliseconds / total:.0f} % of {total:.1f} ms"
    notes = [
        f"Bottleneck: {worst.name} ({share}). To change it: {ADVICE[worst.name]}.",
        f"Measured peaks: {peaks.flops / 1e9:.0f} GFLOP/s in a float32 matrix product, "
        f"{peaks.bytes / 1e9:.1f} GB/s in a copy.",
        "Stages without a floor do no products: decoding, clustering, resizing and suppression "
        "branch on what they read, and their operations follow from no graph. Their bytes alone "
        "would give a floor far below anything that can be built.",
    ]
    if worst.name in costs:
        lost = worst.milliseconds - _floor_ms(costs[worst.name], peaks)
        notes.append(
            f"Of the bottleneck, {lost:.1f} ms lie above the floor: doing the same operations "
            "better gains no more; doing fewer of them lowers the floor itself."
        )
    return notes


if __name__ == "__main__":
    enter(main)
