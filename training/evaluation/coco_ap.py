"""COCO's average precision of boxes and masks, by faster-coco-eval (a drop-in for pycocotools)."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray

from training.data.coco import CocoFolder, ImageRecord
from training.evaluation.voc_ap import Shape
from weaksam_rt.boxes import box_area, box_xywh_from_xyxy
from weaksam_rt.masks import rle_areas
from weaksam_rt.types import Detections, InstanceMasks

_LOGGER = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
"""Parts of ``CocoAp.summary``."""

_COCO_NAMES: Mapping[Shape, str] = {"box": "bbox", "mask": "segm"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CocoAp:
    """COCO AP: mean over IoU 0.5 to 0.95, at most 100 boxes an image."""

    summary: Mapping[str, float]
    """By ``METRICS``; each in [0, 1], or nan where no object of that size exists."""
    by_class: tuple[float, ...]
    """AP in [0, 1] in the order of ``CocoFolder.class_names``; nan where no image has the class."""


def coco_ap(
    folder: CocoFolder, detections: Mapping[int, Detections], *, shape: Shape = "box"
) -> CocoAp:
    """COCO AP of ``detections`` (by image id) on ``folder`` and its parts; 0 without detections,
    nan without objects.

    Raises:
        ValueError: Masks are compared and a record or a detection has none.
    """
    truth, results = coco_truth(folder, shape=shape), coco_results(detections, shape=shape)
    if not results:
        occurring = {a["category_id"] for a in truth["annotations"] if not a["iscrowd"]}
        return CocoAp(
            summary=dict.fromkeys(METRICS, 0.0 if occurring else float("nan")),
            by_class=tuple(
                0.0 if label + 1 in occurring else float("nan")
                for label in range(len(folder.class_names))
            ),
        )
    api = COCO(truth)
    evaluation = COCOeval_faster(
        api, api.loadRes(results), _COCO_NAMES[shape], print_function=_LOGGER.debug
    )
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    stats = evaluation.stats[:6]
    return CocoAp(
        summary={
            name: float(value) if value >= 0 else float("nan")
            for name, value in zip(METRICS, stats, strict=True)
        },
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


def coco_truth(folder: CocoFolder, *, shape: Shape = "box") -> dict[str, Any]:
    """``folder`` as a COCO annotation dict with 1-based class positions as category ids.

    Areas, which decide small, medium and large, are those of the boxes or masks compared.
    """
    annotations: list[dict[str, Any]] = []
    for record in folder.records:
        for more, label, is_crowd in zip(
            _true_boxes(record) if shape == "box" else _true_masks(record),
            record.labels.tolist(),
            record.is_crowd.tolist(),
            strict=True,
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record.image_id,
                    "category_id": label + 1,
                    "iscrowd": int(is_crowd),
                    **more,
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


def coco_results(
    detections: Mapping[int, Detections], *, shape: Shape = "box"
) -> list[dict[str, Any]]:
    """``detections`` as COCO result entries that fit ``coco_truth``."""
    return [
        {"image_id": image_id, "category_id": label + 1, "score": score, **more}
        for image_id, found in detections.items()
        for more, label, score in zip(
            _found_boxes(found) if shape == "box" else _found_masks(image_id, found),
            found.labels.tolist(),
            found.scores.tolist(),
            strict=True,
        )
    ]


def _true_boxes(record: ImageRecord) -> list[dict[str, Any]]:
    areas = box_area(record.boxes).tolist()
    return [{"bbox": b, "area": a} for b, a in zip(_xywh(record.boxes), areas, strict=True)]


def _true_masks(record: ImageRecord) -> list[dict[str, Any]]:
    masks = InstanceMasks(rle_counts=record.rle_counts(), image_size=record.image_size)
    return [
        {"bbox": box, "area": area, **mask}
        for box, area, mask in zip(
            _xywh(record.boxes), rle_areas(masks).tolist(), _segmentations(masks), strict=True
        )
    ]


def _found_boxes(found: Detections) -> list[dict[str, Any]]:
    return [{"bbox": box} for box in _xywh(found.boxes)]


def _found_masks(image_id: int, found: Detections) -> list[dict[str, Any]]:
    """Without boxes: an evaluator that finds one takes the box's area for the mask's."""
    if found.masks is None:
        raise ValueError(f"the detections of image {image_id} have no masks; detect with masks")
    return _segmentations(found.masks)


def _segmentations(masks: InstanceMasks) -> list[dict[str, Any]]:
    size = list(masks.image_size)
    return [
        {"segmentation": {"size": size, "counts": counts.decode("ascii")}}
        for counts in masks.rle_counts
    ]


def _xywh(boxes: NDArray[np.float32]) -> list[list[float]]:
    xywh: list[list[float]] = box_xywh_from_xyxy(boxes).astype(np.float64).tolist()
    return xywh
