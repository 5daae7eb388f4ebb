"""The CUDA kernels, built by g++ and run on the CPU: threads, barriers and atomics are real."""

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import weaksam_rt.prompt_clustering as package
from weaksam_rt.prompt_clustering.device_arrays import DeviceArray, JoinedArrays

SOURCES = Path(package.__file__).parent / "csrc"
_FLAGS = ("-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")


def build_kernels(
    folder: Path, *flags: str, sources: Path = SOURCES, main: Path | None = None
) -> Path:
    """The shared library of ``main``; skips the test where there is no g++.

    Args:
        folder: Where it is written.
        flags: For g++.
        sources: The kernels.
        main: What is compiled; by default the kernels alone.
    """
    if shutil.which("g++") is None:
        pytest.skip("no g++: the kernels cannot be built for the CPU")
    main = main or sources / "cpu_kernels.cpp"
    digest = hashlib.sha256(" ".join([str(main), *flags]).encode()).hexdigest()[:12]
    library = folder / f"kernels_{digest}.so"
    command = ["g++", *_FLAGS, *flags, "-I", str(sources), str(main), "-o", str(library)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return library


def build_cpu_driver(folder: Path, *flags: str) -> ctypes.CDLL:
    """A stand-in for NVIDIA's driver that runs the kernels on the CPU; see ``build_kernels``."""
    main = Path(__file__).parent / "cpu_driver.cpp"
    return ctypes.CDLL(str(build_kernels(folder, *flags, main=main)))


class CpuExecutor:
    """Runs plans on NumPy arrays."""

    def __init__(self, library: Path, threads: int | None = None):
        self._library = ctypes.CDLL(str(library))
        self._threads = threads

    def with_threads(self, threads: int) -> "CpuExecutor":
        """The same, with blocks of another size."""
        other = object.__new__(CpuExecutor)
        other._library, other._threads = self._library, threads
        return other

    def run(self, plan):
        # Memory starts as a pattern, not as zeros: whoever reads what no kernel wrote shows it.
        arrays = {
            name: np.frombuffer(
                bytearray(b"\xa5" * (int(np.prod(b.shape)) * np.dtype(b.dtype).itemsize)), b.dtype
            ).reshape(b.shape)
            for name, b in plan.program.buffers.items()
        }
        arrays |= {name: _in_place(a) for name, a in plan.inputs.items()}
        for launch in plan.program.launches:
            self._launch(
                replace(launch, threads=self._threads) if self._threads else launch, arrays
            )
        return {name: arrays[name] for name in plan.program.outputs}

    def _launch(self, launch, arrays):
        values = [_as_ctypes(argument, arrays) for argument in launch.arguments]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        status = self._library.launch_kernel(
            launch.kernel.encode(),
            *(ctypes.c_uint(n) for n in (*launch.grid, launch.threads)),
            ctypes.c_size_t(launch.shared_bytes),
            pointers,
        )
        assert status == 0, launch.kernel


def _in_place(array):
    """As a GPU sees it: the memory of device arrays is read where it is."""
    if isinstance(array, JoinedArrays):
        return np.concatenate([_in_place(part).ravel() for part in array.parts])
    if isinstance(array, DeviceArray):
        memory = (ctypes.c_char * array.nbytes).from_address(array.address)
        return np.frombuffer(memory, array.dtype).reshape(array.shape)
    return np.ascontiguousarray(array)


def _as_ctypes(argument, arrays) -> ctypes.Array:
    if isinstance(argument, str):
        argument = (argument,)
    if isinstance(argument, Sequence):
        addresses = [arrays[name].ctypes.data for name in argument]
        return (ctypes.c_void_p * len(addresses))(*addresses)
    content = argument.tobytes()
    return ctypes.create_string_buffer(content, len(content))
