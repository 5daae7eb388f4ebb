"""Our closed loop beside NVIDIA's ``perf_analyzer``, on the same server with the same request.

``python -m benchmarks perf_analyzer assets/demo_models`` lets both take turns. Only closed loops
can be compared: perf_analyzer's request rate is timed from the actual sending. Needs
``python -m benchmarks get_perf_analyzer`` once.
"""

import asyncio
import base64
import csv
import json
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.progress import track

from benchmarks.entry import enter
from benchmarks.get_perf_analyzer import FOLDER
from benchmarks.in_process import call_of
from benchmarks.load import Limits, closed_loop, warm_up
from benchmarks.pictures import photograph
from benchmarks.reporting import Where, report
from benchmarks.results import BenchmarkResult, Metric, Recorder, artifact_record
from benchmarks.served import sender, serve
from weaksam_rt.model_repository import ExportedModels, load_exported_models


@dataclass(frozen=True, kw_only=True, slots=True)
class PerfAnalyzerConfig:
    """How much is measured."""

    concurrency: int = 2
    """Requests in flight."""
    requests: int = 240
    """Of one block of either side. A block should last ten seconds: of one second, perf_analyzer's
    throughput is that of whole seconds (24 requests were 24.0 a second in each of five blocks)."""
    repeats: int = 5
    """Blocks of either side; they take turns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PerfAnalyzerFigures:
    """What one run of perf_analyzer reports of one concurrency."""

    throughput: float
    """Requests a second."""
    p50_ms: float
    p90_ms: float


def find_perf_analyzer() -> Path | None:
    """The binary on the search path, or the one that was fetched; None where there is none."""
    found = shutil.which("perf_analyzer") or shutil.which(FOLDER.resolve() / "perf_analyzer")
    return None if found is None else Path(found)


def main(
    where: Where,
    config: Annotated[PerfAnalyzerConfig, tyro.conf.arg(name="")] = PerfAnalyzerConfig(),
) -> None:
    """Measure and report."""
    report(measure(load_exported_models(where.models), config), where.output)


def measure(exported: ExportedModels, config: PerfAnalyzerConfig) -> BenchmarkResult:
    """Both load generators in turn on one server.

    Raises:
        FileNotFoundError: perf_analyzer is not here.
    """
    binary = find_perf_analyzer()
    if binary is None:
        raise FileNotFoundError(
            "perf_analyzer is not here; `python -m benchmarks get_perf_analyzer` fetches it"
        )
    recorder = Recorder(
        what="perf_analyzer",
        title="Our closed loop beside perf_analyzer",
        config=asdict(config),
        artifacts=tuple(map(artifact_record, exported.artifacts)),
    )
    data = photograph()
    with serve(exported) as server:
        ours, theirs = asyncio.run(_turns(binary, server.grpc_address, data, config))
    metrics = [
        Metric(name="ours: latency p50", unit="ms", repeats=_single(o[0] for o in ours)),
        Metric(
            name="perf_analyzer: latency p50",
            unit="ms",
            repeats=_single(t.p50_ms for t in theirs),
        ),
        Metric(
            name="ours: throughput",
            unit="images/s",
            better="higher",
            repeats=_single(o[1] for o in ours),
        ),
        Metric(
            name="perf_analyzer: throughput",
            unit="images/s",
            better="higher",
            repeats=_single(t.throughput for t in theirs),
        ),
    ]
    ratio = [o[1] / t.throughput for o, t in zip(ours, theirs, strict=True)]
    metrics.append(Metric(name="throughput, ours by theirs", unit="x", repeats=_single(ratio)))
    estimate = metrics[-1].quantile(0.5)
    assert estimate is not None
    return recorder.result(
        metrics,
        notes=[
            f"Throughput of ours by theirs: {estimate.value:.3f} ({estimate.low:.3f} to "
            f"{estimate.high:.3f}); equal where the interval holds 1."
        ],
    )


async def _turns(
    binary: Path, address: str, data: bytes, config: PerfAnalyzerConfig
) -> tuple[list[tuple[float, float]], list[PerfAnalyzerFigures]]:
    """(Median latency, throughput) of ours and the figures of theirs, block by block."""
    ours, theirs = [], []
    async with sender(address, [call_of("detect", data)]) as send:
        limits = Limits(seconds=30, requests=400)
        await warm_up(send, concurrency=config.concurrency, limits=limits)
        for _ in track(range(config.repeats), "taking turns", transient=True):
            load = await closed_loop(
                send,
                concurrency=config.concurrency,
                limits=Limits(seconds=600, requests=config.requests),
            )
            ours.append((float(np.median(load.latencies_ms)), load.throughput))
            figures = await asyncio.to_thread(run_perf_analyzer, binary, address, data, config)
            theirs.append(figures)
    return ours, theirs


def run_perf_analyzer(
    binary: Path, address: str, data: bytes, config: PerfAnalyzerConfig
) -> PerfAnalyzerFigures:
    """One closed-loop run on ``weaksam_detect`` with this picture.

    Raises:
        RuntimeError: It failed, with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="weaksam-bench-") as name:
        folder = Path(name)
        # It takes the bytes for a tensor as it travels: a length before each element.
        encoded = base64.b64encode(struct.pack("<I", len(data)) + data).decode()
        picture = {"image": {"content": {"b64": encoded}, "shape": [1]}}
        (folder / "input.json").write_text(json.dumps({"data": [picture]}))
        run = subprocess.run(
            [
                str(binary), "-m", "weaksam_detect", "-u", address, "-i", "grpc", "-b", "1",
                "--input-data", str(folder / "input.json"), "--async",
                "--concurrency-range", str(config.concurrency),
                "--request-count", str(config.requests),
                "-f", str(folder / "figures.csv"),
            ],
            capture_output=True, text=True,
        )  # fmt: skip
        if run.returncode != 0:
            raise RuntimeError(f"perf_analyzer failed: {run.stderr or run.stdout}")
        (row,) = csv.DictReader((folder / "figures.csv").read_text().splitlines())
    return PerfAnalyzerFigures(
        throughput=float(row["Inferences/Second"]),
        p50_ms=float(row["p50 latency"]) / 1e3,
        p90_ms=float(row["p90 latency"]) / 1e3,
    )


def _single(values: Iterable[float]) -> tuple[tuple[float, ...], ...]:
    return tuple((float(value),) for value in values)


if __name__ == "__main__":
    enter(main)
