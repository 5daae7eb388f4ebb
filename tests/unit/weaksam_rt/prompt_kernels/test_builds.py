"""The kernels compile for every GPU, spill nothing, and run clean under g++'s sanitizers."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.unit.weaksam_rt.prompt_kernels.cpu_executor import SOURCES, build_kernels
from weaksam_rt.errors import ArtifactError, BackendUnavailableError
from weaksam_rt.prompt_clustering import _nvrtc, _prebuilt
from weaksam_rt.prompt_clustering._cuda import kernel_codes

_KERNELS = {
    "axis_tables", "find_peaks", "cluster_peaks", "choose_clusters", "count_prompts",
    "pack_prompts", "summarize_masks", "pack_masks", "count_runs", "write_runs", "nms_order",
    "nms_conflicts", "nms_select", "describe_image", "count_outputs",
}  # fmt: skip
_ROOT = Path(__file__).parents[4]
_SANITIZED_CASES = 40
_RUN_CASES = """
import sys
from pathlib import Path
import numpy as np
from tests.unit.weaksam_rt.prompt_kernels.cases import random_batch, random_config
from tests.unit.weaksam_rt.prompt_kernels.cpu_executor import CpuExecutor
from weaksam_rt.preprocessing import longest_side_frame
from weaksam_rt.prompt_clustering._backends import KernelBackend
from weaksam_rt.prompt_clustering._engine_plan import (
    EngineMaps, plan_engine_prompts,
)
from weaksam_rt.prompt_clustering._plan import Plan, plan_nms
from weaksam_rt.prompt_clustering.config import EnginePromptConfig

for seed in range(int(sys.argv[2])):
    rng = np.random.default_rng(seed)
    executor = CpuExecutor(Path(sys.argv[1]), threads=(1, 4, 7)[seed % 3])
    backend = KernelBackend(executor)
    backend.prompt_batch(random_batch(rng, max_side=24, max_maps=6), random_config(rng))
    logits = rng.normal(size=(2, 9, 9)).astype(np.float32)
    frames = [longest_side_frame((31, 17), 36)]
    backend.summarize_masks(logits, np.zeros(2, np.int32), frames)
    backend.encode_masks(logits, np.zeros(2, np.int32), frames)
    corners = np.sort(rng.random((70, 2, 2), dtype=np.float32), axis=1)
    boxes = corners.reshape(70, 4)
    labels = np.zeros(70, np.int32)
    scores = rng.random(70, dtype=np.float32)
    backend.class_nms(boxes, scores, labels, 0.3)
    executor.run(plan_nms(boxes, scores, labels, 0.3, conflict_bytes=500))
    maps = EngineMaps(num_passes=2, num_maps=6, num_classes=2, height=5, width=4)
    config = EnginePromptConfig(num_classes=4, model_size=64, clustering=random_config(rng))
    plan = plan_engine_prompts(maps, config)
    image = {
        "maps": rng.random((2, 6, 5, 4), dtype=np.float32),
        "tag_ids": rng.integers(-1, 5, 2).astype(np.int32),
        "image_size": rng.integers(0, 30, 2).astype(np.int32),
    }
    executor.run(Plan(program=plan.program, inputs={**plan.inputs, **image}))
