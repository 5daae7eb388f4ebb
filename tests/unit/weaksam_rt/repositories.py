"""Artifacts whose engines no server will open, and repositories built from them."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from weaksam_rt.artifacts import ModelArtifact, load_artifact, write_manifest
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
from weaksam_rt.model_repository import build_model_repository

NAMES = ("cat", "dog")
SAM = SamParameters(image_size=256, embedding_size=16, embedding_dim=32)
PARAMETERS = {
    DETECTOR: DetectorParameters(image_size=320, num_candidates=50, class_names=NAMES),
    VIT_CLASSIFIER: VitClassifierParameters(
        image_size=224, map_size=14, num_cross_maps=6, class_names=NAMES
    ),
    SAM_IMAGE_ENCODER: SAM,
    SAM_MASK_DECODER: SAM,
}
CONFIG = PipelineConfig(detection=DetectionConfig(score_thresh=0.25))


def artifact(folder, model, parameters=None) -> ModelArtifact:
    """A manifest beside a file that no server will open here."""
    path = folder / model / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"engine of " + model.encode())
    return write_manifest(
        path,
        model=model,
        engine="onnxruntime",
        parameters=parameters or PARAMETERS[model],
        provenance={},
    )


@cache
def _originals() -> tempfile.TemporaryDirectory:
    """Written once: a manifest is flushed to the disk, which takes time."""
    folder = tempfile.TemporaryDirectory(prefix="weaksam-artifacts-")
    atexit.register(folder.cleanup)
    for model in PARAMETERS:
        artifact(Path(folder.name), model)
    return folder


def write_artifacts(folder) -> dict[str, ModelArtifact]:
    shutil.copytree(_originals().name, folder)
    return {model: load_artifact(folder / model) for model in PARAMETERS}


def build(artifacts, output, profile="embedded", **options):
    build_model_repository(
        list(artifacts.values()), output, profile=profile, config=CONFIG, **options
    )
