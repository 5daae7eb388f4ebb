"""Why is a detector not better? Every wrong detection gets one of five causes, every object that
nothing explains is missed, and for each cause: what would AP be without it?

Knows boxes and scores of a whole data set; reads no files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from training.data.coco import CocoFolder, ImageRecord
from training.evaluation.voc_ap import IGNORED, RIGHT, ap_all_point, match_by_class
from weaksam_rt.boxes import box_iou
from weaksam_rt.types import Detections

CAUSES: Mapping[str, str] = {
    "classification": "lies on an object, but has the wrong class",
    "localisation": "has the right class, but only overlaps the object in part",
    "both": "overlaps an object of another class in part",
    "duplicate": "lies on an object that a better detection has",
    "background": "lies on nothing",
    "missed": "an object that no detection comes near, or only with the wrong class and place",
}
"""Names of the causes and what they say of a detection (``missed``: of an object)."""
_CLASSIFICATION, _LOCALISATION, _BOTH, _DUPLICATE, _BACKGROUND = range(5)
_FOREGROUND_IOU = 0.5
_BACKGROUND_IOU = 0.1
_NOBODY = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorCount:
    """One cause."""

    count: int
    """Wrong detections of any score, or missed objects."""
    ap_gain: float
    """By how much the mean AP50 rises, in [-1, 1], when this cause alone is corrected; nan without
    objects."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorBreakdown:
    """All causes."""

    ap50: float
    """Mean over the classes that occur, all points; nan without objects."""
    errors: Mapping[str, ErrorCount]
    """By ``CAUSES``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Judged:
    """Detections best score first, without those on crowds; every array is [n]."""

    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    is_right: NDArray[np.bool_]
    causes: NDArray[np.int64]
    """Meaningless where right."""
    objects: NDArray[np.int64]
    """The object that a right detection has, or that a corrected one could have; else
    ``_NOBODY``."""

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> "_Judged":
        return _Judged(
            scores=self.scores[index],
            labels=self.labels[index],
            is_right=self.is_right[index],
            causes=self.causes[index],
            objects=self.objects[index],
        )


def error_breakdown(folder: CocoFolder, detections: Mapping[int, Detections]) -> ErrorBreakdown:
    """Sort the errors of ``detections`` on ``folder`` by their causes.

    Correcting a wrong class or place makes the best such detection of an object right, where no
    other has the object, and removes the rest; correcting another cause removes the detections;
    correcting missed objects removes the objects.

    Args:
        folder: Truth; crowd boxes are no objects, and detections on those of their class are left
            out.
        detections: By image id; an absent image has none.

    Source:
        TIDE (arXiv:2008.08115), sections 2.2 and 2.3, with its IoU thresholds 0.5 and 0.1. Differs
        in the matching, which is ``voc_ap``'s, so that ``ap50`` is its figure; and where several
        causes fit, objects of the detection's own class come first.
    """
    parts, labels_of_objects = [], [np.zeros(0, np.int64)]
    num_objects = 0
    for record in folder.records:
        found = detections.get(record.image_id, Detections.empty(record.image_size))
        parts.append(_judge(record, found, num_objects))
        labels_of_objects.append(record.labels[~record.is_crowd])
        num_objects += len(labels_of_objects[-1])
    objects = np.concatenate(labels_of_objects)
    judged, classes = _join(parts), np.unique(objects)
    ap50 = _mean_ap(judged, objects, classes)
    errors = {}
    for cause, name in enumerate(list(CAUSES)[:-1]):
        count = int((~judged.is_right & (judged.causes == cause)).sum())
        gain = _mean_ap(_corrected(judged, cause, objects), objects, classes) - ap50
        errors[name] = ErrorCount(count=count, ap_gain=gain)
    is_missed = _is_missed(judged, num_objects)
    errors["missed"] = ErrorCount(
        count=int(is_missed.sum()), ap_gain=_mean_ap(judged, objects[~is_missed], classes) - ap50
    )
    return ErrorBreakdown(ap50=ap50, errors=errors)


def confusion_matrix(
    folder: CocoFolder, detections: Mapping[int, Detections], *, score_thresh: float = 0.3
) -> NDArray[np.int64]:
    """How often an object of one class is found as another, [c + 1, c + 1].

    Rows are true classes, columns predicted ones. The last row counts detections on no object, the
    last column objects without detection. The best detection first takes the free object of any
    class that it overlaps most, by an IoU of at least 0.5.

    Args:
        folder: Truth; crowd boxes are no objects.
        detections: By image id; an absent image has none.
        score_thresh: Detections below it, in [0, 1], do not count.
    """
    nothing = len(folder.class_names)
    matrix = np.zeros((nothing + 1, nothing + 1), np.int64)
    for record in folder.records:
        found = detections.get(record.image_id, Detections.empty(record.image_size))
        found = _best_first(found.take(found.scores >= score_thresh))
        labels = record.labels[~record.is_crowd]
        overlap = box_iou(found.boxes, record.boxes[~record.is_crowd])
        is_free = np.ones(len(labels), dtype=bool)
        for row, predicted in zip(overlap, found.labels, strict=True):
            available = np.where(is_free, row, 0)
            if available.max(initial=0) < _FOREGROUND_IOU:
                matrix[nothing, predicted] += 1
                continue
            taken = available.argmax()
            is_free[taken] = False
            matrix[labels[taken], predicted] += 1
        np.add.at(matrix, (labels[is_free], nothing), 1)
    return matrix


def _judge(record: ImageRecord, found: Detections, first_object: int) -> _Judged:
    """Judge the detections of one image, whose objects are numbered from ``first_object`` on."""
    found = _best_first(found)
    is_object = ~record.is_crowd
    outcome = match_by_class(record, found, _FOREGROUND_IOU)
    same = found.labels[:, None] == record.labels[is_object]
    overlap = box_iou(found.boxes, record.boxes[is_object])  # [detection, object]
    with_same, with_other = np.where(same, overlap, 0), np.where(same, 0, overlap)
    of_same, of_other = (part.max(axis=1, initial=0) for part in (with_same, with_other))
    causes = np.select(
        [
            of_same >= _FOREGROUND_IOU,
            of_same >= _BACKGROUND_IOU,
            of_other >= _FOREGROUND_IOU,
            of_other >= _BACKGROUND_IOU,
        ],
        [_DUPLICATE, _LOCALISATION, _CLASSIFICATION, _BOTH],
        default=_BACKGROUND,
    )
    objects = np.full(len(found), _NOBODY)
    if is_object.any():
        wanted = np.where(causes == _CLASSIFICATION, with_other.argmax(1), with_same.argmax(1))
        has_object = np.isin(causes, (_DUPLICATE, _LOCALISATION, _CLASSIFICATION))
        objects = np.where(has_object, wanted + first_object, _NOBODY)
    return _Judged(
        scores=found.scores.astype(np.float64),
        labels=found.labels,
        is_right=outcome == RIGHT,
        causes=causes.astype(np.int64),
        objects=objects.astype(np.int64),
    ).take(outcome != IGNORED)


def _best_first(found: Detections) -> Detections:
    return found.take(np.argsort(-found.scores, kind="stable"))


def _join(parts: Sequence[_Judged]) -> _Judged:
    nothing = _judge_nothing()
    joined = _Judged(
        scores=np.concatenate([nothing.scores, *(part.scores for part in parts)]),
        labels=np.concatenate([nothing.labels, *(part.labels for part in parts)]),
        is_right=np.concatenate([nothing.is_right, *(part.is_right for part in parts)]),
        causes=np.concatenate([nothing.causes, *(part.causes for part in parts)]),
        objects=np.concatenate([nothing.objects, *(part.objects for part in parts)]),
    )
    return joined.take(np.argsort(-joined.scores, kind="stable"))


def _judge_nothing() -> _Judged:
    none = np.zeros(0, np.int64)
    return _Judged(
        scores=np.zeros(0), labels=none, is_right=np.zeros(0, bool), causes=none, objects=none
    )


def _corrected(judged: _Judged, cause: int, objects: NDArray[np.int64]) -> _Judged:
    """The detections without one cause; ``objects`` are their classes."""
    is_affected = ~judged.is_right & (judged.causes == cause)
    if cause not in (_CLASSIFICATION, _LOCALISATION):
        return judged.take(~is_affected)
    taken = judged.objects[judged.is_right]
    fixable = np.flatnonzero(is_affected & ~np.isin(judged.objects, taken))
    best = fixable[np.unique(judged.objects[fixable], return_index=True)[1]]
    labels, is_right = judged.labels.copy(), judged.is_right.copy()
    labels[best] = objects[judged.objects[best]]
    is_right[best] = True
    return replace(judged, labels=labels, is_right=is_right).take(~is_affected | is_right)


def _is_missed(judged: _Judged, num_objects: int) -> NDArray[np.bool_]:
    explained = np.isin(judged.causes, (_CLASSIFICATION, _LOCALISATION))
    is_missed = np.ones(num_objects, dtype=bool)
    is_missed[judged.objects[judged.is_right | explained]] = False
    return is_missed


def _mean_ap(judged: _Judged, objects: NDArray[np.int64], classes: NDArray[np.int64]) -> float:
    """Mean AP50 over ``classes``; nan without any."""
    by_class = [
        _class_ap(judged.is_right[judged.labels == label], int((objects == label).sum()))
        for label in classes
    ]
    return float(np.mean(by_class)) if by_class else float("nan")


def _class_ap(is_right: NDArray[np.bool_], num_objects: int) -> float:
    if num_objects == 0:  # all its objects were missed and have been removed
        return float(len(is_right) == 0)
    right = np.cumsum(is_right)
    return ap_all_point(right / num_objects, right / np.arange(1, len(right) + 1))