print("ran", sys.argv[2])
"""


def _compiled(architecture):
    try:
        return _nvrtc.compile_kernels(architecture)
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("architecture", _nvrtc.ARCHITECTURES)
def test_every_kernel_compiles_without_spilling_into_what_is_prebuilt(architecture):
    compiled = _compiled(architecture)
    resources = compiled.resources
    assert set(resources) == _KERNELS
    assert {name: r.spilled_bytes for name, r in resources.items() if r.spilled_bytes} == {}
    assert all(r.registers <= 128 for r in resources.values())
    manifest = _prebuilt.read_manifest()
    assert manifest is not None, "run python -m weaksam_rt.prompt_clustering.build"
    if manifest["nvrtc"] == _nvrtc.nvrtc_version():
        recorded = manifest["architectures"][architecture]
        assert recorded["kernels"] == {name: asdict(r) for name, r in resources.items()}
        assert recorded["sha256"] == hashlib.sha256(compiled.code).hexdigest()


def test_what_is_prebuilt_is_of_this_source_and_whole():
    manifest = _prebuilt.read_manifest()
    assert manifest is not None, "run python -m weaksam_rt.prompt_clustering.build"
    assert {*manifest["architectures"]} == {*_nvrtc.ARCHITECTURES, _prebuilt.PTX_ARCHITECTURE}
    assert sum(p.stat().st_size for p in _prebuilt.FOLDER.iterdir()) < 500_000
    for architecture in _nvrtc.ARCHITECTURES:
        names = [name for name, _ in _prebuilt.prebuilt_kernels(architecture)]
        assert names == [architecture, _prebuilt.PTX_ARCHITECTURE]


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("sm_75", []),
        ("sm_87", ["sm_86", "compute_80"]),
        ("sm_103", ["sm_100", "compute_80"]),
        ("sm_110", ["compute_80"]),
        ("sm_121", ["sm_120", "compute_80"]),
    ],
)
def test_a_gpu_gets_code_of_its_generation_or_ptx(architecture, expected):
    found = dict(_prebuilt.prebuilt_kernels(architecture))
    assert list(found) == expected
    assert all(code.startswith(b"\x7fELF") for n, code in found.items() if n.startswith("sm"))


def test_prebuilt_ptx_rounds_every_operation_alone():
    (_, ptx) = [*_prebuilt.prebuilt_kernels("sm_80")][-1]
    assert b".target sm_80" in ptx
    assert ptx.endswith(b"\0")
    for kernel in _KERNELS:
        assert f".entry {kernel}(".encode() in ptx
    assert b"mul.rn.f32" in ptx
    assert b"fma.rn" not in ptx
    # What has no rounding mode of its own may be fused by the driver.
    assert re.search(rb"\b(mul|add|sub)\.f(32|64)\b", ptx) is None


def test_prebuilt_kernels_of_another_source_are_not_used(tmp_path):
    folder = shutil.copytree(_prebuilt.FOLDER, tmp_path / "prebuilt")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "sm_90.cubin.z").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"sm_90\.cubin\.z cannot be read"):
        [*_prebuilt.prebuilt_kernels("sm_90", folder)]
    (folder / "sm_90.cubin.z").write_bytes((folder / "sm_89.cubin.z").read_bytes())
    with pytest.raises(ArtifactError, match=r"sm_90\.cubin\.z differs from its manifest"):
        [*_prebuilt.prebuilt_kernels("sm_90", folder)]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"source": "other"}))
    assert [*_prebuilt.prebuilt_kernels("sm_90", folder)] == []
    assert [*_prebuilt.prebuilt_kernels("sm_90", tmp_path / "none")] == []


def test_nvrtc_comes_after_what_is_prebuilt(tmp_path, monkeypatch):
    _compiled("sm_80")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = [name for name, _ in kernel_codes("sm_87")]
    assert names == ["prebuilt sm_86", "prebuilt compute_80", "compiled by NVRTC"]


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
    ran = _run_sanitized(tmp_path, sanitizers, library, num_cases=_SANITIZED_CASES)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.split() == ["ran", str(_SANITIZED_CASES)]


@pytest.mark.parametrize(
    ("file", "old", "new", "sanitizers", "library", "message"),
    [
        (
            "nms.cuh", "        __syncthreads();\n        if (threadIdx.x == 0) kept",
            "        if (threadIdx.x == 0) kept", "thread", "libtsan.so", "data race",
        ),
        (
            "masks.cuh", "i < side;", "i <= 2 * side + 8;", "address,undefined", "libasan.so",
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
