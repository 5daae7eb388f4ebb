"""Commands that build engines from exported models, and that find what a precision breaks."""

import logging
from pathlib import Path
from typing import Annotated

import onnx
import tyro

from export.calibration import CALIBRATION_IMAGES, CalibratedGraph, calibrated
from export.doctor_command import kept_by_report, print_diagnosis, write_report
from export.engines.base import EngineConfig, EnginePrecision
from export.engines.build import build_engine, exported_onnx
from export.engines.profiles import HOT_BATCHES, default_profiles
from export.engines.prompted_classifier import build_prompted_classifier
from export.exportable import chosen_exportables, example_inputs
from export.mixed_precision import KeepFp32, Precision
from export.precision_doctor import diagnose
from export.task_metrics import image_inputs, metrics_by_treatment, spread
from training.data.coco import load_coco_folder
from weaksam_rt.artifacts import ModelArtifact, load_artifact
from weaksam_rt.backends.base import Arrays
from weaksam_rt.contracts import (
    PROMPTED_CLASSIFIER,
    SAM_IMAGE_ENCODER,
    SAM_MASK_DECODER,
    VIT_CLASSIFIER,
    SamParameters,
)
from weaksam_rt.errors import ArtifactError
from weaksam_rt.files import sha256_of_file
from weaksam_rt.model_repository import load_exported_models

_LOGGER = logging.getLogger(__name__)


def engines(
    models: Annotated[Path, tyro.conf.Positional],
    output: Path,
    *,
    engine: str = "tensorrt-rtx",
    precision: EnginePrecision = "fp32",
    compute_capability: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    hot_batches: tuple[int, ...] = HOT_BATCHES,
    keep_fp32: Path | None = None,
    calibration: Path | None = None,
    max_calibration_images: int = CALIBRATION_IMAGES,
    timing_cache: Path | None = None,
    workspace_mb: int | None = None,
    refittable: bool = False,
    detector: Path | None = None,
    classifier: Path | None = None,
    sam: Path | None = None,
) -> None:
    """Build engines from exported models.

    Args:
        models: Folder with one subfolder for each exported model.
        output: Gets one subfolder for each engine, with the engine file and manifest.json.
        engine: onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx, aot-inductor or
            aot-inductor-cuda.
        precision: fp16 and bf16 lower the graph.
        compute_capability: GPUs the engine is for, such as 8.0 8.9 12.0; one file serves all.
        only: Names of the models to build; empty: all.
        hot_batches: Batch sizes that get an optimisation profile of their own.
        keep_fp32: Folder of reports of the precision doctor, MODEL.json each: what a report
            proposes stays float32.
        calibration: COCO-format folder whose images int8 and fp8 are calibrated on.
        max_calibration_images: Of them, spread evenly.
        timing_cache: File of kernel timings to read and extend (tensorrt).
        workspace_mb: Most GPU memory an operator may borrow.
        refittable: Weights can be exchanged in the engine (tensorrt, tensorrt-rtx); needs a GPU.
        detector: Weights, for aot-inductor.
        classifier: Weights, for aot-inductor.
        sam: Weights, for aot-inductor.
    """
    modules = {e.model: e.module for e in chosen_exportables(detector, classifier, sam)}
    for source in exported_onnx(models):
        if only and source.model not in only:
            continue
        config = EngineConfig(
            precision=precision,
            keep_fp32=_kept(keep_fp32, source.model, precision),
            profiles=default_profiles(source.contract, hot_batches=hot_batches),
            compute_capabilities=compute_capability,
            workspace_bytes=None if workspace_mb is None else workspace_mb * 1_000_000,
            timing_cache=timing_cache,
            refittable=refittable,
        )
        built = build_engine(
            source,
            output / source.model,
            engine=engine,
            config=config,
            module=modules.get(source.model),
            graph=_graph(source, config, calibration, max_calibration_images),
        )
        _report(built)


