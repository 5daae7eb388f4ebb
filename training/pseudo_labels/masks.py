"""Pseudo instance masks: which of SAM's masks of a pseudo box is learnt from, and how good it is.

Knows the answers of SAM and, to measure only, true masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from training.data.coco import ImageRecord
from weaksam_rt.boxes import box_area, box_iou
from weaksam_rt.masks import rle_areas, rle_iou
from weaksam_rt.types import InstanceMasks, SegmentResult

MaskOutput = Literal["single", "best_predicted"]
"""single: SAM's answer to an unambiguous prompt, which a box is. best_predicted: of its three
answers to an ambiguous one, that of the highest predicted IoU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BoxMasks:
    """One mask for each of n pseudo boxes of an image."""

    masks: InstanceMasks
    predicted_iou: NDArray[np.float32]
    """[n], SAM's own estimate, about [0, 1]."""
    mask_boxes: NDArray[np.float32]
    """[n, 4], XYXY, tight around each mask; zeros for an empty one."""

    def __len__(self) -> int:
        return len(self.masks)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskTruth:
    """Pseudo masks of one image beside the true masks of the objects that their boxes found."""

    iou: NDArray[np.float32]
    """[k], of each matched pseudo mask with the true mask, in [0, 1]."""
    filled_box_iou: NDArray[np.float32]
    """[k], of the filled pseudo box with the same true mask: what needs no SAM."""
    labels: NDArray[np.int64]
    """[k], their classes."""


def choose_masks(result: SegmentResult) -> BoxMasks:
    """The mask of the highest predicted IoU of each prompt; of one mask per prompt that one.

    Args:
        result: Of n box prompts on one image, with one or three masks each.
    """
    best = result.scores.argmax(axis=1) if len(result.scores) else np.zeros(0, np.int64)
    rows = np.arange(len(best))
    counts = tuple(result.mask_counts[row][column] for row, column in zip(rows, best, strict=True))
    return BoxMasks(
        masks=InstanceMasks(rle_counts=counts, image_size=result.image_size),
        predicted_iou=result.scores[rows, best],
        mask_boxes=result.boxes[rows, best],
    )


def compare_with_truth(
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    masks: InstanceMasks,
    truth: ImageRecord,
    *,
    iou_thresh: float = 0.5,
) -> MaskTruth:
    """Compare pseudo masks with the true masks of the objects that their boxes lie on.

    Args:
        boxes: [n, 4], XYXY, pseudo boxes of the image.
        labels: [n], their classes.
        masks: n of them.
        truth: With masks; crowds are no objects.
        iou_thresh: In (0, 1]; a pseudo box and a true box of its class are matched, best pair
            first and one to one, when their *boxes* overlap at least this much.
    """
    objects = np.flatnonzero(~truth.is_crowd)
    overlap = box_iou(boxes, truth.boxes[objects])
    overlap[labels[:, None] != truth.labels[objects]] = 0.0
    pairs = _best_pairs(overlap, iou_thresh)
    true_masks = InstanceMasks(
        rle_counts=tuple(truth.rle_counts()[j] for j in objects), image_size=truth.image_size
    )
    mask_overlap = rle_iou(masks, true_masks)
    filled = rle_iou(filled_boxes(boxes, truth.image_size), true_masks)
    return MaskTruth(
        iou=np.array([mask_overlap[pair] for pair in pairs], np.float32),
        filled_box_iou=np.array([filled[pair] for pair in pairs], np.float32),
        labels=labels[[i for i, _ in pairs]],
    )


def filled_boxes(boxes: NDArray[np.float32], image_size: tuple[int, int]) -> InstanceMasks:
    """The pixels inside each box of [n, 4] as masks."""
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).astype(np.float64)
    rles = coco_mask.frPyObjects(xywh, *image_size) if len(xywh) else []
    return InstanceMasks(rle_counts=tuple(r["counts"] for r in rles), image_size=image_size)


def fill_of_boxes(boxes: NDArray[np.float32], masks: InstanceMasks) -> NDArray[np.float32]:
    """Area of each mask over that of its box, [n]; 0 for an empty box."""
    areas = box_area(boxes)
    return np.where(areas > 0, rle_areas(masks) / np.maximum(areas, 1e-6), 0).astype(np.float32)


def _best_pairs(overlap: NDArray[np.float32], thresh: float) -> Sequence[tuple[int, int]]:
    """Row and column of the best pairs, one to one, whose overlap is at least ``thresh`` > 0."""
    remaining, pairs = overlap.copy(), []
    for _ in range(min(overlap.shape)):
        row, column = (int(i) for i in np.unravel_index(remaining.argmax(), remaining.shape))
        if remaining[row, column] < thresh:
            break
        pairs.append((row, column))
        remaining[row, :] = -1
        remaining[:, column] = -1
    return pairs
