"""Hours of open-loop load: does the server's memory grow, does a request fail?

``python -m benchmarks soak assets/demo_models --minutes 60`` offers a share of what the server can
do, reads the memory that the server and all its children hold, and fits a robust line through the
second half. Ends with 1 if the line rises beyond its noise or a request failed.
"""

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import tyro

from benchmarks.entry import enter
from benchmarks.in_process import PipelineName, call_of
from benchmarks.load import Limits, Load, closed_loop, open_loop, poisson_arrivals, warm_up
from benchmarks.pictures import pictures
from benchmarks.reporting import report
from benchmarks.results import (
    BenchmarkResult,
    Metric,
    Point,
    Recorder,
    Series,
    artifact_record,
)
from benchmarks.served import sender, serve
from benchmarks.statistics import Trend, trend
from weaksam_rt.model_repository import ExportedModels, load_exported_models

_MOST_POINTS = 600
"""Of the memory curve in the result."""

_HELD = {"Pss_Anon:", "Pss_Shmem:", "SwapPss:"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SoakConfig:
    """What is offered and for how long."""

    minutes: float = 2.0
    """Of load."""
    share: float = 0.7
    """Of the closed-loop throughput, in (0, 1)."""
    pipeline: PipelineName = "detect"
    """Which of the three."""
    interval_s: float = 1.0
    """Between readings of the memory."""
    allowed_mib_an_hour: float = 10.0
    """A rise below this is none, whatever its certainty: memory rises in steps of some MiB, and a
    short soak may end on one. An hour can tell 10 from them, two minutes 300."""
    max_pictures: int = 32
    """Different pictures, sent in turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Soaked:
    """What came of it."""

    load: Load
    times_s: tuple[float, ...]
    memory_mib: tuple[float, ...]
    """Server and children, at ``times_s``."""
    trend_mib_an_hour: Trend
    """Of the second half: memory rises in steps at first, with each larger batch."""


def main(
    models: Annotated[Path, tyro.conf.Positional],
    config: Annotated[SoakConfig, tyro.conf.arg(name="")] = SoakConfig(),
    *,
    pictures_from: Path | None = None,
    output: Path | None = None,
) -> int:
    """Soak and report; 1 if memory grew or a request failed.

    Args:
        models: Folder of exported models.
        config: What is offered and for how long.
        pictures_from: A picture, or a folder of them; None: a photograph of 640x480.
        output: Path without suffix; result.json, .md and .html are written there.
    """
    exported = load_exported_models(models)
    recorder = Recorder(
        what="soak",
        title=f"weaksam_{config.pipeline} under load for {config.minutes:g} minutes",
        config=asdict(config),
        artifacts=tuple(map(artifact_record, exported.artifacts)),
    )
    soaked = soak(exported, config, pictures(pictures_from, config.max_pictures))
    report(_result(recorder, soaked, config), output)
    return int(memory_grew(soaked, config) or soaked.load.num_errors > 0)


def soak(exported: ExportedModels, config: SoakConfig, data: list[bytes]) -> Soaked:
    """Load a server of its own and watch it."""
    with serve(exported) as server:
        process = psutil.Process(server.pid)
        return asyncio.run(_soak(server.grpc_address, process, config, data))


def memory_grew(soaked: Soaked, config: SoakConfig) -> bool:
    """The trend is certain and larger than what is allowed."""
    return soaked.trend_mib_an_hour.low > config.allowed_mib_an_hour


def held_mib(process: psutil.Process) -> float:
    """Memory that a process and everything that it started hold: anonymous and shared pages, in
    memory or swapped out, those that they share counted once.

    Pages of files are left out. The kernel drops and reads them as it likes, and counts a library
    that other programs have open too to each of them in part, so that they come and go with what
    else the machine does.
    """
    return sum(map(_held_kib, (process, *process.children(recursive=True)))) / 1024


def _held_kib(process: psutil.Process) -> int:
    try:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except OSError:  # it may end while it is looked at
        return 0
    rows = (line.split() for line in text.splitlines())
    return sum(int(row[1]) for row in rows if row[0] in _HELD)


async def _soak(
    address: str, process: psutil.Process, config: SoakConfig, data: list[bytes]
) -> Soaked:
    calls = [call_of(config.pipeline, one) for one in data]
    async with sender(address, calls) as send:
        # More in flight than a soak has: every size of batch takes its memory before the soak.
        await warm_up(send, concurrency=16, limits=Limits(seconds=20, requests=400))
        full = await closed_loop(send, concurrency=4, limits=Limits(seconds=5, requests=5000))
        rate = config.share * full.throughput
        seconds = 60 * config.minutes
        limits = Limits(seconds=seconds, requests=int(2 * rate * seconds) + 1)
        arrivals = poisson_arrivals(rate, limits=limits, seed=0)
        load, (times, memory) = await _watched(open_loop(send, arrivals), process, config)
    settled = len(times) // 2
    line = trend([t / 3600 for t in times[settled:]], memory[settled:])
    return Soaked(load=load, times_s=tuple(times), memory_mib=tuple(memory), trend_mib_an_hour=line)


async def _watched(
    work: Awaitable[Load], process: psutil.Process, config: SoakConfig
) -> tuple[Load, tuple[list[float], list[float]]]:
    times: list[float] = []
    memory: list[float] = []
    start = time.perf_counter()

    async def watch() -> None:
        while True:
            times.append(time.perf_counter() - start)
            memory.append(await asyncio.to_thread(held_mib, process))
            await asyncio.sleep(config.interval_s)

    watcher = asyncio.create_task(watch())
    try:
        load = await work
    finally:
        watcher.cancel()
    return load, (times[: len(memory)], memory)


def _result(recorder: Recorder, soaked: Soaked, config: SoakConfig) -> BenchmarkResult:
    line, load = soaked.trend_mib_an_hour, soaked.load
    every = max(1, len(soaked.times_s) // _MOST_POINTS)
    points = zip(soaked.times_s[::every], soaked.memory_mib[::every], strict=True)
    curve = Series(
        plot="Memory held",
        name="server and its children",
        x_label="minutes",
        y_label="MiB",
        points=tuple(Point(x=t / 60, y=m, low=m, high=m) for t, m in points),
    )
    tenths = np.array_split(np.array(load.latencies_ms), 10)
    verdict = "grew" if memory_grew(soaked, config) else "did not grow"
    return recorder.result(
        [
            Metric(
                name="latency, open loop, by tenth of the time",
                unit="ms",
                repeats=tuple(tuple(tenth) for tenth in tenths if len(tenth)),
            )
        ],
        series=(curve,),
        notes=[
            f"{len(load.samples)} requests in {load.seconds / 60:.1f} minutes, "
            f"{load.num_errors} failed.",
            *load.failures,
            f"Memory {verdict}: {line.slope:+.1f} MiB an hour (95 %: {line.low:+.1f} to "
            f"{line.high:+.1f}); from {soaked.memory_mib[0]:.0f} to "
            f"{soaked.memory_mib[-1]:.0f} MiB, highest {max(soaked.memory_mib):.0f}.",
        ],
    )


if __name__ == "__main__":
    enter(main)
