import dataclasses

import numpy as np
import pytest

from tests.unit.training.evaluation.hand_made import SIZE as _SIZE
from tests.unit.training.evaluation.hand_made import detections_of as _detections
from tests.unit.training.evaluation.hand_made import folder_of as _folder
from tests.unit.training.evaluation.hand_made import record as _record
from training.evaluation.error_breakdown import CAUSES, confusion_matrix, error_breakdown
from training.evaluation.voc_ap import voc_ap
from weaksam_rt.boxes import box_iou
from weaksam_rt.types import Detections

_CAT, _DOG = 0, 1
_OBJECT, _OTHER = [0, 0, 20, 20], [60, 60, 90, 90]
_HALF = [0, 0, 20, 8]  # IoU 0.4 with _OBJECT
_ELSEWHERE = [60, 0, 80, 20]


def _counts(folder, found):
    errors = error_breakdown(folder, {1: found}).errors
    return {name: error.count for name, error in errors.items() if error.count}


@pytest.mark.parametrize(
    ("box", "label", "expected"),
    [
        (_OBJECT, _CAT, {}),
        (_OBJECT, _DOG, {"classification": 1}),
        (_HALF, _CAT, {"localisation": 1}),
        (_HALF, _DOG, {"both": 1, "missed": 1}),
        (_ELSEWHERE, _CAT, {"background": 1, "missed": 1}),
    ],
)
def test_a_detection_has_one_cause(box, label, expected):
    folder = _folder(_record([_OBJECT], [_CAT]))
    assert _counts(folder, _detections([box], [0.9], [label])) == expected


def test_the_second_detection_of_an_object_is_a_duplicate():
    folder = _folder(_record([_OBJECT], [_CAT]))
    twice = _detections([_OBJECT, _OBJECT], [0.9, 0.8], [_CAT, _CAT])
    assert _counts(folder, twice) == {"duplicate": 1}


def test_what_lies_on_a_crowd_of_its_class_is_no_error_and_a_crowd_is_not_missed():
    folder = _folder(_record([_OBJECT, _OTHER], [_CAT, _CAT], [True, False]))
    assert _counts(folder, _detections([_OBJECT, _OTHER], [0.9, 0.8], [_CAT, _CAT])) == {}
    assert _counts(folder, Detections.empty(_SIZE)) == {"missed": 1}


def test_the_gain_is_what_correcting_one_cause_would_bring():
    folder = _folder(_record([_OBJECT, _OTHER], [_CAT, _CAT]))
    found = _detections([_ELSEWHERE, _OBJECT, _HALF], [0.9, 0.8, 0.7], [_CAT, _CAT, _CAT])
    breakdown = error_breakdown(folder, {1: found})
    assert breakdown.ap50 == pytest.approx(0.25)  # one of two objects, second in the list
    gains = {name: error.ap_gain for name, error in breakdown.errors.items()}
    assert gains["background"] == pytest.approx(0.25)  # the object would come first
    assert gains["missed"] == pytest.approx(0.25)  # it would be the only one
    assert gains["localisation"] == pytest.approx(0.0)  # _HALF's object is already found
    assert gains["duplicate"] == gains["both"] == gains["classification"] == 0.0


def test_without_objects_there_is_nothing_to_gain():
    breakdown = error_breakdown(_folder(_record([], [])), {1: _detections([_OBJECT], [0.9], [0])})
    assert np.isnan(breakdown.ap50)
    assert breakdown.errors["background"].count == 1


def _random_case(seed):
    rng = np.random.default_rng(seed)
    records, found = [], {}
    for image_id in range(1, 9):
        corners = rng.uniform(0, 60, (rng.integers(2, 6), 2))
        boxes = np.concatenate([corners, corners + rng.uniform(10, 40, corners.shape)], axis=1)
        labels = rng.integers(0, 3, len(boxes))
        is_crowd = rng.random(len(boxes)) < 0.1
        records.append(_record(boxes, labels, is_crowd, image_id=image_id))
        noisy = np.repeat(boxes, 3, axis=0)
        noisy = noisy + rng.normal(0, rng.choice([1.0, 8.0], (len(noisy), 1)), noisy.shape)
        guessed = np.where(rng.random(len(noisy)) < 0.3, rng.integers(0, 3, len(noisy)),
                           np.repeat(labels, 3))  # fmt: skip
        found[image_id] = _detections(noisy, rng.permutation(len(noisy)) / 97 + image_id / 1e4,
                                      guessed)  # fmt: skip
    return _folder(*records, class_names=("cat", "dog", "owl")), found


