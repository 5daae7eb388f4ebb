"""The last step of every way to an engine: compare it with PyTorch, then give it a passport."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.exportable import Exportable
from export.machine import machine_versions
from export.verify import parity
from training.engine.stage import git_commit
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
