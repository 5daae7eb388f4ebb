"""Recall of class-agnostic proposals: which share of the objects has a proposal of its own?"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.data.coco import CocoFolder
from weaksam_rt.boxes import box_iou
from weaksam_rt.types import Proposals

IOU_THRESHOLDS = (0.5, 0.6, 0.75, 0.9)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProposalRecall:
    """How well the proposals of a data set cover its objects."""

    recall: dict[float, float]
    """Share of the true boxes that are matched, by IoU threshold; nan without true boxes."""
    num_truth: int
    num_images: int
    mean_proposals: float
    """Proposals per image."""
    median_proposals: float


def proposal_recall(
    folder: CocoFolder,
    proposals: Mapping[int, Proposals],
    *,
    iou_thresholds: tuple[float, ...] = IOU_THRESHOLDS,
) -> ProposalRecall:
    """Recall of ``proposals`` on the boxes of ``folder`` of any class, crowds left out.

    A proposal serves one object only. Images without proposals count with all their objects
    missed.

    Source:
        WeakSAM (arXiv:2402.14812) evaluates by such a greedy matching; differs from its released
        script in continuous boxes (no added pixel) and in counting images without proposals.
    """
    empty = np.zeros((0, 4), np.float32)
    counts, matched = [], [np.zeros(0, np.float32)]
    for record in folder.records:
        found = proposals.get(record.image_id)
        boxes = empty if found is None else found.boxes
        counts.append(len(boxes))
        matched.append(greedy_matches(box_iou(record.boxes[~record.is_crowd], boxes)))
    iou = np.concatenate(matched)
    return ProposalRecall(
        recall={t: float((iou >= t).mean()) if len(iou) else float("nan") for t in iou_thresholds},
        num_truth=len(iou),
        num_images=len(folder.records),
        mean_proposals=float(np.mean(counts)) if counts else 0.0,
        median_proposals=float(np.median(counts)) if counts else 0.0,
    )


def greedy_matches(iou: NDArray[np.float32]) -> NDArray[np.float32]:
    """IoU of each true box with the proposal it gets, [n], when the best pair of all is matched
    first, then the best of the rest; 0 for a box that gets none.

    Args:
        iou: [n, m], true boxes by proposals, in [0, 1].
    """
    remaining = iou.copy()
    matched = np.zeros(len(iou), np.float32)
    for _ in range(min(iou.shape)):
        truth, proposal = np.unravel_index(remaining.argmax(), remaining.shape)
        if remaining[truth, proposal] <= 0:
            break
        matched[truth] = remaining[truth, proposal]
        remaining[truth, :] = -1
        remaining[:, proposal] = -1
    return matched
