"""A detector's own detections on its training images: ``python -m training.relabel --help``.

Pseudo ground truth from these detections (``training.generate_pseudo_labels``) is better than from
the multiple-instance detector's: the detector has seen whole objects of many images by then.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from rich.logging import RichHandler

from training.data.bad_images import usable_images
from training.data.coco import load_coco_folder
from training.data.results import write_detections
from training.detect import detect_folder
from training.distributed import DeviceName, choose_device
from training.engine.stage import open_stage
from training.evaluate import summary, write_report
from training.models.detector_adapter import DetectorAdapter
from training.retrain_detector import DETECTIONS_NAME, load_detector
from weaksam_rt.config import DetectionConfig


@dataclass(frozen=True, kw_only=True)
class RelabelConfig:
    """Detect on a data set with a trained detector, through the graph that is served."""

    data: Path
    """Folder with ``images/`` and ``instances.json``; boxes are used for the report only."""
    detector: Path
    """``detector.safetensors`` of ``training.retrain_detector``."""
    output: Path
    """Folder of this stage."""
    detection: DetectionConfig = field(
        default_factory=lambda: DetectionConfig(score_thresh=0.01, nms_thresh=0.3)
    )
    """Thresholds; low, because the pseudo labels are chosen later."""
    device: DeviceName = "cpu"
    """Where the detector runs."""
    skip_bad: bool = False
    """Leave unreadable images out and list them in the manifest."""


def relabel(config: RelabelConfig) -> None:
    """Run the stage."""
    inputs = {"data": config.data, "detector": config.detector}
    stage = open_stage("relabel", config.output, config=config.detection, inputs=inputs)
    if stage.finished:
        return
    usable = usable_images(load_coco_folder(config.data), skip_bad=config.skip_bad)
    folder = usable.folder
    model, class_names = load_detector(config.detector)
    if class_names != folder.class_names:
        raise ValueError(
            f"the detector knows {list(class_names)}, {config.data} has {list(folder.class_names)}"
        )
    device = torch.device(choose_device(config.device))
    found = detect_folder(
        DetectorAdapter(model).to(device),
        folder,
        image_size=model.config.image_size,
        config=config.detection,
        device=device,
    )
    write_detections(stage.directory / DETECTIONS_NAME, found, folder=folder)
    report = summary(write_report(stage.directory, folder, found))
    metrics = {"evaluation_only": report, "skipped": usable.skipped}
    stage.finish(outputs=[DETECTIONS_NAME], metrics=metrics)


def main(config: tyro.conf.OmitArgPrefixes[RelabelConfig]) -> None:
    """Command line entry."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])
    relabel(config)


if __name__ == "__main__":
    tyro.cli(main)
