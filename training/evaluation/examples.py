"""Which images show best what a detector can and cannot do?"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from training.data.coco import CocoFolder, ImageRecord
from training.evaluation.voc_ap import IGNORED, RIGHT, match_by_class
from weaksam_rt.types import Detections


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageQuality:
    """How good the detections of one image are."""

    num_right: int
    num_wrong: int
    num_missed: int

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall, in [0, 1]; nan where there is nothing to find and
        nothing was found.
        """
        total = 2 * self.num_right + self.num_wrong + self.num_missed
        return 2 * self.num_right / total if total else float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Positions in ``CocoFolder.records``; no image is in both."""

    best: tuple[int, ...]
    """Best first."""
    worst: tuple[int, ...]
    """Worst first."""


def image_quality(
    record: ImageRecord, found: Detections, *, score_thresh: float, iou_thresh: float = 0.5
) -> ImageQuality:
    """Count what is right, wrong and missed in one image.

    Args:
        record: Truth; finding a crowd box of the right class is neither right nor wrong.
        found: Detections of the image.
        score_thresh: Detections below it, in [0, 1], do not count.
        iou_thresh: In (0, 1], with a true box of the class.
    """
    confident = found.take(found.scores >= score_thresh)
    confident = confident.take(np.argsort(-confident.scores, kind="stable"))
    outcome = match_by_class(record, confident, iou_thresh)
    num_right = int((outcome == RIGHT).sum())
    return ImageQuality(
        num_right=num_right,
        num_wrong=int(((outcome != RIGHT) & (outcome != IGNORED)).sum()),
        num_missed=int((~record.is_crowd).sum()) - num_right,
    )


def choose_examples(
    folder: CocoFolder, detections: Mapping[int, Detections], *, count: int, score_thresh: float
) -> Examples:
    """The ``count`` best and worst images by their F1, at equal F1 those with more objects first.

    Images with nothing to find and nothing found are left out, and those whose boxes are not known;
    where there are fewer than twice ``count``, the better half is best.
    """
    ranked = []
    for index, record in enumerate(folder.records):
        if not record.has_known_boxes:
            continue
        found = detections.get(record.image_id, Detections.empty(record.image_size))
        f1 = image_quality(record, found, score_thresh=score_thresh).f1
        if not np.isnan(f1):
            ranked.append((f1, len(record.boxes), index))
    share = min(count, -(-len(ranked) // 2))
    best = [index for *_, index in sorted(ranked, key=lambda r: (-r[0], -r[1], r[2]))[:share]]
    others = [entry for entry in ranked if entry[2] not in best]
    worst = [index for *_, index in sorted(others, key=lambda r: (r[0], -r[1], r[2]))[:share]]
    return Examples(best=tuple(best), worst=tuple(worst))
