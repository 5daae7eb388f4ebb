"""How much memory a process takes for an engine, measured in a process of its own.

``python -m benchmarks.memory FOLDER SHAPES`` is that process: it opens the engine, runs it once on
zeros and prints by how many bytes its highest resident size has grown.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from weaksam_rt.artifacts import load_artifact
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel

_KIND = {"UINT8": np.uint8, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}


def measured_memory(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes that a process takes to open the engine in ``folder`` and run it once, beyond what the
    libraries take.
    """
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", str(folder), json.dumps(shapes)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(run.stdout)


def _growth(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    artifact = load_artifact(folder)
    before = _resident("VmRSS")
    model = OnnxRuntimeModel(artifact)
    model(
        {
            spec.name: np.zeros(shapes[spec.name], _KIND[spec.dtype])
            for spec in artifact.contract.inputs
        }
    )
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    sys.stdout.write(str(_growth(Path(sys.argv[1]), json.loads(sys.argv[2]))))
