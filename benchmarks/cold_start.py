"""From the command ``weaksam serve`` to the first answer, and where the seconds go.

``python -m benchmarks cold_start assets/demo_models`` starts the command as a user does, asks until
the server is ready, detects once, and stops it; several times over. The first start of a machine
also reads the files from the disk; the others find them in memory.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.progress import track

from benchmarks.entry import enter
from benchmarks.pictures import photograph
from benchmarks.reporting import Where, report
from benchmarks.results import (
    BenchmarkResult,
    Metric,
    Recorder,
    Stage,
    Waterfall,
    artifact_record,
)
from weaksam_rt.client import ClientConfig, WeakSamClient
from weaksam_rt.model_repository import load_exported_models

_PYTHON, _STARTS_SERVER, _LOADS, _READY, _ANSWERS = (
    "Python, imports, repository",
    "Triton's own start",
    "models load and warm up",
    "ready is noticed",
    "first answer",
)
TOTAL = "command to first answer"
_MARK = re.compile(r"\b[IWE]\d{4} (\d\d):(\d\d):(\d\d\.\d+) ")
_POLL_S = 0.01
_GOAL_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ColdStartConfig:
    """How much is measured."""

    starts: int = 5
    """Starts in all; each is a repeat."""
    timeout_s: float = 180.0
    """Longest one start may take."""


def main(
    where: Where, config: Annotated[ColdStartConfig, tyro.conf.arg(name="")] = ColdStartConfig()
) -> None:
    """Measure and report."""
    report(measure(where.models, config), where.output)


def measure(models: Path, config: ColdStartConfig) -> BenchmarkResult:
    """Several starts one after the other."""
    recorder = Recorder(
        what="cold_start",
        title="weaksam serve: from the command to the first answer",
        config=asdict(config),
        artifacts=tuple(map(artifact_record, load_exported_models(models).artifacts)),
    )
    data = photograph()
    starts = [
        start_once(models, data, timeout_s=config.timeout_s)
        for _ in track(range(config.starts), "starting", transient=True)
    ]
    metrics = [
        Metric(name=name, unit="s", repeats=tuple((start[name],) for start in starts))
        for name in (*starts[0], TOTAL)
        if name in starts[0]
    ]
    total = Metric(name=TOTAL, unit="s", repeats=tuple((sum(start.values()),) for start in starts))
    median = float(np.median(total.samples))
    stages = tuple(
        Stage(name=m.name, milliseconds=1e3 * float(np.median(m.samples))) for m in metrics
    )
    return recorder.result(
        [total, *metrics],
        waterfalls=(Waterfall(title="One start, medians", stages=stages),),
        notes=[
            f"{median:.2f} s from the command to the first answer, median of {config.starts}; the "
            f"goal is {_GOAL_S:g} s. The first start took {total.samples[0]:.2f} s."
        ],
    )


def start_once(models: Path, data: bytes, *, timeout_s: float) -> dict[str, float]:
    """Seconds of each step of one start, in their order."""
    with tempfile.TemporaryDirectory(prefix="weaksam-bench-") as name:
        log = Path(name) / "server.log"
        begun, begun_wall = time.monotonic(), time.time()
        with _serving(models, log) as (address, health):
            _wait(health, timeout_s)
            ready = time.monotonic() - begun
            with WeakSamClient(address, ClientConfig(max_attempts=1)) as client:
                client.detect(data)
            answered = time.monotonic() - begun
        return _steps(log, begun_wall, ready, answered)


@contextlib.contextmanager
def _serving(models: Path, log: Path) -> Iterator[tuple[str, str]]:
    """The command as a process of its own, on free ports: its gRPC address and health page."""
    ports = [str(port) for port in free_ports(3)]
    command = [
        sys.executable, "-m", "weaksam_rt.cli", "serve", str(models), "--log-file", str(log),
        "--grpc-port", ports[0], "--http-port", ports[1], "--metrics-port", ports[2],
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=dict(os.environ))
    try:
        yield f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}/v2/health/ready"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait(health: str, timeout_s: float) -> None:
    # Not by gRPC: a channel that found nobody waits longer and longer before it tries again.
    ends_at = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=1):
            return
        if time.monotonic() > ends_at:
            raise TimeoutError(f"the server was not ready after {timeout_s:g} s")
        time.sleep(_POLL_S)


def _steps(log: Path, begun_wall: float, ready: float, answered: float) -> dict[str, float]:
    """Split by the times of Triton's log: its first line, its first model, its last model."""
    lines = log.read_text(errors="replace").splitlines()
    first = _since(lines, begun_wall, "")
    loading = _since(lines, begun_wall, "loading: ")
    loaded = _since(reversed(lines), begun_wall, "successfully loaded")
    marks = [0.0, first, loading, loaded, ready, answered]
    names = (_PYTHON, _STARTS_SERVER, _LOADS, _READY, _ANSWERS)
    return {name: max(0.0, b - a) for name, a, b in zip(names, marks[:-1], marks[1:], strict=True)}


def _since(lines: Iterator[str] | list[str], begun_wall: float, text: str) -> float:
    """Seconds from the begin to the first of these lines that holds ``text``; Triton's clock is
    UTC, and its lines have no year.
    """
    midnight = begun_wall - begun_wall % 86400
    for line in lines:
        mark = _MARK.search(line)
        if mark is not None and text in line:
            hours, minutes, seconds = mark.groups()
            at = midnight + 3600 * int(hours) + 60 * int(minutes) + float(seconds)
            return (at - begun_wall) % 86400
    raise ValueError(f"Triton's log has no line with {text!r}; was it another version?")


if __name__ == "__main__":
    enter(main)
