"""``python -m export``: checkpoints to verified engines, engines to a repository, and a new engine
into a repository that is being served.
"""

import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import tyro

from export.accept import accept_onnx
from export.engine_commands import doctor, engines, prompted_classifier
from export.exportable import (
    Exportable,
    chosen_exportables,
    example_tensors,
)
from export.half_weights import round_weights_, store_weights_as_half
from export.judges import in_words
from export.onnx_from_module import OPSET, onnx_from_module
from export.refit import renamed_weights
from export.release import Method, ReleaseRules
from export.release import release as release_model
from training.data.coco import load_coco_folder
from weaksam_rt.artifacts import ModelArtifact, upgrade_manifest
from weaksam_rt.client import ClientConfig, ClientTls
from weaksam_rt.contracts import DETECTOR
from weaksam_rt.engine_serving import PROFILES, Profile
from weaksam_rt.errors import ArtifactError, WeakSamError
from weaksam_rt.files import write_json
from weaksam_rt.model_control import ModelControl
from weaksam_rt.model_repository import (
    build_model_repository,
    load_exported_models,
    write_repository_snapshot,
)
from weaksam_rt.releases import roll_back

_LOGGER = logging.getLogger(__name__)
_DEFAULT_RULES = ReleaseRules()


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
    start = time.perf_counter()
    if half_weights:
        round_weights_(exportable.module)
    onnx_from_module(exportable.module, contract, example_tensors(exportable.inputs[0]), path)
    if half_weights:
        store_weights_as_half(path)
    seconds = round(time.perf_counter() - start, 3)
    exporter = {
        "name": "torch.onnx dynamo",
        "opset": OPSET,
        "half_weights": half_weights,
        "seconds": seconds,
    }
    provenance = {
        "exporter": exporter,
        "precision": "fp32/fp16 weights" if half_weights else "fp32",
        "weights": renamed_weights(path, exportable.module),
    }
    artifact = accept_onnx(path, exportable, provenance)
    for name, result in artifact.passport.parity.items():
        _LOGGER.info("%s.%s: max error %.2g", contract.name, name, result["max_abs_error"])
    return artifact


def models(
    output: Annotated[Path, tyro.conf.Positional],
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
    chosen = chosen_exportables(detector, classifier, sam)
    if not chosen:
        raise ValueError("nothing to export: give --detector, --classifier or --sam")
    for exportable in chosen:
        export_model(exportable, output / exportable.model, half_weights=half_weights)


def repository(
    models: Annotated[Path, tyro.conf.Positional],
    output: Annotated[Path, tyro.conf.Positional],
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


def release(
    repository: Annotated[Path, tyro.conf.Positional],
    *,
    data: Path,
    calibration: Path | None = None,
    detector: Path | None = None,
    classifier: Path | None = None,
    sam: Path | None = None,
    url: str = "127.0.0.1:8001",
    root_certificates: Path | None = None,
    method: Method = "auto",
    rules: Annotated[ReleaseRules, tyro.conf.arg(name="")] = _DEFAULT_RULES,
    niceness: int = 10,
    report: Path | None = None,
) -> None:
    """Serve a newly trained model: build or refit, verify, compare, switch, watch.

    Whatever fails, the version before is served as before; a release that was killed is undone by
    `weaksam serve`, or by the next release.

    Args:
        repository: The model repository that the server serves.
        data: Folder with images/ and instances.json, for AP50 (detector), the tags' average
            precision (classifier) or the IoU of prompted masks (SAM) of candidate and live version.
        calibration: Folder like --data with other images, such as those of the training: an int8
            or fp8 successor takes its ranges from them. Required where the live engine is one.
        detector: Weights of training.retrain_detector. One of these three is released.
        classifier: Weights of training.train_classifier.
        sam: Weights of training.train_sam, or an official SAM checkpoint; both halves go together.
        url: Host and gRPC port of `weaksam serve REPOSITORY --allow-releases`.
        root_certificates: PEM file of the authorities to trust, for an encrypted server.
        method: auto refits where only weights changed, and exports otherwise.
        rules: What the candidate must fulfil.
        niceness: How far this process steps back behind the server on the same machine, 0 to 19.
        report: JSON file with figures and times.
    """
    os.nice(niceness)
    torch.set_num_threads(1)
    with _control(url, root_certificates) as control:
        summary = release_model(
            repository,
            chosen_exportables(detector, classifier, sam),
            load_coco_folder(data),
            control,
            export=lambda exportable, folder, half: export_model(
                exportable, folder, half_weights=half
            ),
            method=method,
            calibration=None if calibration is None else load_coco_folder(calibration),
            rules=rules,
            on_step=lambda step: _LOGGER.info("  %s", step),
        )
    built = summary.live_build_seconds
    _LOGGER.info(
        "version %d is served: %s and verification %.1f s (exporting the live one took %s), "
        "%s (live before: %s)",
        summary.report.release.version, " and ".join(sorted(set(summary.methods.values()))),
        summary.build_seconds, "an unknown time" if built is None else f"{built:.1f} s",
        in_words(summary.metrics), in_words(summary.live_metrics),
    )  # fmt: skip
    if report is not None:
        write_json(report, summary.to_json())


def rollback(
    repository: Annotated[Path, tyro.conf.Positional],
    *,
    to: int | None = None,
    model: str = DETECTOR,
    url: str = "127.0.0.1:8001",
    root_certificates: Path | None = None,
) -> None:
    """Serve an earlier version again.

    Args:
        repository: The model repository that the server serves.
        to: The version; by default the one that the last release replaced.
        model: The engine that was released.
        url: Host and gRPC port of `weaksam serve REPOSITORY --allow-releases`.
        root_certificates: PEM file of the authorities to trust, for an encrypted server.
    """
    with _control(url, root_certificates) as control:
        done = roll_back(
            repository, model, control, to=to,
            on_step=lambda step: _LOGGER.info("  %s", step),
        )  # fmt: skip
    _LOGGER.info("version %d is served, %.1f s", done.release.version, sum(done.seconds.values()))


def passport(models: Annotated[Path, tyro.conf.Positional], *, created_at: str = "") -> None:
    """Give exported models of the first manifest format their passports; engines stay as they are.

    Args:
        models: Folder with one subfolder for each exported model, or one such subfolder.
        created_at: When they were exported (ISO 8601 with a time zone), if that is known.
    """
    folders = sorted(path.parent for path in models.glob("**/manifest.json"))
    if not folders:
        raise ArtifactError(f"{models} holds no exported models")
    for folder in folders:
        done = upgrade_manifest(folder, created_at=created_at)
        _LOGGER.info("%s: %s", folder, "upgraded" if done else "has its passport already")


def _control(url: str, root_certificates: Path | None) -> ModelControl:
    tls = None if root_certificates is None else ClientTls(root_certificates=root_certificates)
    return ModelControl(url, ClientConfig(tls=tls))


_COMMANDS = (
    models,
    engines,
    prompted_classifier,
    doctor,
    repository,
    snapshot,
    release,
    rollback,
    passport,
)


def main() -> None:
    """Run the command; an error is one line, and the exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    commands = {f.__name__: f for f in _COMMANDS}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="python -m export")
    except (WeakSamError, ValueError, OSError) as error:
        sys.exit(f"error: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
