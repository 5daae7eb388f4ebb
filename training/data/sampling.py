"""Which images an epoch shows: images of rare classes more often, epochs of constant length."""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray


def repeat_factors(
    classes_of_images: Sequence[Collection[int]], repeat_thresh: float
) -> NDArray[np.float64]:
    """How often each image is wanted relative to one of frequent classes only, at least 1.

    Args:
        classes_of_images: 0-based classes in each image; empty for an image of background.
        repeat_thresh: Classes in a smaller share of the images than this, in [0, 1], are rare;
            0 repeats nothing.

    Source:
        LVIS (arXiv:1908.03195), section 4: max(1, sqrt(thresh / frequency)) of the rarest class.
    """
    counts: dict[int, int] = {}
    for classes in classes_of_images:
        for label in set(classes):
            counts[label] = counts.get(label, 0) + 1
    wanted = repeat_thresh * len(classes_of_images)
    return np.array(
        [
            max([1.0] + [(wanted / counts[label]) ** 0.5 for label in classes])
            for classes in classes_of_images
        ]
    )


def epoch_order(factors: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.int64]:
    """Indices of the images of one epoch in random order, as many as there are images.

    Each image comes ``n * factor / sum(factors)`` times, rounded up or down at random: without
    repeats every image comes once.
    """
    n = len(factors)
    shuffled = generator.permutation(n)
    ends = np.cumsum(factors[shuffled]) * (n / factors.sum())
    picks = np.searchsorted(ends, np.arange(n) + generator.random(), side="right")
    return generator.permutation(shuffled[picks.clip(0, n - 1)])
