"""Turn detections of tagged images into boxes to train on:
``python -m training.generate_pseudo_labels --help``.

Writes ``instances.json`` in COCO format (the same images, categories and ids as the data set;
each annotation has a ``score``) and ``pictures.jpg``. The true boxes of the data set are compared
with, never copied.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from training.data.bad_images import usable_images
from training.data.coco import CocoFolder, load_coco_folder
from training.data.results import read_detections
from training.engine.stage import open_stage
from training.evaluation.pictures import Picture, save_contact_sheet
from training.evaluation.recall import greedy_matches
from training.pseudo_labels.adaptive import (
    AdaptiveConfig,
    above_threshold,
    select_pseudo_labels,
    top_1,
)
from weaksam_rt.boxes import box_area, box_iou, box_xywh_from_xyxy
from weaksam_rt.files import write_json
from weaksam_rt.types import Detections

_LOGGER = logging.getLogger(__name__)

ANNOTATIONS_NAME = "instances.json"


@dataclass(frozen=True, kw_only=True)
class PseudoLabelRecipe:
    """Everything that decides the boxes, besides the detections."""

    method: Literal["adaptive", "top_1", "threshold"] = "adaptive"
    """adaptive: WeakSAM's choice. top_1 and threshold are baselines."""
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    fixed_thresh: float = 0.5
    """threshold: least score, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class PseudoLabelConfig:
    """Choose the detections to train on."""

    data: Path
    """Folder with ``images/`` and ``instances.json``; only tags decide."""
    detections: Path
    """Detections of its images (COCO results)."""
    output: Path
    """Folder of this stage."""
    recipe: PseudoLabelRecipe = field(default_factory=PseudoLabelRecipe)
    num_pictures: int = 25
    """Images on the contact sheet."""
    skip_bad: bool = False
    """Leave unreadable images out, here and in all that learns from the result, and list them in
    the manifest."""


def main(config: PseudoLabelConfig) -> None:
    """Run the stage."""
    stage = open_stage(
        "generate_pseudo_labels",
        config.output,
        config=config.recipe,
        inputs={"data": config.data, "detections": config.detections},
    )
    if stage.finished:
        return
    loaded = load_coco_folder(config.data)
    usable = usable_images(loaded, skip_bad=config.skip_bad)
    folder = usable.folder
    detections = read_detections(config.detections, folder=loaded)
    labels = choose(folder, detections, config.recipe)
    write_json(stage.directory / ANNOTATIONS_NAME, coco_annotations(config.data, folder, labels))
    _save_pictures(stage.directory / "pictures.jpg", folder, labels, config.num_pictures)
    metrics = {**statistics(folder, labels), "skipped": usable.skipped}
    _LOGGER.info("%s", json.dumps(metrics, indent=2))
    stage.finish(outputs=[ANNOTATIONS_NAME], metrics=metrics)


def choose(
    folder: CocoFolder, detections: Mapping[int, Detections], recipe: PseudoLabelRecipe
) -> dict[int, Detections]:
    """The pseudo boxes of every image, by image id; only ``tags`` of the records are read."""
    return {
        record.image_id: _choose(
            detections[record.image_id], np.array(record.tags, np.int64), recipe
        )
        for record in folder.records
    }


def coco_annotations(
    root: Path, folder: CocoFolder, labels: Mapping[int, Detections]
) -> dict[str, Any]:
    """A COCO annotation file with the images and categories of ``root`` and the pseudo boxes."""
    source = json.loads((root / "instances.json").read_text())
    annotations: list[dict[str, Any]] = []
    for image_id, found in labels.items():
        for box_xywh, area, score, label in zip(
            box_xywh_from_xyxy(found.boxes).astype(np.float64).round(3).tolist(),
            box_area(found.boxes).tolist(),
            found.scores.tolist(),
            found.labels.tolist(),
            strict=True,
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": folder.category_ids[label],
                    "bbox": box_xywh,
                    "area": area,
                    "iscrowd": 0,
                    "score": score,
                }
            )
    return {
        "images": [image for image in source["images"] if image["id"] in labels],
        "categories": source["categories"],
        "annotations": annotations,
    }


def statistics(folder: CocoFolder, labels: Mapping[int, Detections]) -> dict[str, Any]:
    """Counts of pseudo boxes over the set, by class and by image, and how good they are where true
    boxes are known.

    ``evaluation_only`` compares with the truth at IoU 0.5 by class; it is None for a set without
    true boxes.
    """
    by_class = {
        name: _class_statistics(folder, labels, label)
        for label, name in enumerate(folder.class_names)
    }
    boxes_of_images = [len(labels[record.image_id]) for record in folder.records]
    num_truth = sum(of_class.num_truth for of_class in by_class.values())
    num_right = sum(of_class.num_right for of_class in by_class.values())
    num_boxes = sum(boxes_of_images)
    return {
        "num_boxes": num_boxes,
        "boxes_per_image": num_boxes / max(1, len(folder.records)),
        "images_without_boxes": boxes_of_images.count(0),
        "images_by_number_of_boxes": {
            str(count): boxes_of_images.count(count) for count in sorted(set(boxes_of_images))
        },
        "boxes_per_class": {name: of_class.num_boxes for name, of_class in by_class.items()},
        "by_class": {
            name: of_class.as_json(is_truth_known=num_truth > 0)
            for name, of_class in by_class.items()
        },
        "evaluation_only": _comparison(num_right, num_boxes, num_truth) if num_truth else None,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _ClassStatistics:
    num_boxes: int
    num_tagged_images: int
    num_tagged_images_without_box: int
    mean_score: float | None
    mean_share_of_image: float | None
    """Area of a box over that of its image."""
    num_right: int
    num_truth: int

    def as_json(self, *, is_truth_known: bool) -> dict[str, Any]:
        comparison = _comparison(self.num_right, self.num_boxes, self.num_truth)
        return {
            "num_boxes": self.num_boxes,
            "num_tagged_images": self.num_tagged_images,
            "num_tagged_images_without_box": self.num_tagged_images_without_box,
            "mean_score": self.mean_score,
            "mean_share_of_image": self.mean_share_of_image,
            "evaluation_only": comparison if is_truth_known else None,
        }


def _class_statistics(
    folder: CocoFolder, labels: Mapping[int, Detections], label: int
) -> _ClassStatistics:
    scores: list[float] = []
    shares: list[float] = []
    num_tagged, num_empty, num_right, num_truth = 0, 0, 0, 0
    for record in folder.records:
        found = labels[record.image_id].take(labels[record.image_id].labels == label)
        truth = record.boxes[(record.labels == label) & ~record.is_crowd]
        scores += found.scores.tolist()
        height, width = record.image_size
        shares += (box_area(found.boxes) / (height * width)).tolist()
        num_tagged += label in record.tags
        num_empty += label in record.tags and len(found) == 0
        num_right += int((greedy_matches(box_iou(truth, found.boxes)) >= 0.5).sum())
        num_truth += len(truth)
    return _ClassStatistics(
        num_boxes=len(scores),
        num_tagged_images=num_tagged,
        num_tagged_images_without_box=num_empty,
        mean_score=float(np.mean(scores)) if scores else None,
        mean_share_of_image=float(np.mean(shares)) if shares else None,
        num_right=num_right,
        num_truth=num_truth,
    )


def _comparison(num_right: int, num_boxes: int, num_truth: int) -> dict[str, Any]:
    return {
        "precision_iou50": num_right / num_boxes if num_boxes else 0.0,
        "recall_iou50": num_right / num_truth if num_truth else 0.0,
        "num_true_boxes": num_truth,
    }


def _choose(found: Detections, tags: NDArray[np.int64], recipe: PseudoLabelRecipe) -> Detections:
    if recipe.method == "adaptive":
        return select_pseudo_labels(found, tags, recipe.adaptive)
    if recipe.method == "top_1":
        return top_1(found, tags)
    return above_threshold(found, tags, recipe.fixed_thresh)


def _save_pictures(
    path: Path, folder: CocoFolder, labels: Mapping[int, Detections], num_pictures: int
) -> None:
    stride = max(1, len(folder.records) // max(1, num_pictures))
    pictures = [
        Picture(image=record.image(), detections=labels[record.image_id], truth_boxes=record.boxes)
        for record in folder.records[::stride][:num_pictures]
    ]
    save_contact_sheet(path, pictures, class_names=folder.class_names)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(tyro.cli(PseudoLabelConfig, description=__doc__))