def _plain_judgement(record, found):
    """(cause or "right" or "ignored", object) of each detection, one by one, best score first."""
    answer, taken = {}, set()
    for index in np.argsort(-found.scores, kind="stable"):
        iou = box_iou(found.boxes[[index]], record.boxes)[0]
        same = record.labels == found.labels[index]
        best = max((j for j in range(len(iou)) if same[j]), key=lambda j: iou[j], default=None)
        if best is not None and iou[best] >= 0.5:
            if record.is_crowd[best]:
                answer[index] = ("ignored", None)
                continue
            if best not in taken:
                taken.add(best)
                answer[index] = ("right", best)
                continue
        real = [j for j in range(len(iou)) if not record.is_crowd[j]]
        own = max((j for j in real if same[j]), key=lambda j: iou[j], default=None)
        other = max((j for j in real if not same[j]), key=lambda j: iou[j], default=None)
        own_iou = iou[own] if own is not None else 0
        other_iou = iou[other] if other is not None else 0
        if own_iou >= 0.5:
            answer[index] = ("duplicate", own)
        elif own_iou >= 0.1:
            answer[index] = ("localisation", own)
        elif other_iou >= 0.5:
            answer[index] = ("classification", other)
        elif other_iou >= 0.1:
            answer[index] = ("both", None)
        else:
            answer[index] = ("background", None)
    return answer


def _plainly_corrected(record, found, judgement, cause):
    """Detections with ``cause`` corrected by moving, renaming or removing them one by one."""
    boxes, labels = found.boxes.copy(), found.labels.copy()
    taken = {obj for kind, obj in judgement.values() if kind == "right"}
    stays = np.ones(len(found), bool)
    for index in np.argsort(-found.scores, kind="stable"):
        kind, obj = judgement[index]
        if kind != cause:
            continue
        if kind in ("classification", "localisation") and obj not in taken:
            taken.add(obj)
            boxes[index], labels[index] = record.boxes[obj], record.labels[obj]
        else:
            stays[index] = False
    return dataclasses.replace(found, boxes=boxes, labels=labels).take(stays)


@pytest.mark.parametrize("seed", range(4))
def test_causes_and_gains_equal_their_plain_definitions(seed):
    folder, found = _random_case(seed)
    judgements = {r.image_id: _plain_judgement(r, found[r.image_id]) for r in folder.records}
    breakdown = error_breakdown(folder, found)
    assert breakdown.ap50 == pytest.approx(voc_ap(folder, found).mean_all_point)
    kinds = [kind for judgement in judgements.values() for kind, _ in judgement.values()]
    for cause in list(CAUSES)[:-1]:
        assert breakdown.errors[cause].count == kinds.count(cause), cause
        corrected = {
            r.image_id: _plainly_corrected(r, found[r.image_id], judgements[r.image_id], cause)
            for r in folder.records
        }
        expected = voc_ap(folder, corrected).mean_all_point - breakdown.ap50
        assert breakdown.errors[cause].ap_gain == pytest.approx(expected, abs=1e-9), cause
    assert all(kinds.count(cause) > 0 for cause in ("localisation", "classification", "duplicate"))


def test_confusion_counts_each_object_and_each_confident_detection_once():
    folder = _folder(_record([_OBJECT, _OTHER, [0, 60, 20, 80]], [_CAT, _DOG, _DOG]))
    found = _detections(
        [_OBJECT, _OBJECT, _OTHER, _ELSEWHERE, _OTHER],
        [0.9, 0.8, 0.7, 0.6, 0.1],
        [_CAT, _DOG, _CAT, _DOG, _DOG],
    )
    assert confusion_matrix(folder, {1: found}).tolist() == [
        [1, 0, 0],  # the cat was found as a cat
        [1, 0, 1],  # one dog as a cat, one not at all
        [0, 2, 0],  # two dogs on nothing that was free
    ]
