"""The published augmentation: by timm, and reproducible whoever draws."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from training.data.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    AugmentConfig,
    normalize_images,
    published_augment,
)
from training.data.coco import ImageRecord
from training.data.rand_augment import VariedImages, chance_of, make_transform, varied_batches
from training.recipes import RECIPES


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    made = []
    for i, size in enumerate([(40, 60), (60, 40), (50, 50), (33, 47)]):
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        none = np.zeros(0, np.int64)
        made.append(
            ImageRecord(
                image_id=i, path=path, image_size=size, boxes=np.zeros((0, 4), np.float32),
                labels=none, is_crowd=none.astype(bool), segmentations=(),
            )
        )  # fmt: skip
    return made


def _images(records, *, seed=0, epoch=0, config=None):
    transform = make_transform(32, config or published_augment())
    return VariedImages(records=records, transform=transform, seed=seed, epoch=epoch)


def test_the_published_settings_are_timms():
    crop, flip, policy, _, normalise, erase = make_transform(32, published_augment()).transforms
    assert crop.scale == pytest.approx((0.08, 1.0))
    assert "bicubic" in str(crop)
    assert flip.p == 0.5
    assert len(policy.ops) == 15
    assert policy.num_layers == 2
    assert {(op.magnitude, op.magnitude_std) for op in policy.ops} == {(9, 0.5)}
    assert (tuple(normalise.mean.tolist()), tuple(normalise.std.tolist())) == (
        pytest.approx(IMAGENET_MEAN),
        pytest.approx(IMAGENET_STD),
    )
    assert (erase.probability, erase.per_pixel) == (0.25, True)


@pytest.mark.parametrize("name", RECIPES)
def test_the_published_recipes_have_it_and_ours_do_not(name):
    is_published = name in ("voc07", "voc12", "coco14", "coco17")
    assert bool(RECIPES[name]().classifier.augment.rand_augment) == is_published


def test_without_any_chance_the_image_is_only_scaled_and_normalised(records):
    nothing = AugmentConfig(
        min_crop=1.0, flip=0.0, colour=0.0, erase=0.0, rand_augment="rand-m0-n0-inc1"
    )
    square = _images(records[2:3], config=nothing)[0]
    scaled = Image.open(records[2].path).resize((32, 32), Image.Resampling.BICUBIC)
    expected = normalize_images(torch.from_numpy(np.array(scaled))[None])[0]
    torch.testing.assert_close(square, expected, atol=0.05, rtol=0)


def test_chance_depends_on_seed_epoch_and_place_only(records):
    same = [records[0]] * 3
    first = _images(same)
    torch.testing.assert_close(first[1], first[1], rtol=0, atol=0)
    others = [first[2], _images(same, seed=1)[1], _images(same, epoch=1)[1]]
    assert all(not torch.equal(first[1], other) for other in others)


def test_whoever_varies_the_images_they_are_the_same(records):
    batches, images = [[2, 0], [1, 3]], _images(records)
    here, there = (list(varied_batches(images, batches, num_workers=n)) for n in (0, 1))
    assert [tuple(batch.shape) for batch in here] == [(2, 3, 32, 32)] * 2
    for batch, other, places in zip(here, there, batches, strict=True):
        torch.testing.assert_close(batch, other, rtol=0, atol=0)
        for row, place in enumerate(places):
            torch.testing.assert_close(batch[row], images[place], rtol=0, atol=0)


def test_the_chance_of_everything_else_is_left_alone(records):
    def drawn():
        return np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    numpy, of_torch = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    expected = drawn()
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(of_torch)
    list(varied_batches(_images(records), [[0, 1]], num_workers=0))
    assert drawn() == expected


def test_pythons_chance_is_left_alone_after_an_error_too():
    chance = chance_of(1, 2, 3)  # beartype, which checks this call, draws a number itself
    state = random.getstate()
    with pytest.raises(KeyError), chance:
        random.random()
        raise KeyError
    assert random.getstate() == state


def test_a_policy_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"rand-m9-mstd0\.5-inc1, or empty; got 'augmix'"):
        AugmentConfig(rand_augment="augmix")
