import numpy as np

from training.data.sampling import epoch_order, repeat_factors


def test_rare_classes_are_wanted_more_often():
    images = [{0}] * 6 + [{0, 1}] + [set()]  # class 1 is in an eighth of the images
    factors = repeat_factors(images, 0.5)
    assert factors[:6].tolist() == [1.0] * 6
    assert factors[6] == 2.0
    assert factors[7] == 1.0  # an image of background


def test_no_threshold_repeats_nothing():
    assert repeat_factors([{0}, {1}, {1}], 0.0).tolist() == [1.0, 1.0, 1.0]


def test_without_repeats_an_epoch_shows_every_image_once():
    order = epoch_order(np.ones(101), np.random.default_rng(0))
    assert sorted(order) == list(range(101))
    assert order.tolist() != sorted(order)


def test_images_come_in_proportion_to_their_factors():
    factors = np.array([1.0] * 8 + [2.5, 4.0])
    generator = np.random.default_rng(0)
    counts = np.stack(
        [np.bincount(epoch_order(factors, generator), minlength=10) for _ in range(2000)]
    )
    assert (counts.sum(axis=1) == 10).all()
    expected = 10 * factors / factors.sum()
    assert (np.abs(counts - expected) < 1).all()  # rounded up or down, never further
    np.testing.assert_allclose(counts.mean(axis=0), expected, atol=0.05)
