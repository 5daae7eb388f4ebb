import dataclasses

import numpy as np
import pytest

from training.data.views import TrueBoxes, ViewConfig, frame_image, random_view
from weaksam_rt.masks import decode_rle, mask_to_box


def _image_with_a_box():
    image = np.zeros((60, 120, 3), np.uint8)
    image[20:50, 30:90] = 255
    return image, np.array([[30, 20, 90, 50]], np.float32), np.array([3])


def _box_around_bright(pixels):
    rows, columns = np.nonzero(pixels.max(axis=2) > 127)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_the_frame_holds_the_scaled_image_at_the_top_left_and_zeros_elsewhere():
    framed = frame_image(*_image_with_a_box(), frame_side=64)
    assert framed.pixels.shape == (64, 64, 3)
    assert framed.valid_size == (32, 64)
    assert not framed.pixels[32:].any()
    np.testing.assert_allclose(framed.boxes, [[16, 32 / 3, 48, 80 / 3]], rtol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_boxes_follow_the_pixels_of_a_random_view(seed):
    framed = frame_image(*_image_with_a_box(), frame_side=96)
    config = ViewConfig(min_visible=0.0, max_gain=0.0)
    view = random_view(framed, config, np.random.default_rng(seed))
    assert view.labels.tolist() == [3]
    np.testing.assert_allclose(view.boxes[0], _box_around_bright(view.pixels), atol=1.6)


def test_a_view_stays_top_left_aligned_with_zero_padding():
    framed = frame_image(*_image_with_a_box(), frame_side=96)
    bright = type(framed)(
        pixels=np.where(np.arange(96)[:, None, None] < 48, 200, 0).astype(np.uint8)
        * np.ones((1, 96, 3), np.uint8),
        valid_size=(48, 96),
        boxes=framed.boxes,
        labels=framed.labels,
    )
    config = ViewConfig(min_scale=0.5, max_scale=0.7, max_gain=0.3)
    view = random_view(bright, config, np.random.default_rng(0))
    height, width = view.valid_size
    assert (view.pixels[:height, :width] > 50).all()
    assert not view.pixels[height:].any()
    assert not view.pixels[:, width:].any()


def test_boxes_that_are_mostly_cut_off_are_dropped():
    image, _, _ = _image_with_a_box()
    boxes = np.array([[0, 0, 10, 10], [110, 50, 120, 60]], np.float32)
    framed = frame_image(image, boxes, np.array([0, 1]), frame_side=64)
    config = ViewConfig(min_scale=2.5, max_scale=2.5, min_visible=0.9)
    views = [random_view(framed, config, np.random.default_rng(seed)) for seed in range(10)]
    assert all(len(view.boxes) < 2 for view in views)
    for view in views:
        assert (view.boxes >= 0).all()
        assert (view.boxes <= 64).all()


def test_an_image_without_boxes_is_a_valid_view():
    image, _, _ = _image_with_a_box()
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    view = random_view(
        frame_image(image, *nothing, frame_side=64), ViewConfig(), np.random.default_rng(0)
    )
    assert (view.boxes.shape, view.labels.shape) == ((0, 4), (0,))


def test_equal_seeds_give_equal_views():
    framed = frame_image(*_image_with_a_box(), frame_side=64)
    first, second = (random_view(framed, ViewConfig(), np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(first.pixels, second.pixels)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="scales"):
        ViewConfig(min_scale=2.0, max_scale=1.0)


@pytest.mark.parametrize("seed", range(4))
def test_true_boxes_move_with_the_boxes_and_change_nothing_else(seed):
    framed = frame_image(*_image_with_a_box(), frame_side=96)
    truth = TrueBoxes(boxes=framed.boxes.copy(), labels=np.array([5]))
    view = random_view(framed, ViewConfig(), np.random.default_rng(seed))
    measured = dataclasses.replace(framed, truth=truth)
    seen = random_view(measured, ViewConfig(), np.random.default_rng(seed))
    np.testing.assert_array_equal(seen.pixels, view.pixels)
    np.testing.assert_array_equal(seen.truth.boxes, view.boxes)
    assert seen.truth.labels.tolist() == [5] * len(view.boxes)
    assert view.truth is None


def _image_with_a_mask():
    image, boxes, labels = _image_with_a_box()
    masks = np.zeros((1, 60, 120), bool)
    masks[0, 20:50, 30:90] = True
    return image, boxes, labels, masks


def test_the_frame_holds_the_scaled_masks():
    image, boxes, labels, masks = _image_with_a_mask()
    framed = frame_image(image, boxes, labels, frame_side=60, masks=masks)
    (mask,) = decode_rle(framed.masks.rle_counts, framed.masks.image_size)
    expected = np.zeros((60, 60), bool)
    expected[10:25, 15:45] = True
    assert (mask != expected).sum() <= 2 * (15 + 30)  # the border may fall either way
    assert framed.masks.image_size == (60, 60)


@pytest.mark.parametrize("seed", range(8))
def test_masks_follow_the_pixels_of_a_random_view(seed):
    image, boxes, labels, masks = _image_with_a_mask()
    framed = frame_image(image, boxes, labels, frame_side=96, masks=masks)
    config = ViewConfig(min_visible=0.0, max_gain=0.0)
    view = random_view(framed, config, np.random.default_rng(seed))
    (mask,) = decode_rle(view.masks.rle_counts, view.masks.image_size)
    bright = view.pixels.max(axis=2) > 127
    assert (mask & bright).sum() / (mask | bright).sum() > 0.93
    without = random_view(
        dataclasses.replace(framed, masks=None), config, np.random.default_rng(seed)
    )
    np.testing.assert_array_equal(without.pixels, view.pixels)
    np.testing.assert_array_equal(without.boxes, view.boxes)


def test_a_mask_goes_with_its_box():
    image, _, _ = _image_with_a_box()
    boxes = np.array([[0, 0, 10, 10], [110, 50, 120, 60]], np.float32)
    masks = np.zeros((2, 60, 120), bool)
    masks[0, :10, :10] = masks[1, 50:, 110:] = True
    framed = frame_image(image, boxes, np.array([0, 1]), frame_side=64, masks=masks)
    config = ViewConfig(min_scale=1.4, max_scale=1.4, min_visible=0.9)
    kept = 0
    for seed in range(10):
        view = random_view(framed, config, np.random.default_rng(seed))
        decoded = decode_rle(view.masks.rle_counts, view.masks.image_size)
        assert len(decoded) == len(view.boxes)
        for mask, box in zip(decoded, view.boxes, strict=True):
            kept += 1
            np.testing.assert_allclose(mask_to_box(mask), box, atol=2)
    assert kept


def test_an_image_without_objects_has_no_masks():
    image, _, _ = _image_with_a_box()
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    framed = frame_image(image, *nothing, frame_side=64, masks=np.zeros((0, 60, 120), bool))
    assert len(random_view(framed, ViewConfig(), np.random.default_rng(0)).masks) == 0
