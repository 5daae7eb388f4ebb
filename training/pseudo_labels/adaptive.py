"""Adaptive pseudo ground truth: which detections of a tagged image are trusted enough to train on?

Knows the detections and tags of one image, and no truth. ``top_1`` and ``above_threshold`` are the
baselines.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.boxes import Boxes, box_containment
from weaksam_rt.types import Detections


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveConfig:
    """Thresholds of the adaptive choice."""

    score_thresh: float = 0.3
    """Keep scores above this, in [0, 1), after scaling each class's scores in the image to
    [0, 1]. 0.3 for VOC07; the released parser's default is 0.5."""
    containment_thresh: float = 0.85
    """Drop a box when at least this share of it, in (0, 1], lies in another kept one of its
    class."""

    def __post_init__(self) -> None:
        if not 0 <= self.score_thresh < 1 or not 0 < self.containment_thresh <= 1:
            raise ValueError(
                f"score_thresh must be in [0, 1) and containment_thresh in (0, 1], got "
                f"{self.score_thresh} and {self.containment_thresh}"
            )


def select_pseudo_labels(
    detections: Detections, image_labels: NDArray[np.integer[Any]], config: AdaptiveConfig
) -> Detections:
    """Keep the detections trusted enough to retrain on.

    The threshold adapts: it is relative to the best and worst score of the class in the image.

    Args:
        detections: After suppression of overlaps, in any order.
        image_labels: 0-based classes present in the image; may be empty.
        config: Thresholds.

    Returns:
        A subset, best score first: at least one box for each present class that has a detection.

    Source:
        WeakSAM (arXiv:2402.14812), algorithm 2. Differs from the released script in subtracting
        the minimum (as the paper does) and in that of two boxes that contain each other the better
        one stays.
    """
    kept = [np.zeros(0, np.int64)]
    for label in np.unique(image_labels):
        members = np.flatnonzero(detections.labels == label)
        trusted = members[relative_scores(detections.scores[members]) > config.score_thresh]
        kept.append(
            trusted[
                not_contained(
                    detections.boxes[trusted], detections.scores[trusted], config.containment_thresh
                )
            ]
        )
    return _take_best_first(detections, np.concatenate(kept))


def top_1(detections: Detections, image_labels: NDArray[np.integer[Any]]) -> Detections:
    """Baseline: the best detection of each present class."""
    best = []
    for label in np.unique(image_labels):
        members = np.flatnonzero(detections.labels == label)
        if len(members):
            best.append(members[detections.scores[members].argmax()])
    return _take_best_first(detections, np.array(best, np.int64))


def above_threshold(
    detections: Detections, image_labels: NDArray[np.integer[Any]], score_thresh: float
) -> Detections:
    """Baseline: detections of present classes with a score of at least ``score_thresh``."""
    present = np.isin(detections.labels, image_labels)
    return _take_best_first(
        detections, np.flatnonzero(present & (detections.scores >= score_thresh))
    )


def relative_scores(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores scaled so that the least is 0 and the best 1; all 1 where they are equal."""
    if len(scores) == 0 or scores.max() == scores.min():
        return np.ones_like(scores)
    return (scores - scores.min()) / (scores.max() - scores.min())


def not_contained(
    boxes: Boxes, scores: NDArray[np.float32], containment_thresh: float
) -> NDArray[np.bool_]:
    """Which boxes of one class, [n], lie in no other one.

    Of two that contain each other the better one (then the earlier) stays. Never empties a list.
    """
    if len(boxes) == 0:
        return np.zeros(0, dtype=bool)
    inside = box_containment(boxes, boxes) >= containment_thresh
    np.fill_diagonal(inside, val=False)
    rank = np.empty(len(scores), np.int64)
    rank[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    loses = inside & ~(inside.T & (rank[:, None] < rank[None, :]))
    stays = ~loses.any(axis=1)
    if not stays.any():
        stays[scores.argmax()] = True
    return stays


def _take_best_first(detections: Detections, index: NDArray[np.int64]) -> Detections:
    return detections.take(index[np.argsort(-detections.scores[index], kind="stable")])
