import numpy as np
import pytest
from pycocotools import mask as coco_mask

from training.data.prompt_samples import (
    AugmentConfig,
    MaskedImage,
    PromptConfig,
    PromptSample,
    draw_prompt,
    draw_sample,
    jitter_box,
    jitter_colours,
    most_interior_point,
)

PLAIN = AugmentConfig(whole_probability=1.0, shrink_probability=0.0, jitter=0.0, min_area=1)
ONLY_BOXES = PromptConfig(box_probability=1.0, centre_probability=0.0, box_jitter=0.0)
ONLY_POINTS = PromptConfig(box_probability=0.0, centre_probability=0.0)


def masked_image(*masks: np.ndarray) -> MaskedImage:
    """An image that is white inside its first mask and black elsewhere."""
    image = np.repeat(masks[0][..., None], 3, axis=2).astype(np.uint8) * 255
    rles = [coco_mask.encode(np.asfortranarray(m.astype(np.uint8))) for m in masks]
    return MaskedImage(image=image, rles=tuple(rles))


def rectangle(height: int, width: int, rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[rows, columns] = True
    return mask


def draw(
    image: MaskedImage, seed: int = 0, *, augment: AugmentConfig = PLAIN, **kwargs: PromptConfig
) -> PromptSample:
    return draw_sample(
        image,
        frame_size=32,
        num_prompts=4,
        augment=augment,
        prompts=kwargs.get("prompts", PromptConfig()),
        generator=np.random.default_rng(seed),
    )


def test_the_same_seed_draws_the_same_sample() -> None:
    image = masked_image(rectangle(20, 40, slice(5, 15), slice(10, 30)))
    first, again, other = (draw(image, seed, augment=AugmentConfig()) for seed in (0, 0, 1))

    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.point_coords, again.point_coords)
    assert not np.array_equal(first.point_coords, other.point_coords)


@pytest.mark.parametrize("seed", range(20))
def test_mask_and_image_move_together(seed: int) -> None:
    image = masked_image(rectangle(40, 60, slice(8, 31), slice(13, 48)))
    augment = AugmentConfig(jitter=0.0, min_area=4)

    sample = draw(image, seed, augment=augment)

    brightness = sample.image[..., 0].reshape(16, 2, 16, 2).mean(axis=(1, 3)) / 255
    np.testing.assert_allclose(sample.coverage[0], brightness, atol=0.02)


def test_nothing_lies_beyond_the_picture() -> None:
    sample = draw(masked_image(np.ones((20, 40), dtype=bool)))

    assert sample.valid_size.tolist() == [16, 32]
    assert (sample.image[16:] == 0).all()
    assert (sample.coverage[:, 8:] == 0).all()
    assert (sample.coverage[:, :8] == 1).all()


def test_boxes_without_jitter_are_tight() -> None:
    image = masked_image(rectangle(32, 32, slice(4, 20), slice(8, 24)))

    sample = draw(image, prompts=ONLY_BOXES)

    assert sample.point_labels.tolist() == [[2, 3]] * 4
    assert sample.point_coords[0].tolist() == [[8, 4], [24, 20]]


@pytest.mark.parametrize("seed", range(5))
def test_points_lie_inside_their_object(seed: int) -> None:
    mask = rectangle(32, 32, slice(4, 20), slice(6, 9))

    coords, labels = draw_prompt(mask, ONLY_POINTS, np.random.default_rng(seed))

    x, y = coords[0].astype(int)
    assert mask[y, x]
    assert labels.tolist() == [1, -1]


def test_few_objects_are_asked_for_again() -> None:
    masks = [rectangle(32, 32, slice(0, 8), slice(0, 8)), np.ones((32, 32), dtype=bool)]

    areas = draw(masked_image(*masks)).coverage.sum(axis=(1, 2))

    assert sorted(areas) == [16, 16, 256, 256]


def test_an_object_too_small_for_the_frame_still_gives_a_prompt() -> None:
    image = masked_image(rectangle(200, 200, slice(100, 101), slice(50, 52)))

    sample = draw(image, augment=AugmentConfig(min_area=1000))

    assert sample.coverage.shape == (4, 16, 16)
    assert (sample.coverage.sum(axis=(1, 2)) > 0).all()


def test_the_most_interior_point_is_the_centre_even_at_the_border() -> None:
    assert most_interior_point(rectangle(9, 9, slice(0, 5), slice(0, 5))).tolist() == [2, 2]
    assert most_interior_point(np.ones((7, 7), dtype=bool)).tolist() == [3, 3]
    assert most_interior_point(rectangle(4, 4, slice(2, 3), slice(1, 2))).tolist() == [1, 2]


def test_boxes_move_at_most_three_deviations_of_their_side() -> None:
    box = np.array([10, 20, 30, 60], dtype=np.float32)
    shifts = np.stack([jitter_box(box, 0.1, np.random.default_rng(i)) - box for i in range(200)])

    assert (np.abs(shifts) <= 0.3 * np.array([20, 40, 20, 40]) + 1e-4).all()
    assert (shifts.std(axis=0) > 0.05 * np.array([20, 40, 20, 40])).all()


def test_colours_change_but_their_range_does_not() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)

    changed = jitter_colours(image, 0.3, np.random.default_rng(0))

    assert changed.dtype == np.uint8
    assert not np.array_equal(changed, image)
    assert np.array_equal(jitter_colours(image, 0.0, np.random.default_rng(0)), image)
