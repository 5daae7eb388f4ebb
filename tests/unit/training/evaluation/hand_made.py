"""Small data sets and detections written out by hand; images are 100x100."""

from pathlib import Path

import numpy as np

from training.data.coco import CocoFolder, ImageRecord
from weaksam_rt.types import Detections

SIZE = (100, 100)


def record(boxes, labels, is_crowd=None, image_id=1):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return ImageRecord(
        image_id=image_id,
        path=Path("x.jpg"),
        image_size=SIZE,
        boxes=boxes,
        labels=np.array(labels, np.int64),
        is_crowd=np.zeros(len(boxes), bool) if is_crowd is None else np.array(is_crowd, bool),
        segmentations=(),
    )


def folder_of(*records, class_names=("cat", "dog")):
    return CocoFolder(
        root=Path("data"),
        class_names=class_names,
        category_ids=tuple(range(1, 1 + len(class_names))),
        records=records,
    )


def detections_of(boxes, scores, labels):
    return Detections(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.array(scores, np.float32),
        labels=np.array(labels, np.int64),
        image_size=SIZE,
    )
