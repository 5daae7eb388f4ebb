"""Crops cover an image, share a quarter, and know which boxes they cut."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from weaksam_rt.crops import image_crops


@given(st.integers(1, 300), st.integers(1, 300), st.integers(2, 5))
def test_crops_cover_every_pixel_and_stay_inside(height, width, per_side):
    crops = list(image_crops((height, width), per_side))
    assert len(crops) == per_side**2
    covered = np.zeros((height, width), bool)
    for crop in crops:
        assert crop.size == crops[0].size
        assert crop.of(np.zeros((height, width, 3), np.uint8)).shape == (*crop.size, 3)
        covered[crop.y : crop.y + crop.height, crop.x : crop.x + crop.width] = True
    assert covered.all()


def test_neighbours_share_a_quarter_of_their_side():
    crops = list(image_crops((70, 175), 2))
    assert [(crop.x, crop.y) for crop in crops] == [(0, 0), (75, 0), (0, 30), (75, 30)]
    assert {crop.size for crop in crops} == {(40, 100)}


def test_pixels_and_boxes_of_a_crop_are_those_of_the_image():
    image = np.random.default_rng(0).integers(0, 256, (70, 175, 3), dtype=np.uint8)
    crop = list(image_crops((70, 175), 2))[3]
    np.testing.assert_array_equal(crop.of(image), image[30:, 75:])
    boxes = np.array([[1, 2, 3, 4]], np.float32)
    np.testing.assert_array_equal(crop.boxes_in_image(boxes), [[76, 32, 78, 34]])


def test_a_box_is_cut_at_inner_edges_only():
    top_left, top_right, _, bottom_right = image_crops((70, 175), 2)
    whole, all_of_it = [10, 10, 30, 30], [0, 0, 100, 40]
    at_left, at_top, at_right = [1, 10, 30, 30], [10, 0, 30, 30], [10, 10, 99, 30]
    boxes = np.array([whole, all_of_it, at_left, at_top, at_right], np.float32)
    assert top_left.is_cut(boxes).tolist() == [False, True, False, False, True]
    assert top_right.is_cut(boxes).tolist() == [False, True, True, False, False]
    assert bottom_right.is_cut(boxes).tolist() == [False, True, True, True, False]
