import numpy as np
import pytest
import torch
from segment_anything.utils.transforms import ResizeLongestSide
from torch.nn import functional as F  # noqa: N812

from weaksam_rt.preprocessing import (
    longest_side_frame,
    resize_for_detector,
    resize_longest_side,
    resize_maps,
    resize_to_square,
)

SIZES = [(480, 640), (640, 480), (333, 500), (64, 1000), (17, 16), (256, 256)]


@pytest.mark.parametrize("image_size", SIZES)
def test_pixels_and_points_equal_segment_anything(image_size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*image_size, 3), dtype=np.uint8)
    points = rng.uniform(0, 1, (5, 2)) * [image_size[1], image_size[0]]
    theirs = ResizeLongestSide(256)
    pixels, frame = resize_longest_side(image, 256)
    height, width = frame.valid_size
    np.testing.assert_array_equal(pixels[:height, :width], theirs.apply_image(image))
    assert pixels[height:].sum() == pixels[:, width:].sum() == 0
    np.testing.assert_allclose(
        frame.to_model(points), theirs.apply_coords(points, image_size), rtol=1e-6
    )


@pytest.mark.parametrize("image_size", SIZES)
def test_frames_map_back(image_size):
    frame = longest_side_frame(image_size, 384)
    boxes = np.array([[0, 0, image_size[1], image_size[0]], [3, 5, 9, 11]], np.float32)
    np.testing.assert_allclose(frame.to_image(frame.to_model(boxes)), boxes, rtol=1e-5)
    height, width = frame.valid_size
    np.testing.assert_allclose(frame.to_model(boxes)[0], [0, 0, width, height], rtol=1e-6)


def test_the_detectors_resizing_equals_the_exact_one_below_half_size():
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    fast, frame = resize_for_detector(image, 64)
    exact, exact_frame = resize_longest_side(image, 64)
    np.testing.assert_array_equal(fast, exact)
    assert frame == exact_frame


def test_the_detectors_resizing_averages_blocks_of_large_images():
    blocks = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    image = blocks.repeat(4, axis=0).repeat(4, axis=1)
    fast, frame = resize_for_detector(image, 64)
    np.testing.assert_array_equal(fast[:48], blocks)
    assert (fast[48:] == 0).all()
    assert frame.valid_size == (48, 64)


def test_an_extreme_aspect_keeps_at_least_one_pixel():
    assert longest_side_frame((8, 40_000), 256).valid_size == (1, 256)


@pytest.mark.parametrize(("source", "target"), [((14, 14), (375, 500)), ((9, 5), (4, 3))])
def test_map_resizing_equals_torch(source, target):
    maps = np.random.default_rng(0).random((3, *source), dtype=np.float32)
    theirs = F.interpolate(torch.from_numpy(maps)[None], target, mode="bilinear")[0]
    np.testing.assert_allclose(resize_maps(maps, target), theirs.numpy(), atol=5e-6)


def test_square_resizing_fills_the_frame():
    image = np.full((30, 90, 3), 7, np.uint8)
    assert (resize_to_square(image, 32) == 7).all()
