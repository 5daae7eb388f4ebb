"""What a figure depends on besides the code: the machine, its clocks, and its measured limits."""

import contextlib
import os
import platform
import re
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import psutil
import torch

from training.engine.stage import package_versions

_MATMUL_SIDE = 1536
_COPY_MIB = 256
_PEERS = ("nvidia-pytriton", "segment-anything", "tritonclient")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Hardware and system; two results with equal ones may be compared."""

    processor: str
    cores: int
    """That this process may run on."""
    memory_gib: int
    gpus: tuple[str, ...]
    system: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Clocks:
    """State of the machine at one moment."""

    megahertz: float | None
    """Mean over the cores; None where the system does not tell."""
    load_average: float
    """Runnable processes, mean of the last minute; above the number of cores others disturb."""
    celsius: float | None
    """Warmest sensor; None where there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """What this machine does at most, measured: the two lines of its roofline."""

    flops: float
    """Floating-point operations a second of a large float32 matrix product, all threads."""
    bytes: float
    """Bytes a second that a large copy reads and writes together."""

    def floor_s(self, flops: float, num_bytes: float) -> float:
        """Least seconds for work of so many operations that must move so many bytes."""
        return max(flops / self.flops, num_bytes / self.bytes)


def read_machine() -> Machine:
    """This machine."""
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30),
        gpus=tuple(_gpus()),
        system=f"{platform.system()} {platform.release()}",
    )


def read_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide figures, those installed."""
    found = {"python": platform.python_version(), **package_versions()}
    for package in _PEERS:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def read_clocks() -> Clocks:
    """The state of the machine now."""
    frequency = psutil.cpu_freq()
    sensors = [t.current for group in psutil.sensors_temperatures().values() for t in group]
    return Clocks(
        megahertz=None if frequency is None or not frequency.current else frequency.current,
        load_average=os.getloadavg()[0],
        celsius=max(sensors, default=None),
    )


def measure_peaks(*, repeats: int = 7) -> Peaks:
    """Measure both limits on the CPU, best of ``repeats``: a limit is what was reached once."""
    size = _MATMUL_SIDE
    left, right = torch.rand(size, size), torch.rand(size, size)
    source = np.ones(_COPY_MIB * 2**20 // 8)
    target = np.empty_like(source)
    matmul, copy = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # whatever the environment says
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, right)
        matmul.append(time.perf_counter() - start)
        start = time.perf_counter()
        np.copyto(target, source)
        copy.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return Peaks(flops=2 * size**3 / min(matmul), bytes=2 * source.nbytes / min(copy))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"


def _gpus() -> list[str]:
    try:
        run = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return run.stdout.strip().splitlines()
