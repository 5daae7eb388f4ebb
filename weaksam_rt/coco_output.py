"""Detections and proposals of named files as one COCO data set, which every labelling tool
reads.
"""

from dataclasses import dataclass
from typing import Any

from weaksam_rt.boxes import box_area, box_xywh_from_xyxy
from weaksam_rt.types import Detections, ImageSize, InstanceMasks


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledImage:
    """The instances of one file."""

    file_name: str
    detections: Detections
    label_names: tuple[str, ...]
    """The class name of each detection."""


def coco_dataset(images: list[LabelledImage]) -> dict[str, Any]:
    """A COCO data set of JSON values: images, annotations with ``score``, categories seen.

    Ids start at 1. Category ids are the model's 0-based labels plus 1; boxes are rounded to
    hundredths of a pixel.
    """
    categories = {
        int(label) + 1: name
        for image in images
        for label, name in zip(image.detections.labels, image.label_names, strict=True)
    }
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, start=1):
        for annotation in _annotations(image.detections, image_id):
            annotations.append({"id": len(annotations) + 1, **annotation})
    return {
        "images": [
            _image(image_id, image.file_name, image.detections.image_size)
            for image_id, image in enumerate(images, start=1)
        ],
        "annotations": annotations,
        "categories": [{"id": id_, "name": name} for id_, name in sorted(categories.items())],
    }


def _image(image_id: int, file_name: str, image_size: ImageSize) -> dict[str, Any]:
    height, width = image_size
    return {"id": image_id, "file_name": file_name, "height": height, "width": width}


def _annotations(detections: Detections, image_id: int) -> list[dict[str, Any]]:
    boxes_xywh = box_xywh_from_xyxy(detections.boxes)
    areas = box_area(detections.boxes)
    return [
        {
            "image_id": image_id,
            "category_id": int(detections.labels[i]) + 1,
            "bbox": [round(float(v), 2) for v in boxes_xywh[i]],
            "area": round(float(areas[i]), 2),
            "score": round(float(detections.scores[i]), 4),
            "iscrowd": 0,
            **_segmentation(detections.masks, i),
        }
        for i in range(len(detections))
    ]


def _segmentation(masks: InstanceMasks | None, index: int) -> dict[str, Any]:
    if masks is None:
        return {}
    counts = masks.rle_counts[index].decode("ascii")
    return {"segmentation": {"counts": counts, "size": list(masks.image_size)}}
