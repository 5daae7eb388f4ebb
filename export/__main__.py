"""``python -m export models|repository|snapshot``: checkpoints to verified engines, engines to a
repository.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import tyro

from export.exportable import (
    Exportable,
    classifier_exportable,
    detector_exportable,
    example_tensors,
    sam_exportables,
)
from export.half_weights import round_weights_, store_weights_as_half
from export.onnx_from_module import OPSET, onnx_from_module
from export.verify import parity
from training.engine.stage import git_commit, package_versions
from weaksam_rt.artifacts import ModelArtifact, write_manifest
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.model_repository import (
    PROFILES,
    Profile,
    build_model_repository,
    load_exported_models,
    write_repository_snapshot,
)

_LOGGER = logging.getLogger(__name__)


def export_model(
    exportable: Exportable, directory: Path, *, half_weights: bool = False
) -> ModelArtifact:
    """Export one model to ``directory`` and accept it only if it agrees with PyTorch.

    Args:
        exportable: The model and the inputs to compare it on.
        directory: Gets ``model.onnx`` and ``manifest.json``.
        half_weights: Round the weights to float16 and store them so; arithmetic stays float32.

    Returns:
        The artifact: ``model.onnx`` and ``manifest.json`` with the parity figures.

    Raises:
        ParityError: ONNX Runtime's answers differ; no manifest is written, so nothing will load it.
    """
    path = directory / "model.onnx"
    contract = exportable.contract
    if half_weights:
        round_weights_(exportable.module)
    onnx_from_module(exportable.module, contract, example_tensors(exportable.inputs[0]), path)
    if half_weights:
        store_weights_as_half(path)
    provenance: dict[str, Any] = {
        "source": exportable.source,
        "exporter": {"name": "torch.onnx dynamo", "opset": OPSET, "half_weights": half_weights},
        "tolerance": dataclasses.asdict(exportable.tolerance),
        "commit": git_commit(),
        "versions": package_versions(),
    }

    def manifest(parity_figures: dict[str, Any]) -> ModelArtifact:
        return write_manifest(
            path,
            model=exportable.model,
            engine="onnxruntime",
            parameters=exportable.parameters,
            provenance={**provenance, "parity": parity_figures},
        )

    unverified = manifest({})
    try:
        figures = parity(
            exportable.module,
            OnnxRuntimeModel(unverified),
            contract,
            exportable.inputs,
            exportable.tolerance,
        )
    except Exception:
        (directory / "manifest.json").unlink()
        raise
    for name, result in figures.items():
        _LOGGER.info("%s.%s: max error %.2g", contract.name, name, result["max_abs_error"])
    return manifest(figures)


def models(
    output: Path,
    *,
    detector: Path | None = None,
    classifier: Path | None = None,
    sam: Path | None = None,
    half_weights: bool = False,
) -> None:
    """Export trained models to ONNX, each verified against PyTorch.

    Args:
        output: Gets one subfolder for each model, with model.onnx and manifest.json.
        detector: Weights of training.retrain_detector.
        classifier: Weights of training.train_classifier.
        sam: Weights of training.train_sam, or an official SAM checkpoint.
        half_weights: Round the weights to float16: half the file size, float32 arithmetic.
    """
    chosen: list[Exportable] = []
    if detector is not None:
        chosen.append(detector_exportable(detector))
    if classifier is not None:
        chosen.append(classifier_exportable(classifier))
    if sam is not None:
        chosen += sam_exportables(sam)
    if not chosen:
        raise ValueError("nothing to export: give --detector, --classifier or --sam")
    for exportable in chosen:
        export_model(exportable, output / exportable.model, half_weights=half_weights)


def repository(
    models: Path,
    output: Path,
    *,
    profile: Profile = "embedded",
    config: Path | None = None,
) -> None:
    """Build a Triton model repository from exported models.

    Args:
        models: Folder with one subfolder for each exported model.
        output: The repository; replaced if it is one.
        profile: Which server will read it.
        config: TOML file with pipeline settings.
    """
    exported = load_exported_models(models, config)
    build_model_repository(exported.artifacts, output, profile=profile, config=exported.config)


def snapshot(
    models: Path = Path("assets/demo_models"), output: Path = Path("triton_models")
) -> None:
    """Write the repositories of both profiles without engines, as they are kept under version
    control.

    Args:
        models: Folder with one subfolder for each exported model.
        output: Gets ``embedded`` and ``container``.
    """
    exported = load_exported_models(models)
    for profile in PROFILES:
        write_repository_snapshot(
            exported.artifacts, output / profile, profile=profile, config=exported.config
        )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tyro.extras.subcommand_cli_from_dict(
        {"models": models, "repository": repository, "snapshot": snapshot}
    )
