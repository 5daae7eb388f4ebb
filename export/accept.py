"""The last step of every way to an engine: compare it with PyTorch, then give it a passport."""

import dataclasses
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from export.exportable import Exportable
from export.verify import parity
from training.engine.stage import git_commit, package_versions
from weaksam_rt.artifacts import MANIFEST_NAME, ModelArtifact, write_manifest
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel


def accept_onnx(path: Path, exportable: Exportable, provenance: Mapping[str, Any]) -> ModelArtifact:
    """Accept an ONNX file only if ONNX Runtime's answers are PyTorch's.

    Args:
        path: The complete file; gets ``manifest.json`` beside it.
        exportable: What the file was made from, and the inputs to compare both on.
        provenance: Fields of the passport that only the maker knows.

    Raises:
        ParityError: The answers differ; no manifest is left, so nothing will load the file.
    """
    known: dict[str, Any] = {
        "source": exportable.source,
        "tolerance": dataclasses.asdict(exportable.tolerance),
        "commit": git_commit(),
        "versions": machine_versions(),
        **provenance,
    }

    def manifest(figures: Mapping[str, Any]) -> ModelArtifact:
        return write_manifest(
            path,
            model=exportable.model,
            engine="onnxruntime",
            parameters=exportable.parameters,
            provenance={**known, "parity": figures},
        )

    unverified = manifest({})
    try:
        figures = parity(
            exportable.module,
            OnnxRuntimeModel(unverified),
            exportable.contract,
            exportable.inputs,
            exportable.tolerance,
        )
    except Exception:
        (path.parent / MANIFEST_NAME).unlink()
        raise
    return manifest(figures)


def machine_versions() -> dict[str, str]:
    """Packages that decide results and, where a GPU is at hand, CUDA, driver and its capability."""
    versions = package_versions()
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        versions |= {"cuda": str(torch.version.cuda), "compute_capability": f"{major}.{minor}"}
        if driver := _driver_version():
            versions["driver"] = driver
    return versions


def _driver_version() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.split("\n")[0].strip() or None if run.returncode == 0 else None
