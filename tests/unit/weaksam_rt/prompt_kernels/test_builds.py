"""The kernels compile for every GPU, spill nothing, and run clean under g++'s sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.weaksam_rt.prompt_kernels.cpu_executor import SOURCES, build_kernels
from weaksam_rt.errors import ArtifactError, BackendUnavailableError
from weaksam_rt.prompt_clustering import _nvrtc

_KERNELS = {
    "axis_tables", "find_peaks", "cluster_peaks", "choose_clusters", "count_prompts",
    "pack_prompts", "summarize_masks", "pack_masks", "count_runs", "write_runs", "nms_order",
    "nms_conflicts", "nms_select",
}  # fmt: skip
_ROOT = Path(__file__).parents[4]
_RUN_CASES = """
import sys
from pathlib import Path
import numpy as np
from tests.unit.weaksam_rt.prompt_kernels.cases import random_batch, random_config
from tests.unit.weaksam_rt.prompt_kernels.cpu_executor import CpuExecutor
from weaksam_rt.preprocessing import longest_side_frame
from weaksam_rt.prompt_clustering._backends import KernelBackend

for seed in range(int(sys.argv[2])):
    rng = np.random.default_rng(seed)
    backend = KernelBackend(CpuExecutor(Path(sys.argv[1]), threads=(1, 4, 7)[seed % 3]))
    backend.prompt_batch(random_batch(rng, max_side=24, max_maps=6), random_config(rng))
    logits = rng.normal(size=(2, 9, 9)).astype(np.float32)
    frames = [longest_side_frame((31, 17), 36)]
    backend.summarize_masks(logits, np.zeros(2, np.int32), frames)
    backend.encode_masks(logits, np.zeros(2, np.int32), frames)
    corners = np.sort(rng.random((70, 2, 2), dtype=np.float32), axis=1)
    boxes = corners.reshape(70, 4)
    labels = np.zeros(70, np.int32)
    backend.class_nms(boxes, rng.random(70, dtype=np.float32), labels, 0.3)
print("ran", sys.argv[2])
"""


def _compiled(architecture):
    try:
        return _nvrtc.compile_kernels(architecture)
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("architecture", _nvrtc.ARCHITECTURES)
def test_every_kernel_compiles_without_spilling(architecture):
    resources = _compiled(architecture).resources
    assert set(resources) == _KERNELS
    assert {name: r.spilled_bytes for name, r in resources.items() if r.spilled_bytes} == {}
    assert all(r.registers <= 128 for r in resources.values())


def test_the_cache_is_written_once_and_read_again(tmp_path):
    _compiled("sm_80")
    first = _nvrtc.kernel_cubin("sm_80", tmp_path)
    (entry,) = tmp_path.iterdir()
    assert entry.read_bytes() == first
    entry.write_bytes(b"from the cache")
    assert _nvrtc.kernel_cubin("sm_80", tmp_path) == b"from the cache"


def test_an_architecture_that_does_not_exist_is_an_error_with_its_name():
    _compiled("sm_80")
    with pytest.raises(ArtifactError, match="sm_1"):
        _nvrtc.compile_kernels("sm_1")


def _run_sanitized(folder, sanitizers, library, num_cases, sources=SOURCES):
    """Builds with real threads and runs random cases in a process of its own."""
    built = build_kernels(
        folder, "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all",
        "-DCPU_EXECUTION_THREADS", "-pthread", sources=sources,
    )  # fmt: skip
    runtime = subprocess.run(
        ["g++", f"-print-file-name={library}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "PYTHONPATH": str(_ROOT),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", _RUN_CASES, str(built), str(num_cases)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sanitizers", "library"), [("address,undefined", "libasan.so"), ("thread", "libtsan.so")]
)
def test_sanitizers_find_nothing(tmp_path, sanitizers, library):
    ran = _run_sanitized(tmp_path, sanitizers, library, num_cases=15)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.split() == ["ran", "15"]


@pytest.mark.parametrize(
    ("file", "old", "new", "sanitizers", "library", "message"),
    [
        (
            "nms.cuh", "        __syncthreads();\n        if (threadIdx.x == 0) kept",
            "        if (threadIdx.x == 0) kept", "thread", "libtsan.so", "data race",
        ),
        (
            "masks.cuh", "i < 2 * side", "i <= 2 * side + 8", "address,undefined", "libasan.so",
            "heap-buffer-overflow",
        ),
    ],
)  # fmt: skip
def test_sanitizers_find_a_broken_kernel(tmp_path, file, old, new, sanitizers, library, message):
    sources = shutil.copytree(SOURCES, tmp_path / "csrc")
    content = (sources / file).read_text()
    assert old in content
    (sources / file).write_text(content.replace(old, new, 1))
    ran = _run_sanitized(tmp_path, sanitizers, library, num_cases=3, sources=sources)
    assert ran.returncode != 0
    assert message in ran.stderr
