import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from weaksam_rt.boxes import (
    batched_nms,
    box_containment,
    box_iou,
    box_xywh_from_xyxy,
    box_xyxy_from_xywh,
    clip_boxes,
    nms,
)


def _boxes(rng, n):
    corner = rng.uniform(0, 50, (n, 2))
    return np.concatenate([corner, corner + rng.uniform(1, 40, (n, 2))], axis=1).astype(np.float32)


def test_iou_of_equal_half_and_disjoint_boxes():
    boxes = np.array([[0, 0, 10, 10]], np.float32)
    others = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [20, 20, 30, 30], [3, 3, 3, 3]], np.float32)
    np.testing.assert_allclose(box_iou(boxes, others)[0], [1, 0.5, 0, 0])


def test_containment_is_the_share_of_the_first_box():
    small, large = np.array([[0, 0, 4, 4]], np.float32), np.array([[2, 0, 12, 10]], np.float32)
    assert box_containment(small, large)[0, 0] == pytest.approx(0.5)
    assert box_containment(large, small)[0, 0] == pytest.approx(0.08)


@given(st.integers(0, 10_000), st.integers(0, 30), st.floats(0, 1))
def test_nms_equals_the_quadratic_definition(seed, n, thresh):
    rng = np.random.default_rng(seed)
    boxes, scores = _boxes(rng, n), rng.choice([0.1, 0.5, 0.9], n).astype(np.float32)
    kept: list[int] = []
    for i in sorted(range(n), key=lambda i: (-scores[i], i)):
        if all(box_iou(boxes[i : i + 1], boxes[j : j + 1])[0, 0] <= thresh for j in kept):
            kept.append(i)
    assert nms(boxes, scores, thresh).tolist() == kept


@pytest.mark.parametrize("n", [256, 257, 700])
def test_many_boxes_are_suppressed_as_torchvision_does(n):
    rng = np.random.default_rng(n)
    boxes, labels = _boxes(rng, n), rng.integers(0, 3, n)
    scores = rng.permutation(n).astype(np.float32)
    theirs = torchvision.ops.batched_nms(*map(torch.from_numpy, (boxes, scores, labels)), 0.4)
    ours = batched_nms(boxes, scores, labels, 0.4)
    assert ours.tolist() == theirs.tolist()
    assert 100 < len(ours) < n


def test_batched_nms_never_compares_labels_and_orders_by_score():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 9]], np.float32)
    scores, labels = np.array([0.5, 0.9, 0.7], np.float32), np.array([0, 1, 0])
    assert batched_nms(boxes, scores, labels, 0.5).tolist() == [1, 2]


def test_conversions_are_inverse_and_keep_empty_empty():
    boxes = _boxes(np.random.default_rng(0), 5)
    np.testing.assert_allclose(box_xyxy_from_xywh(box_xywh_from_xyxy(boxes)), boxes, rtol=1e-5)
    assert box_xyxy_from_xywh(np.zeros(0)).shape == (0, 4)


def test_clipping_keeps_boxes_inside():
    boxes = np.array([[-5, -5, 200, 20], [150, 0, 160, 10]], np.float32)
    assert clip_boxes(boxes, (30, 100)).tolist() == [[0, 0, 100, 20], [100, 0, 100, 10]]
