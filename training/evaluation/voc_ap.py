"""Average precision as Pascal VOC defines it, per class: the 11-point form of 2007 and the area
form of 2010.

Knows boxes, masks and scores of a whole data set; reads no files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from training.data.coco import CocoFolder, ImageRecord
from weaksam_rt.boxes import box_iou
from weaksam_rt.masks import rle_iou
from weaksam_rt.types import Detections, InstanceMasks

Shape = Literal["box", "mask"]
"""What is compared with the truth."""

WRONG, RIGHT, IGNORED = 0, 1, 2
"""Outcomes of a detection; ignored ones lie on a crowd box."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassAp:
    """Average precision of one class, in [0, 1]; nan where no image has the class."""

    ap_11_point: float
    """Mean of the best precision at the recalls 0, 0.1, ... 1 (VOC 2007)."""
    ap_all_point: float
    """Area under the monotone precision curve (VOC 2010 and later)."""
    num_truth: int
    """True boxes without crowds."""
    num_detections: int


@dataclass(frozen=True, kw_only=True, slots=True)
class VocAp:
    """Average precision of all classes."""

    by_class: tuple[ClassAp, ...]
    """In the order of ``CocoFolder.class_names``."""

    @property
    def mean_11_point(self) -> float:
        """Mean over the classes that occur; nan if none does."""
        return _mean([c.ap_11_point for c in self.by_class])

    @property
    def mean_all_point(self) -> float:
        """Mean over the classes that occur; nan if none does."""
        return _mean([c.ap_all_point for c in self.by_class])


def voc_ap(
    folder: CocoFolder,
    detections: Mapping[int, Detections],
    *,
    iou_thresh: float = 0.5,
    shape: Shape = "box",
) -> VocAp:
    """Average precision of ``detections`` against the boxes or masks of ``folder``.

    Args:
        folder: Crowd boxes count like VOC's difficult ones: neither to be found nor wrong to find.
        detections: By image id; an absent image has none.
        iou_thresh: In (0, 1]; a detection is right when its IoU with its best true box is at least
            this and no better detection took that box.
        shape: Whether boxes or masks overlap; with ``mask`` the detections and, where they have
            objects, the records need masks.

    Raises:
        ValueError: Masks are compared and a record or a detection has none.

    Source:
        VOC development kit, ``VOCevaldet``; differs in that boxes are continuous (no added pixel).
    """
    overlaps = {
        record.image_id: overlap(record, detections[record.image_id], shape)
        for record in folder.records
        if record.image_id in detections
    }
    return VocAp(
        by_class=tuple(
            _class_ap(folder, detections, overlaps, label, iou_thresh)
            for label in range(len(folder.class_names))
        )
    )


def overlap(record: ImageRecord, found: Detections, shape: Shape) -> NDArray[np.float32]:
    """IoU of every detection with every true box or mask, [n, m], in [0, 1]; 0 between classes."""
    is_same = found.labels[:, None] == record.labels
    if shape == "box":
        return np.where(is_same, box_iou(found.boxes, record.boxes), np.float32(0))
    if found.masks is None:
        raise ValueError(f"the detections of {record.path.name} have no masks; detect with masks")
    iou = np.zeros(is_same.shape, np.float32)
    counts = record.rle_counts()
    for label in np.unique(found.labels):
        rows, columns = (
            np.flatnonzero(labels == label) for labels in (found.labels, record.labels)
        )
        truth = InstanceMasks(
            rle_counts=tuple(counts[i] for i in columns), image_size=record.image_size
        )
        of_class = found.take(rows).masks
        assert of_class is not None
        iou[np.ix_(rows, columns)] = rle_iou(of_class, truth)
    return iou


def ap_11_point(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    """VOC 2007's average precision from the curve, both [n] in order of falling score."""
    levels = np.linspace(0, 1, 11)
    return float(np.mean([precision[recall >= level].max(initial=0) for level in levels]))


def ap_all_point(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    """VOC 2010's average precision from the curve, both [n] in order of falling score."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0) * envelope))


def _class_ap(
    folder: CocoFolder,
    detections: Mapping[int, Detections],
    overlaps: Mapping[int, NDArray[np.float32]],
    label: int,
    iou_thresh: float,
) -> ClassAp:
    scores, outcomes, num_truth = [np.zeros(0)], [np.zeros(0, np.int8)], 0
    for record in folder.records:
        of_class = record.labels == label
        num_truth += int((of_class & ~record.is_crowd).sum())
        found = detections.get(record.image_id)
        if found is None:
            continue
        members = np.flatnonzero(found.labels == label)
        members = members[np.argsort(-found.scores[members], kind="stable")]
        scores.append(found.scores[members].astype(np.float64))
        iou = overlaps[record.image_id][np.ix_(members, np.flatnonzero(of_class))]
        outcomes.append(match_detections(iou, record.is_crowd[of_class], iou_thresh))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    outcome = np.concatenate(outcomes)[order]
    if num_truth == 0:
        nothing = float("nan")
        return ClassAp(
            ap_11_point=nothing, ap_all_point=nothing, num_truth=0, num_detections=len(outcome)
        )
    outcome = outcome[outcome != IGNORED]
    right = np.cumsum(outcome == RIGHT)
    recall, precision = right / num_truth, right / np.arange(1, len(right) + 1)
    return ClassAp(
        ap_11_point=ap_11_point(recall, precision),
        ap_all_point=ap_all_point(recall, precision),
        num_truth=num_truth,
        num_detections=len(outcome),
    )


def match_detections(
    iou: NDArray[np.float32], is_crowd: NDArray[np.bool_], iou_thresh: float
) -> NDArray[np.int8]:
    """Outcome of each detection of one class in one image.

    Args:
        iou: [n, m], detections (best score first) by true boxes.
        is_crowd: [m].
        iou_thresh: In (0, 1].

    Returns:
        [n], ``WRONG``, ``RIGHT`` or ``IGNORED``. A right detection has the box it overlaps best.
    """
    outcome = np.full(len(iou), WRONG, dtype=np.int8)
    if iou.shape[1] == 0:
        return outcome
    taken = np.zeros(iou.shape[1], dtype=bool)
    for index, row in enumerate(iou):
        best = int(row.argmax())
        if row[best] < iou_thresh:
            continue
        if is_crowd[best]:
            outcome[index] = IGNORED
        elif not taken[best]:
            outcome[index] = RIGHT
            taken[best] = True
    return outcome


def match_by_class(record: ImageRecord, found: Detections, iou_thresh: float) -> NDArray[np.int8]:
    """Outcome of each detection of one image, [n]; ``found`` has the best score first."""
    outcome = np.full(len(found), WRONG, dtype=np.int8)
    for label in np.unique(found.labels):
        members, truth = found.labels == label, record.labels == label
        iou = box_iou(found.boxes[members], record.boxes[truth])
        outcome[members] = match_detections(iou, record.is_crowd[truth], iou_thresh)
    return outcome


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
