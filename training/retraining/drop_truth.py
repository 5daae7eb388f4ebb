"""Does RoI drop leave out the right RoIs? Measured where true boxes are known; nothing here is
learnt from.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torchvision.ops import box_iou

from training.data.views import TrueBoxes
from training.retraining.faster_rcnn import SampledRois
from training.retraining.roi_drop import KeptRois, RoiLosses


@dataclass(frozen=True, kw_only=True)
class RoiTruth:
    """What was wrong with the answers that the RoIs were to learn."""

    label_is_wrong: Bool[Tensor, " r"]
    """By the true boxes the RoI shows another class, or background."""
    box_is_wrong: Bool[Tensor, " r"]
    """The RoI is foreground, and its pseudo box is not on a true box of its class."""

    @property
    def mask_is_wrong(self) -> Bool[Tensor, " r"]:
        """The RoI is foreground, and the object that its mask was made for is not there: decided
        by the boxes, not by the masks themselves.
        """
        return self.box_is_wrong


def judge_rois(
    sampled: SampledRois, truth: Sequence[TrueBoxes], *, iou_thresh: float = 0.5
) -> RoiTruth:
    """Compare what RoIs learn with what is there.

    Args:
        sampled: RoIs with labels and boxes from pseudo ground truth.
        truth: By image, in the same frame.
        iou_thresh: In (0, 1]; an RoI shows the class of the true box that it overlaps best and at
            least this much, the rule by which pseudo boxes give RoIs their labels.
    """
    counts = [len(boxes) for boxes in sampled.boxes]
    labels, boxes = [], []
    parts = zip(
        sampled.boxes,
        sampled.labels.split(counts),
        sampled.matched.split(counts),
        truth,
        strict=True,
    )
    for rois, roi_labels, matched, of_image in parts:
        true_boxes = torch.from_numpy(of_image.boxes).to(rois)
        true_labels = torch.from_numpy(of_image.labels).to(roi_labels) + 1
        labels.append(roi_labels != _labels_of(rois, true_boxes, true_labels, iou_thresh))
        is_same_class = roi_labels[:, None] == true_labels
        overlap = torch.where(is_same_class, box_iou(matched, true_boxes), 0.0)
        is_on_object = (overlap >= iou_thresh).any(dim=1)
        boxes.append((roi_labels > 0) & ~is_on_object)
    return RoiTruth(label_is_wrong=torch.cat(labels), box_is_wrong=torch.cat(boxes))


def drop_counts(losses: RoiLosses, kept: KeptRois, truth: RoiTruth | None) -> dict[str, float]:
    """Counts of one step for the log; their sums over steps make ``drop_report``.

    The counts of regression and masks are of foreground RoIs: background has neither to learn.
    """
    foreground = losses.is_foreground
    dropped_labels, dropped_boxes = ~kept.classification, ~kept.regression & foreground
    counts = {
        "num_rois": float(foreground.numel()),
        "num_foreground": _count(foreground),
        "num_dropped_classification": _count(dropped_labels),
        "num_dropped_regression": _count(dropped_boxes),
    }
    if truth is not None:
        counts |= {
            "num_wrong_classification": _count(truth.label_is_wrong),
            "num_wrong_regression": _count(truth.box_is_wrong),
            "num_dropped_wrong_classification": _count(dropped_labels & truth.label_is_wrong),
            "num_dropped_wrong_regression": _count(dropped_boxes & truth.box_is_wrong),
        }
    if losses.mask is not None:
        dropped_masks = ~kept.mask & foreground
        counts["num_dropped_mask"] = _count(dropped_masks)
        if truth is not None:
            counts["num_wrong_mask"] = _count(truth.mask_is_wrong)
            counts["num_dropped_wrong_mask"] = _count(dropped_masks & truth.mask_is_wrong)
    return counts


def drop_report(steps: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What RoI drop did in a run, for its manifest; None where it never was active.

    Args:
        steps: The logged scalars of each step; those without counts are passed over.

    Returns:
        For classification, regression and, with a mask head, masks: how many RoIs could be dropped
        and how many were, and ``evaluation_only``: ``precision``, the share of dropped RoIs that
        were wrong; ``recall``, the share of wrong RoIs that were dropped; ``wrong_share``, the
        share of wrong ones among all, which is the precision of dropping blindly. Shares are in
        [0, 1], None where undefined; the part is None where no truth was given.
    """
    active = [step for step in steps if "num_rois" in step]
    if not active:
        return None
    report: dict[str, Any] = {"num_steps": len(active)}
    populations = {"classification": "num_rois", "regression": "num_foreground"}
    if all("num_dropped_mask" in step for step in active):
        populations["mask"] = "num_foreground"
    for part, population in populations.items():
        num_rois = sum(int(step[population]) for step in active)
        num_dropped = sum(int(step[f"num_dropped_{part}"]) for step in active)
        comparison = None
        if all(f"num_wrong_{part}" in step for step in active):
            num_wrong = sum(int(step[f"num_wrong_{part}"]) for step in active)
            num_both = sum(int(step[f"num_dropped_wrong_{part}"]) for step in active)
            comparison = {
                "precision": _share(num_both, num_dropped),
                "recall": _share(num_both, num_wrong),
                "wrong_share": _share(num_wrong, num_rois),
            }
        report[part] = {
            "num_rois": num_rois,
            "num_dropped": num_dropped,
            "evaluation_only": comparison,
        }
    return report


def _labels_of(
    rois: Tensor, boxes: Tensor, labels: Int64[Tensor, " m"], iou_thresh: float
) -> Int64[Tensor, " r"]:
    """Label of the box that each RoI overlaps best, or 0 below the threshold."""
    if len(boxes) == 0:
        return torch.zeros(len(rois), dtype=labels.dtype, device=labels.device)
    best = box_iou(rois, boxes).max(dim=1)
    return torch.where(best.values >= iou_thresh, labels[best.indices], 0)


def _count(mask: Tensor) -> float:
    return float(mask.sum())


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
