"""How much memory a process takes for an engine, measured in a process of its own.

``python -m benchmarks.memory FOLDER SHAPES THREADS`` is that process: it opens the engine as a
server does, runs it once on zeros and prints by how many bytes its highest resident size has grown
and how many times it holds the weights.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from weaksam_rt.artifacts import load_artifact
from weaksam_rt.backends.engines import open_engine
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel

_KIND = {"UINT8": np.uint8, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryUse:
    """What a process holds for an engine."""

    num_bytes: int
    """Beyond what the libraries take."""
    num_sessions: int
    """Each holds the weights (ADR 0019)."""


def measured_memory(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], *, threads: int = 0
) -> MemoryUse:
    """What a process takes to open the engine in ``folder`` and run it once.

    Args:
        folder: Of an exported model.
        shapes: Of every input.
        threads: Of the engine; 0: all cores.
    """
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", str(folder), json.dumps(shapes), str(threads)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return MemoryUse(**json.loads(run.stdout))


def _growth(folder: Path, shapes: Mapping[str, tuple[int, ...]], threads: int) -> MemoryUse:
    artifact = load_artifact(folder)
    before = _resident("VmRSS")
    model = open_engine(artifact, num_threads=threads)
    model(
        {
            spec.name: np.zeros(shapes[spec.name], _KIND[spec.dtype])
            for spec in artifact.contract.inputs
        },
        None,
    )
    num_sessions = model.num_sessions if isinstance(model, OnnxRuntimeModel) else 1
    return MemoryUse(num_bytes=_resident("VmHWM") - before, num_sessions=num_sessions)


def _resident(field: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    folder, shapes, threads = sys.argv[1:]
    sys.stdout.write(json.dumps(asdict(_growth(Path(folder), json.loads(shapes), int(threads)))))
