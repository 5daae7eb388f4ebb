"""Correct localisation: does the best box of a class that is known to be there lie on an object?

The usual measure of weakly-supervised detection on the training images.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.data.coco import CocoFolder
from weaksam_rt.boxes import box_iou
from weaksam_rt.types import Detections


@dataclass(frozen=True, kw_only=True, slots=True)
class CorLoc:
    """Share of images whose best-scored box of a present class is right, in [0, 1]."""

    by_class: tuple[float, ...]
    """In the order of ``CocoFolder.class_names``; nan where no image has the class."""

    @property
    def mean(self) -> float:
        """Mean over the classes that occur; nan if none does."""
        known = [value for value in self.by_class if not np.isnan(value)]
        return float(np.mean(known)) if known else float("nan")


def corloc(
    folder: CocoFolder, detections: Mapping[int, Detections], *, iou_thresh: float = 0.5
) -> CorLoc:
    """CorLoc of ``detections``; an image without any detection of a present class is a miss.

    Args:
        folder: Truth; crowd boxes count as nothing, and a tag without a box of its class is not
            judged.
        detections: By image id.
        iou_thresh: In (0, 1]; right means an IoU of at least this with any box of the class.

    Source:
        Deselaers, Alexe, Ferrari (IJCV 2012), section 6.
    """
    hits: list[list[bool]] = [[] for _ in folder.class_names]
    for record in folder.records:
        for label in record.tags:
            truth = record.boxes[(record.labels == label) & ~record.is_crowd]
            if len(truth):
                found = detections.get(record.image_id)
                hits[label].append(_is_hit(truth, found, label, iou_thresh))
    return CorLoc(by_class=tuple(float(np.mean(h)) if h else float("nan") for h in hits))


def _is_hit(
    truth: NDArray[np.float32], found: Detections | None, label: int, iou_thresh: float
) -> bool:
    if found is None or not (found.labels == label).any():
        return False
    members = np.flatnonzero(found.labels == label)
    best = members[found.scores[members].argmax()]
    return bool(box_iou(found.boxes[best : best + 1], truth).max(initial=0) >= iou_thresh)
