"""What a figure depends on besides the code: the machine, its clocks, and its measured limits."""

import contextlib
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from training.engine.stage import package_versions

_MATMUL_SIDE, _MATMUL_SIDE_GPU = 1536, 8192
_COPY_MIB, _COPY_MIB_GPU = 256, 4096
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
    """Floating-point operations a second of a large matrix product, all threads."""
    bytes: float
    """Bytes a second that a large copy reads and writes together."""

    def floor_s(self, flops: float, num_bytes: float) -> float:
        """Least seconds for work of so many operations that must move so many bytes."""
        return max(flops / self.flops, num_bytes / self.bytes)

    def or_higher(self, other: "Peaks") -> "Peaks":
        """The higher of two measurements, limit by limit: a busy machine lowers them only."""
        return Peaks(flops=max(self.flops, other.flops), bytes=max(self.bytes, other.bytes))


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


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """So many threads in an operator of torch on the CPU, for as long as it lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_peaks(
    device: str = "cpu",
    *,
    mixed_precision: bool = False,
    threads: int | None = None,
    repeats: int = 7,
) -> Peaks:
    """Measure both limits, best of ``repeats``: a limit is what was reached once.

    Args:
        device: A torch device.
        mixed_precision: Matrices of bfloat16 instead of float32.
        threads: Of the CPU; None: a thread on every core.
        repeats: At least 1.
    """
    on_cpu = torch.device(device).type == "cpu"
    size = _MATMUL_SIDE if on_cpu else _MATMUL_SIDE_GPU
    dtype = torch.bfloat16 if mixed_precision else torch.float32
    matrix = torch.rand(size, size, device=device).to(dtype)
    source = torch.ones((_COPY_MIB if on_cpu else _COPY_MIB_GPU) * 2**18, device=device)
    target = torch.empty_like(source)
    # Whatever the environment says.
    with torch_threads(len(os.sched_getaffinity(0)) if threads is None else threads):
        matmul = [_seconds(lambda: torch.mm(matrix, matrix), on_cpu=on_cpu) for _ in range(repeats)]
        copy = [_seconds(lambda: target.copy_(source), on_cpu=on_cpu) for _ in range(repeats)]
    moved = 2 * source.numel() * source.element_size()
    return Peaks(flops=2 * size**3 / min(matmul), bytes=moved / min(copy))


def _seconds(work: Callable[[], object], *, on_cpu: bool) -> float:
    start = time.perf_counter()
    work()
    if not on_cpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