def prompted_classifier(
    models: Annotated[Path, tyro.conf.Positional],
    output: Path,
    *,
    precision: EnginePrecision = "fp32",
    config: Path | None = None,
    keep_fp32: Path | None = None,
    timing_cache: Path | None = None,
    workspace_mb: int | None = None,
) -> None:
    """Build classifier and prompts as one TensorRT engine, for images whose tags are known.

    Maps then stay on the GPU. TensorRT must be installed and builds for the GPU at hand. The
    embedded profile serves the engine as prompted_classifier.

    Args:
        models: Folder with one subfolder for each exported model: a classifier and a SAM.
        output: Gets a subfolder prompted_classifier with model.plan and manifest.json.
        precision: Of the classifier; prompts are made of float32 maps in any case.
        config: TOML file with pipeline settings, whose clustering is fixed in the engine; None
            takes pipeline.toml in MODELS, or the defaults.
        keep_fp32: As of the engines command.
        timing_cache: As of the engines command.
        workspace_mb: As of the engines command.
    """
    exported = load_exported_models(models, config)
    by_model = {artifact.model: artifact for artifact in exported.artifacts}
    missing = {VIT_CLASSIFIER, SAM_IMAGE_ENCODER} - set(by_model)
    if missing:
        raise ArtifactError(f"{models} has no {', '.join(sorted(missing))}; export it first")
    sam = by_model[SAM_IMAGE_ENCODER].parameters
    assert isinstance(sam, SamParameters)
    built = build_prompted_classifier(
        by_model[VIT_CLASSIFIER],
        output / PROMPTED_CLASSIFIER,
        sam_image_size=sam.image_size,
        clustering=exported.config.clustering,
        config=EngineConfig(
            precision=precision,
            keep_fp32=_kept(keep_fp32, VIT_CLASSIFIER, precision),
            workspace_bytes=None if workspace_mb is None else workspace_mb * 1_000_000,
            timing_cache=timing_cache,
        ),
    )
    _report(built)


def doctor(
    model: Annotated[Path, tyro.conf.Positional],
    *,
    precision: Precision = "fp16",
    data: Path | None = None,
    max_images: int = 20,
    limit: float | None = None,
    output: Path | None = None,
) -> None:
    """Find the layers that a precision breaks and the smallest list of them to keep in float32.

    Args:
        model: Folder of one exported model.
        precision: fp16 or bf16; rounding is emulated on the CPU.
        data: COCO-format folder: layers are judged on its first image, and the task metric is
            reported in float32, in the precision, and with the treatment. A SAM's other half is
            looked for beside ``model``.
        max_images: Of the task metric, spread evenly.
        limit: Largest distance from float32 that counts as well; None: the precision's own.
        output: JSON report, for --keep-fp32 of the engines command.
    """
    artifact = load_artifact(model)
    graph = onnx.load(artifact.path)
    folder = None if data is None else spread(load_coco_folder(data), max_images)
    inputs: list[Arrays] = [*example_inputs(artifact.model, artifact.parameters)[1:2]]
    if folder is not None and artifact.model != SAM_MASK_DECODER:
        inputs = [image_inputs(artifact.model, artifact.parameters, folder.records[0])]
    diagnosis = diagnose(graph, artifact.model, inputs, precision=precision, limit=limit)
    metrics = {}
    if folder is not None:
        metrics = metrics_by_treatment(artifact, graph, diagnosis, folder)
    print_diagnosis(diagnosis, metrics)
    if output is not None:
        facts = {"sha256": sha256_of_file(artifact.path), "metrics": metrics}
        write_report(output, diagnosis, facts)


def _report(built: ModelArtifact) -> None:
    megabytes = built.path.stat().st_size / 1e6
    seconds = built.passport.exporter["seconds"]
    distance = built.passport.worst_parity
    compared = "not compared" if distance is None else f"distance from float32 {distance:.1g}"
    _LOGGER.info("%s: %.1f MB in %.1f s, %s", built.path, megabytes, seconds, compared)


def _kept(reports: Path | None, model: str, precision: EnginePrecision) -> KeepFp32:
    """What the doctor proposes for ``model``; nothing where it was not asked."""
    path = None if reports is None else reports / f"{model}.json"
    if path is None or not path.is_file():
        return KeepFp32()
    return kept_by_report(path, precision)


def _graph(
    source: ModelArtifact, config: EngineConfig, calibration: Path | None, max_images: int
) -> CalibratedGraph | None:
    """The Q/DQ graph that ``config`` needs, if any."""
    precision = config.precision
    if precision != "int8" and precision != "fp8":
        return None
    folder = None if calibration is None else load_coco_folder(calibration)
    return calibrated(source, precision, config.keep_fp32, folder, max_images=max_images)
