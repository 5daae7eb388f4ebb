"""Boxes: conversion, overlap, suppression. NumPy only; nothing here knows images or models.

``boxes`` are XYXY, float32, continuous pixel coordinates of the original image: a box around the
single pixel (0, 0)
is (0, 0, 1, 1). Where another convention is meant, the name says so.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float32]
"""float32 [n, 4], XYXY."""
_NMS_BLOCK = 256


def box_xyxy_from_xywh(boxes_xywh: NDArray[np.floating[Any]]) -> Boxes:
    """Corners from COCO's (x, y, width, height); an empty input of any shape gives [0, 4]."""
    xywh = np.asarray(boxes_xywh, dtype=np.float32).reshape(-1, 4)
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)


def box_xywh_from_xyxy(boxes: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """COCO's (x, y, width, height) from corners; an empty input of any shape gives [0, 4]."""
    xyxy = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    return np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1)


def box_area(boxes: Boxes) -> NDArray[np.float32]:
    """Areas in square pixels, [n]; an inverted box has area 0."""
    return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)


def box_intersection(boxes: Boxes, others: Boxes) -> NDArray[np.float32]:
    """Areas of the pairwise intersections in square pixels, [n, m]."""
    top_left = np.maximum(boxes[:, None, :2], others[None, :, :2])
    bottom_right = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.prod(np.maximum(bottom_right - top_left, 0), axis=2)


def box_iou(boxes: Boxes, others: Boxes) -> NDArray[np.float32]:
    """Pairwise intersection over union in [0, 1], [n, m]; 0 where both boxes are empty."""
    intersection = box_intersection(boxes, others)
    union = box_area(boxes)[:, None] + box_area(others)[None, :] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def box_containment(boxes: Boxes, others: Boxes) -> NDArray[np.float32]:
    """The share of ``boxes[i]`` that lies inside ``others[j]``, in [0, 1], [n, m]; 0 for an empty
    box.
    """
    intersection = box_intersection(boxes, others)
    area = np.broadcast_to(box_area(boxes)[:, None], intersection.shape)
    return np.divide(intersection, area, out=np.zeros_like(intersection), where=area > 0)


def clip_boxes(boxes: Boxes, image_size: tuple[int, int]) -> Boxes:
    """Boxes moved inside an image of ``image_size`` (height, width); what lies outside becomes
    empty.
    """
    height, width = image_size
    return np.clip(boxes, 0, np.array([width, height, width, height], dtype=np.float32))


def nms(boxes: Boxes, scores: NDArray[np.floating[Any]], iou_thresh: float) -> NDArray[np.int64]:
    """Greedy non-maximum suppression.

    Args:
        boxes: XYXY, any frame.
        scores: [n]; ties go to the lower index.
        iou_thresh: In [0, 1]; a box is dropped when its IoU with a kept, better one is *above*
            this.

    Returns:
        Indices of the kept boxes, best score first.
    """
    return batched_nms(boxes, scores, np.zeros(len(boxes), dtype=np.int64), iou_thresh)


def batched_nms(
    boxes: Boxes,
    scores: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    iou_thresh: float,
) -> NDArray[np.int64]:
    """``nms`` within each label; indices of the kept boxes, best score first."""
    order = np.argsort(-scores, kind="stable")
    kept: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
    # Block by block: a matrix of overlaps is fast, one of all boxes might not fit the memory.
    while len(order):
        block, order = order[:_NMS_BLOCK], order[_NMS_BLOCK:]
        survivors = block[_greedy(_conflicts(boxes, labels, block, block, iou_thresh))]
        order = order[~_conflicts(boxes, labels, survivors, order, iou_thresh).any(axis=0)]
        kept.append(survivors)
    return np.concatenate(kept)


def _conflicts(
    boxes: Boxes,
    labels: NDArray[np.integer[Any]],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    iou_thresh: float,
) -> NDArray[np.bool_]:
    """Which pairs of boxes share a label and overlap too much, [n rows, m columns]."""
    same_label = labels[rows, None] == labels[None, columns]
    return same_label & (box_iou(boxes[rows], boxes[columns]) > iou_thresh)


def _greedy(conflicts: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of n boxes, best first, stay: those in conflict with no better one that stays."""
    stays = np.ones(len(conflicts), dtype=bool)
    for rank in range(len(conflicts)):
        if stays[rank]:
            stays[rank + 1 :] &= ~conflicts[rank, rank + 1 :]
    return stays
