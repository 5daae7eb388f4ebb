"""COCO's average precision of boxes, by faster-coco-eval (a drop-in for pycocotools)."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray

from training.data.coco import CocoFolder
from weaksam_rt.boxes import box_area, box_xywh_from_xyxy
from weaksam_rt.types import Detections

_LOGGER = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
"""Parts of ``CocoAp.summary``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CocoAp:
    """COCO AP: mean over IoU 0.5 to 0.95, at most 100 boxes an image."""

    summary: Mapping[str, float]
    """By ``METRICS``; each in [0, 1], or -1 where no object of that size exists."""
    by_class: tuple[float, ...]
    """AP in [0, 1] in the order of ``CocoFolder.class_names``; nan where no image has the class."""


def coco_ap(folder: CocoFolder, detections: Mapping[int, Detections]) -> CocoAp:
    """COCO AP of ``detections`` (by image id) on ``folder`` and its parts; 0 without detections."""
    truth, results = coco_truth(folder), coco_results(detections)
    if not results:
        occurring = {a["category_id"] for a in truth["annotations"] if not a["iscrowd"]}
        return CocoAp(
            summary=dict.fromkeys(METRICS, 0.0),
            by_class=tuple(
                0.0 if label + 1 in occurring else float("nan")
                for label in range(len(folder.class_names))
            ),
        )
    api = COCO(truth)
    evaluation = COCOeval_faster(api, api.loadRes(results), "bbox", print_function=_LOGGER.debug)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    stats = evaluation.stats[:6]
    return CocoAp(
        summary={name: float(value) for name, value in zip(METRICS, stats, strict=True)},
        by_class=_by_class(evaluation.eval["precision"]),
    )


def _by_class(precision: NDArray[np.float64]) -> tuple[float, ...]:
    """Mean over thresholds and recalls of [threshold, recall, class, area, limit], for all areas
    and 100 boxes; -1 there means that the class has no object.
    """
    of_classes = precision[:, :, :, 0, -1]
    return tuple(
        float(of_class.mean()) if (of_class > -1).all() else float("nan")
        for of_class in np.moveaxis(of_classes, 2, 0)
    )


def coco_truth(folder: CocoFolder) -> dict[str, Any]:
    """``folder`` as a COCO annotation dict with 1-based class positions as category ids.

    Areas, which decide small, medium and large, are those of the boxes.
    """
    annotations: list[dict[str, Any]] = []
    for record in folder.records:
        for box_xywh, area, label, is_crowd in zip(
            box_xywh_from_xyxy(record.boxes).astype(np.float64).tolist(),
            box_area(record.boxes).tolist(),
            record.labels.tolist(),
            record.is_crowd.tolist(),
            strict=True,
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record.image_id,
                    "category_id": label + 1,
                    "bbox": box_xywh,
                    "area": area,
                    "iscrowd": int(is_crowd),
                }
            )
    return {
        "info": {},
        "images": [
            {"id": r.image_id, "height": r.image_size[0], "width": r.image_size[1]}
            for r in folder.records
        ],
        "categories": [{"id": i + 1, "name": n} for i, n in enumerate(folder.class_names)],
        "annotations": annotations,
    }


def coco_results(detections: Mapping[int, Detections]) -> list[dict[str, Any]]:
    """``detections`` as COCO result entries that fit ``coco_truth``."""
    return [
        {"image_id": image_id, "category_id": label + 1, "bbox": box_xywh, "score": score}
        for image_id, found in detections.items()
        for box_xywh, score, label in zip(
            box_xywh_from_xyxy(found.boxes).astype(np.float64).tolist(),
            found.scores.tolist(),
            found.labels.tolist(),
            strict=True,
        )
    ]
