"""Recall of class-agnostic proposals: which share of the objects has a proposal of its own?"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.data.coco import CocoFolder, ImageRecord
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


class RecallCounter:
    """``proposal_recall`` image by image: holds counts, no boxes."""

    def __init__(self, iou_thresholds: tuple[float, ...] = IOU_THRESHOLDS) -> None:
        self._hits = dict.fromkeys(iou_thresholds, 0)
        self._num_truth = 0
        self._num_images = 0
        self._sizes: Counter[int] = Counter()

    def add(self, record: ImageRecord, boxes: NDArray[np.float32]) -> None:
        """Count the proposals ``boxes`` [n, 4] of one image; none are all of them missed."""
        iou = greedy_matches(box_iou(record.boxes[~record.is_crowd], boxes))
        for thresh in self._hits:
            self._hits[thresh] += int(np.count_nonzero(iou >= thresh))
        self._num_truth += len(iou)
        self._num_images += 1
        self._sizes[len(boxes)] += 1

    def result(self) -> ProposalRecall:
        """Of all images so far."""
        sizes = np.repeat([*self._sizes.keys()], [*self._sizes.values()])
        return ProposalRecall(
            recall={
                thresh: hits / self._num_truth if self._num_truth else float("nan")
                for thresh, hits in self._hits.items()
            },
            num_truth=self._num_truth,
            num_images=self._num_images,
            mean_proposals=float(np.mean(sizes)) if self._num_images else 0.0,
            median_proposals=float(np.median(sizes)) if self._num_images else 0.0,
        )


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
        script in continuous boxes (no added pixel), in counting images without proposals, and in
        leaving crowds out, which VOC's difficult objects are here: the script counts those.
    """
    empty = np.zeros((0, 4), np.float32)
    counter = RecallCounter(iou_thresholds)
    for record in folder.records:
        found = proposals.get(record.image_id)
        counter.add(record, empty if found is None else found.boxes)
    return counter.result()


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
