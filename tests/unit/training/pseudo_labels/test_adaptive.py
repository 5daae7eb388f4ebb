import numpy as np
import pytest

from training.pseudo_labels.adaptive import (
    AdaptiveConfig,
    above_threshold,
    not_contained,
    relative_scores,
    select_pseudo_labels,
    top_1,
)
from weaksam_rt.types import Detections

_CONFIG = AdaptiveConfig(score_thresh=0.3, containment_thresh=0.85)


def _detections(boxes, scores, labels):
    return Detections(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.array(scores, np.float32),
        labels=np.array(labels, np.int64),
        image_size=(100, 100),
    )


_APART = [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]]


def test_the_threshold_is_relative_to_best_and_worst_of_the_class():
    found = _detections(_APART, [0.5, 0.2, 0.19, 0.1], [0, 0, 0, 0])
    # relative: 1, 0.25, 0.225, 0
    kept = select_pseudo_labels(found, np.array([0]), AdaptiveConfig(score_thresh=0.24))
    assert kept.scores.tolist() == pytest.approx([0.5, 0.2])


def test_classes_are_scaled_apart_and_absent_ones_are_removed_before_scaling():
    found = _detections(_APART, [0.9, 0.8, 0.02, 0.01], [2, 0, 1, 1])
    kept = select_pseudo_labels(found, np.array([1, 0]), _CONFIG)
    assert kept.labels.tolist() == [0, 1]
    assert kept.scores.tolist() == pytest.approx([0.8, 0.02])


def test_a_lone_detection_and_equal_scores_are_kept():
    assert relative_scores(np.array([0.01], np.float32)).tolist() == [1.0]
    assert relative_scores(np.array([0.2, 0.2], np.float32)).tolist() == [1.0, 1.0]
    assert relative_scores(np.zeros(0, np.float32)).tolist() == []
    alone = _detections([_APART[0]], [0.001], [0])
    assert len(select_pseudo_labels(alone, np.array([0]), _CONFIG)) == 1


def test_a_part_inside_a_whole_is_dropped_even_if_its_score_is_better():
    whole, part, other = [0, 0, 50, 50], [10, 10, 20, 20], [60, 60, 90, 90]
    found = _detections([part, whole, other], [0.9, 0.6, 0.5], [0, 0, 0])
    kept = select_pseudo_labels(found, np.array([0]), AdaptiveConfig(score_thresh=0.0))
    assert [0, 0, 50, 50] in kept.boxes.tolist()
    assert [10, 10, 20, 20] not in kept.boxes.tolist()


def test_containment_is_not_overlap():
    # A tenth of the whole, fully inside: IoU 0.1, containment 1.
    boxes = np.array([[0, 0, 100, 10], [0, 0, 10, 10]], np.float32)
    assert not_contained(boxes, np.array([0.5, 0.6], np.float32), 0.85).tolist() == [True, False]
    # Two halves that share half of themselves stay.
    boxes = np.array([[0, 0, 20, 10], [10, 0, 30, 10]], np.float32)
    assert not_contained(boxes, np.array([0.5, 0.6], np.float32), 0.85).all()


def test_of_twins_the_better_one_stays():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 9.9]], np.float32)
    assert not_contained(boxes, np.array([0.5, 0.6, 0.4], np.float32), 0.85).tolist() == [
        False,
        True,
        False,
    ]
    equal = np.array([0.5, 0.5, 0.5], np.float32)
    assert not_contained(boxes, equal, 0.85).tolist() == [True, False, False]


def test_other_classes_do_not_contain():
    found = _detections([[0, 0, 50, 50], [10, 10, 20, 20]], [0.9, 0.8], [0, 1])
    assert len(select_pseudo_labels(found, np.array([0, 1]), _CONFIG)) == 2


@pytest.mark.parametrize("seed", range(5))
def test_every_present_class_with_a_detection_keeps_a_box(seed):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 60, (30, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 40, (30, 2))], axis=1)
    labels = rng.integers(0, 4, 30)
    found = _detections(boxes, rng.random(30), labels)
    kept = select_pseudo_labels(found, np.array([0, 1, 2]), _CONFIG)
    assert set(kept.labels.tolist()) == {0, 1, 2} & set(labels.tolist())
    assert (np.diff(kept.scores) <= 0).all()


def test_the_order_of_the_detections_does_not_matter():
    rng = np.random.default_rng(0)
    found = _detections(_APART, [0.5, 0.3, 0.2, 0.1], [0, 1, 0, 1])
    kept = select_pseudo_labels(found, np.array([0, 1]), _CONFIG)
    again = select_pseudo_labels(found.take(rng.permutation(4)), np.array([1, 0]), _CONFIG)
    np.testing.assert_array_equal(kept.boxes, again.boxes)


def test_no_tags_or_no_detections_give_nothing():
    found = _detections(_APART, [0.5, 0.3, 0.2, 0.1], [0, 1, 0, 1])
    none = np.array([], np.int64)
    assert len(select_pseudo_labels(found, none, _CONFIG)) == 0
    assert len(top_1(found, none)) == 0
    assert len(select_pseudo_labels(Detections.empty((9, 9)), np.array([0]), _CONFIG)) == 0


def test_the_baselines_take_the_best_or_all_above_a_threshold():
    found = _detections(_APART, [0.5, 0.3, 0.6, 0.4], [0, 1, 0, 1])
    assert top_1(found, np.array([0, 1])).scores.tolist() == pytest.approx([0.6, 0.4])
    kept = above_threshold(found, np.array([0]), 0.5)
    assert kept.scores.tolist() == pytest.approx([0.6, 0.5])


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="score_thresh"):
        AdaptiveConfig(score_thresh=1.0)
