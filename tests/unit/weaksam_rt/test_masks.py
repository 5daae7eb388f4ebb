import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam
from segment_anything.utils import amg
from torch import nn

from weaksam_rt.boxes import box_iou
from weaksam_rt.masks import (
    boxes_from_logits,
    decode_rle,
    encode_rle,
    full_resolution_boxes,
    image_logits,
    low_res_stability,
    mask_to_box,
    masks_in_boxes,
    rle_areas,
    rle_iou,
    stability_scores,
)
from weaksam_rt.preprocessing import longest_side_frame
from weaksam_rt.types import InstanceMasks

SIZES = [(480, 640), (640, 480), (333, 500), (100, 100)]


def _blobs(rng, n, side):
    ys, xs = np.mgrid[:side, :side]
    cx, cy = rng.uniform(0.1, 0.6, (2, n, 1, 1)) * side
    rx, ry = rng.uniform(0.05, 0.3, (2, n, 1, 1)) * side
    distance = np.sqrt(((xs - cx) / rx) ** 2 + ((ys - cy) / ry) ** 2)
    return (8 * (1 - distance)).astype(np.float32)


@pytest.mark.parametrize("image_size", SIZES)
def test_image_logits_equal_segment_anything(image_size):
    logits = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    frame = longest_side_frame(image_size, 128)
    encoder = nn.Module()
    encoder.img_size = 128
    sam = Sam(encoder, nn.Module(), nn.Module())
    theirs = sam.postprocess_masks(torch.from_numpy(logits), frame.valid_size, image_size)
    np.testing.assert_allclose(image_logits(logits, frame), theirs.numpy(), atol=2e-5)


def test_boxes_and_stability_equal_segment_anything_up_to_the_box_convention():
    logits = _blobs(np.random.default_rng(1), 6, 64)
    logits[3] = -1
    masks = logits > 0
    theirs = amg.batched_mask_to_box(torch.from_numpy(masks)).numpy().astype(np.float32)
    is_empty = ~masks.any(axis=(1, 2))
    theirs[~is_empty, 2:] += 1  # theirs end on the last pixel, ours after it
    np.testing.assert_array_equal(mask_to_box(masks), theirs)
    stability = amg.calculate_stability_score(torch.from_numpy(logits[~is_empty]), 0.0, 1.0)
    np.testing.assert_allclose(stability_scores(logits[~is_empty]), stability.numpy())
    assert stability_scores(np.full((1, 4, 4), -9, np.float32)).tolist() == [0]


@pytest.mark.parametrize("image_size", SIZES)
def test_boxes_from_low_resolution_are_those_of_the_upsampled_masks(image_size):
    frame = longest_side_frame(image_size, 256)
    logits = _blobs(np.random.default_rng(2), 40, 128)
    exact = mask_to_box(image_logits(logits, frame) > 0)
    fast = boxes_from_logits(logits, frame)
    is_seen = (exact[:, 2:] - exact[:, :2]).min(axis=1) > 16
    assert np.diag(box_iou(fast[is_seen], exact[is_seen])).min() > 0.9
    assert np.diag(box_iou(fast[is_seen], exact[is_seen])).mean() > 0.97
    assert (fast[:, 2] <= image_size[1]).all()
    assert (fast[:, 3] <= image_size[0]).all()


@pytest.mark.parametrize("image_size", SIZES)
def test_full_resolution_boxes_are_exactly_those_of_the_masks(image_size):
    frame = longest_side_frame(image_size, 128)
    rng = np.random.default_rng(5)
    specks = np.full((12, 32, 32), -1, np.float32)
    specks[np.arange(12), rng.integers(0, 32, 12), rng.integers(0, 32, 12)] = np.linspace(
        0.01, 3, 12
    )
    noise = rng.normal(-2, 1, (12, 32, 32)).astype(np.float32)
    logits = np.concatenate([_blobs(rng, 12, 32), specks, noise, np.full((1, 32, 32), -1.0)])
    expected = mask_to_box(image_logits(logits.astype(np.float32), frame) > 0)
    found = full_resolution_boxes(logits.astype(np.float32), frame)
    np.testing.assert_array_equal(found, expected)
    assert len(full_resolution_boxes(np.zeros((0, 32, 32), np.float32), frame)) == 0


