from pathlib import Path

import numpy as np
import pytest

from training.data.coco import ImageRecord
from training.pseudo_labels.masks import (
    choose_masks,
    compare_with_truth,
    fill_of_boxes,
    filled_boxes,
)
from weaksam_rt.masks import decode_rle, encode_rle
from weaksam_rt.types import InstanceMasks, SegmentResult

_SIZE = (20, 30)


def _mask(rows, columns):
    mask = np.zeros(_SIZE, bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


def _instances(*masks):
    stacked = np.stack(masks) if masks else np.zeros((0, *_SIZE), bool)
    return InstanceMasks(rle_counts=encode_rle(stacked), image_size=_SIZE)


def _truth(boxes, labels, masks, is_crowd=None):
    return ImageRecord(
        image_id=1,
        path=Path("x.jpg"),
        image_size=_SIZE,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array(labels, np.int64),
        is_crowd=np.zeros(len(labels), bool) if is_crowd is None else np.array(is_crowd),
        segmentations=tuple(
            {"size": list(_SIZE), "counts": counts} for counts in _instances(*masks).rle_counts
        ),
    )


_LEFT, _RIGHT = _mask((2, 12), (2, 12)), _mask((2, 12), (18, 28))
_BOXES = np.array([[2, 2, 12, 12], [18, 2, 28, 12]], np.float32)


def test_of_three_masks_the_surest_is_chosen_and_of_one_that_one():
    counts = encode_rle(np.stack([_LEFT, _RIGHT, _mask((0, 5), (0, 5))]))
    boxes = np.array([[_BOXES[0], _BOXES[1], [0, 0, 5, 5]]], np.float32)
    three = SegmentResult(
        mask_counts=(counts,),
        boxes=boxes,
        scores=np.array([[0.2, 0.9, 0.3]], np.float32),
        stability_scores=np.ones((1, 3), np.float32),
        image_size=_SIZE,
    )
    chosen = choose_masks(three)
    np.testing.assert_array_equal(decode_rle(chosen.masks.rle_counts, _SIZE)[0], _RIGHT)
    assert chosen.predicted_iou.tolist() == pytest.approx([0.9])
    assert chosen.mask_boxes.tolist() == [_BOXES[1].tolist()]
    one = SegmentResult(
        mask_counts=(counts[:1],),
        boxes=boxes[:, :1],
        scores=three.scores[:, :1],
        stability_scores=three.stability_scores[:, :1],
        image_size=_SIZE,
    )
    np.testing.assert_array_equal(decode_rle(choose_masks(one).masks.rle_counts, _SIZE)[0], _LEFT)


def test_masks_are_compared_where_the_box_found_an_object_of_its_class():
    half = _mask((2, 7), (2, 12))
    truth = _truth(_BOXES, [3, 5], [half, _RIGHT])
    result = compare_with_truth(_BOXES, np.array([3, 4]), _instances(_LEFT, _RIGHT), truth)
    assert result.labels.tolist() == [3]  # the second box has another class than its object
    assert result.iou.tolist() == pytest.approx([0.5])
    assert result.filled_box_iou.tolist() == pytest.approx([0.5])


def test_an_object_is_compared_once_and_a_crowd_never():
    boxes = np.concatenate([_BOXES[:1], _BOXES])
    masks = _instances(_LEFT, _mask((0, 3), (0, 3)), _RIGHT)
    truth = _truth(_BOXES, [0, 0], [_LEFT, _RIGHT], is_crowd=[False, True])
    result = compare_with_truth(boxes, np.zeros(3, np.int64), masks, truth)
    assert result.iou.tolist() == [1.0]


def test_nothing_is_compared_with_nothing():
    none = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    truth = _truth(_BOXES, [0, 0], [_LEFT, _RIGHT])
    assert len(compare_with_truth(*none, _instances(), truth).iou) == 0
    empty = _truth(np.zeros((0, 4)), [], [])
    found = compare_with_truth(_BOXES, np.zeros(2, np.int64), _instances(_LEFT, _RIGHT), empty)
    assert len(found.iou) == 0


def test_a_filled_box_is_its_pixels_and_fill_its_share():
    masks = filled_boxes(_BOXES, _SIZE)
    np.testing.assert_array_equal(decode_rle(masks.rle_counts, _SIZE), np.stack([_LEFT, _RIGHT]))
    np.testing.assert_allclose(fill_of_boxes(_BOXES, masks), [1, 1])
    half = _instances(_mask((2, 7), (2, 12)), np.zeros(_SIZE, bool))
    np.testing.assert_allclose(fill_of_boxes(_BOXES, half), [0.5, 0])
    assert fill_of_boxes(np.zeros((1, 4), np.float32), _instances(_LEFT)).tolist() == [0]
