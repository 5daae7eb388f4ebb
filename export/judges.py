"""Whether new engines are as good as the served ones: one ``Judge`` for each kind of release.

A judge knows its task metrics and the settings that decide them; it knows no server.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from export.exportable import Exportable
from export.task_metrics import classifier_tag_ap, detector_ap50, sam_mask_iou
from training.data.coco import CocoFolder, ImageRecord
from training.engine.stage import fingerprint
from weaksam_rt.artifacts import METRIC_NAMES, ModelArtifact, write_manifest
from weaksam_rt.backends.engines import open_engine
from weaksam_rt.backends.local import ModelFunction
from weaksam_rt.config import DetectionConfig, PipelineConfig
from weaksam_rt.contracts import (
    DETECTOR,
    SAM_IMAGE_ENCODER,
    SAM_MASK_DECODER,
    VIT_CLASSIFIER,
    DetectorParameters,
    SamParameters,
    VitClassifierParameters,
)
from weaksam_rt.errors import ReleaseError

Engines = Mapping[str, ModelArtifact]
"""By model."""
Metrics = Mapping[str, float]
"""By key of ``METRIC_NAMES``, in [0, 1], higher is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """How engines that are released together are measured."""

    models: tuple[str, ...]
    measure: Callable[[Engines, CocoFolder, PipelineConfig], Metrics]
    """The task metrics of the engines on a folder's images."""
    truth: str
    """What it compares answers with, in words."""
    has_truth: Callable[[ImageRecord], bool]
    """Whether an image has it."""
    settings: Callable[[PipelineConfig], dict[str, Any]] = lambda config: {}
    """Those of the pipeline on which the metrics depend."""


def judge_of(exportables: Sequence[Exportable]) -> Judge:
    """The judge of what is released together.

    Raises:
        ReleaseError: These models are not released together.
    """
    models = {exportable.model for exportable in exportables}
    for judge in JUDGES:
        if set(judge.models) == models:
            return judge
    kinds = "; ".join(" with ".join(judge.models) for judge in JUDGES)
    raise ReleaseError(f"{sorted(models)} are not released together; a release takes {kinds}")


def check_data(judge: Judge, folder: CocoFolder) -> None:
    """Raise ``ValueError`` where ``folder`` has nothing to compare the engines' answers with."""
    if not any(map(judge.has_truth, folder.records)):
        raise ValueError(
            f"no image of {folder.root} has {judge.truth}, so {' and '.join(judge.models)} cannot "
            "be judged on it; give --data with images that have"
        )


def measured(judge: Judge, engines: Engines, folder: CocoFolder, config: PipelineConfig) -> Metrics:
    """What the passports say if they were measured on the same data and settings, else
    ``judge.measure``.
    """
    wanted = _identity(judge, folder, config)
    known = [engine.passport.task_metrics for engine in engines.values()]
    if all({key: k.get(key) for key in wanted} == wanted and k == known[0] for k in known):
        found = {name: float(known[0][name]) for name in METRIC_NAMES if name in known[0]}
        if found:
            return found
    return judge.measure(engines, folder, config)


def with_metrics(
    judge: Judge, engines: Engines, metrics: Metrics, folder: CocoFolder, config: PipelineConfig
) -> dict[str, ModelArtifact]:
    """The same artifacts, with their task metrics in the passports on disk."""
    content = {**metrics, **_identity(judge, folder, config)}
    return {
        model: write_manifest(
            engine.path,
            model=engine.model,
            engine=engine.engine,
            parameters=engine.parameters,
            provenance=replace(engine.passport, task_metrics=content),
        )
        for model, engine in engines.items()
    }


def losses(metrics: Metrics, live: Metrics, max_loss: float) -> list[str]:
    """Each metric that is more than ``max_loss`` below the live version's, in words; empty: none.

    What is no number counts as lost.
    """
    return [
        f"{METRIC_NAMES[name]} is {100 * metrics[name]:.2f}, the live version has "
        f"{100 * live[name]:.2f} and {100 * max_loss:.2f} may be lost"
        for name in live
        if not metrics[name] >= live[name] - max_loss
    ]


def in_words(metrics: Metrics) -> str:
    """Metrics in percent."""
    return ", ".join(f"{METRIC_NAMES[name]} {100 * value:.2f}" for name, value in metrics.items())


def _identity(judge: Judge, folder: CocoFolder, config: PipelineConfig) -> dict[str, Any]:
    return {
        "data": fingerprint(folder.root),
        "num_images": len(folder.records),
        **judge.settings(config),
    }


# ---------------------------------------------------------------------------------------------
# The metrics
# ---------------------------------------------------------------------------------------------


def ap50_of_engine(artifact: ModelArtifact, folder: CocoFolder, config: DetectionConfig) -> float:
    """``detector_ap50`` of a detector's engine, which runs in this process."""
    parameters = artifact.parameters
    assert isinstance(parameters, DetectorParameters)
    return detector_ap50(_opened(artifact), parameters, folder, config)["AP50"]


def _opened(artifact: ModelArtifact) -> ModelFunction:
    return open_engine(artifact, num_threads=1)


def _detector_metrics(engines: Engines, folder: CocoFolder, config: PipelineConfig) -> Metrics:
    return {"ap50": ap50_of_engine(engines[DETECTOR], folder, config.detection)}


def _classifier_metrics(engines: Engines, folder: CocoFolder, config: PipelineConfig) -> Metrics:
    del config
    artifact = engines[VIT_CLASSIFIER]
    assert isinstance(artifact.parameters, VitClassifierParameters)
    found = classifier_tag_ap(_opened(artifact), artifact.parameters, folder)
    return {"tag_ap": found["tag AP"]}


def _sam_metrics(engines: Engines, folder: CocoFolder, config: PipelineConfig) -> Metrics:
    del config
    encoder, decoder = engines[SAM_IMAGE_ENCODER], engines[SAM_MASK_DECODER]
    assert isinstance(encoder.parameters, SamParameters)
    found = sam_mask_iou(_opened(encoder), _opened(decoder), encoder.parameters, folder)
    return {
        "mask_iou_point": found["mask IoU (point)"],
        "mask_iou_box": found["mask IoU (box)"],
    }


JUDGES = (
    Judge(
        models=(DETECTOR,),
        measure=_detector_metrics,
        truth="true boxes",
        has_truth=lambda record: record.has_known_boxes and len(record.boxes) > 0,
        settings=lambda config: {
            "nms_thresh": config.detection.nms_thresh,
            "max_detections": config.detection.max_detections,
        },
    ),
    Judge(
        models=(VIT_CLASSIFIER,),
        measure=_classifier_metrics,
        truth="tags",
        has_truth=lambda record: len(record.tags) > 0,
    ),
    Judge(
        models=(SAM_IMAGE_ENCODER, SAM_MASK_DECODER),
        measure=_sam_metrics,
        truth="true masks",
        has_truth=lambda record: record.has_masks,
    ),
)
"""What can be released, and what is released together: half a SAM has no answers of its own."""