def test_padding_is_not_part_of_any_mask():
    frame = longest_side_frame((32, 64), 64)
    only_in_padding = np.full((1, 32, 32), -1, np.float32)
    only_in_padding[:, 20:, :] = 5
    assert boxes_from_logits(only_in_padding, frame).tolist() == [[0, 0, 0, 0]]
    assert low_res_stability(only_in_padding, frame).tolist() == [0]


def test_run_lengths_decode_to_the_same_masks():
    masks = _blobs(np.random.default_rng(3), 3, 40)[:, :30] > 0
    np.testing.assert_array_equal(decode_rle(encode_rle(masks), (30, 40)), masks)
    assert encode_rle(masks[:0]) == ()
    assert decode_rle((), (3, 4)).shape == (0, 3, 4)


def _pasted_by_grid_sample(logits, box, image_size):
    """Every pixel's centre looked up in the grid over the box: the slow definition."""
    left, top, right, bottom = box
    ys, xs = np.mgrid[: image_size[0], : image_size[1]] + 0.5
    x, y = (xs - left) / (right - left), (ys - top) / (bottom - top)
    grid = torch.from_numpy(np.stack([2 * x - 1, 2 * y - 1], axis=-1)[None]).float()
    sampled = nn.functional.grid_sample(
        torch.from_numpy(logits)[None, None], grid, padding_mode="border", align_corners=False
    )
    inside = (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
    return (sampled[0, 0].numpy() > 0) & inside, np.abs(sampled[0, 0].numpy()) < 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_masks_on_a_grid_over_a_box_are_those_of_a_lookup_for_each_pixel(seed):
    rng = np.random.default_rng(seed)
    low = rng.uniform(-20, 40, (5, 2))
    boxes = np.concatenate([low, low + rng.uniform(3, 60, (5, 2))], axis=1).astype(np.float32)
    logits = rng.normal(size=(5, 7, 7)).astype(np.float32)
    masks = masks_in_boxes(logits, boxes, (50, 70))
    for mask, one, box in zip(decode_rle(masks.rle_counts, (50, 70)), logits, boxes, strict=True):
        expected, undecided = _pasted_by_grid_sample(one, box, (50, 70))
        assert (mask == expected)[~undecided].all()


def test_a_sure_mask_fills_its_box_and_nothing_else():
    boxes = np.array([[2, 3, 12, 9], [-5, -5, 4, 4], [60, 40, 90, 90]], np.float32)
    masks = masks_in_boxes(np.ones((3, 5, 5), np.float32), boxes, (50, 70))
    np.testing.assert_array_equal(
        mask_to_box(decode_rle(masks.rle_counts, (50, 70))),
        [[2, 3, 12, 9], [0, 0, 4, 4], [60, 40, 70, 50]],
    )
    empty = masks_in_boxes(-np.ones((3, 5, 5), np.float32), boxes, (50, 70))
    assert rle_areas(empty).tolist() == [0, 0, 0]


def test_boxes_without_a_pixel_or_beyond_the_image_have_empty_masks():
    boxes = np.array([[2.6, 3, 3.4, 9], [80, 0, 90, 10], [5, 5, 5, 5], [-9, 1, -2, 4]], np.float32)
    masks = masks_in_boxes(np.ones((4, 5, 5), np.float32), boxes, (50, 70))
    assert rle_areas(masks).tolist() == [0, 0, 0, 0]
    assert len(masks_in_boxes(np.zeros((0, 5, 5), np.float32), boxes[:0], (50, 70))) == 0


def test_iou_of_coded_masks_is_that_of_their_pixels():
    rng = np.random.default_rng(0)
    bits = rng.random((5, 9, 11)) > 0.6
    bits[3] = False
    masks = InstanceMasks(rle_counts=encode_rle(bits), image_size=(9, 11))
    both = (bits[:, None] & bits).sum(axis=(2, 3))
    either = (bits[:, None] | bits).sum(axis=(2, 3))
    np.testing.assert_allclose(rle_iou(masks, masks), both / np.maximum(either, 1), rtol=1e-6)
    np.testing.assert_array_equal(rle_areas(masks), bits.sum(axis=(1, 2)))
    none = InstanceMasks(rle_counts=(), image_size=(9, 11))
    assert rle_iou(none, masks).shape == (0, 5)
    assert rle_iou(masks, none).shape == (5, 0)
