"""k-means on integer points in NumPy: the definition that every faster implementation must
repeat.
"""

import numpy as np
from numpy.typing import NDArray

_MAX_ITERATIONS = 300


def kmeans(points: NDArray[np.int64], num_clusters: int) -> NDArray[np.int64]:
    """Cluster centres of integer points, truncated to integers.

    Deterministic, so that a GPU can give the same bits: the first centre is the point nearest to
    the mean, each next one the point farthest from all centres so far, ties go to the lowest index;
    then Lloyd's iterations with integer sums and float64 quotients until no point changes cluster.

    Args:
        points: [n, 2], (x, y), n >= 1.
        num_clusters: At least 1. Fewer centres come back where there are fewer distinct points.

    Returns:
        [at most num_clusters, 2], in the order in which the centres were seeded.
    """
    centres = _seed(points, num_clusters)
    assigned = np.full(len(points), -1)
    for _ in range(_MAX_ITERATIONS):
        nearest = _squared_distances(points, centres).argmin(axis=1)
        if (nearest == assigned).all():
            break
        assigned = nearest
        centres = _means(points, assigned, centres)
    return centres.astype(np.int64)


def _seed(points: NDArray[np.int64], num_clusters: int) -> NDArray[np.float64]:
    places = points.astype(np.float64)
    mean = points.sum(axis=0) / len(points)
    chosen = [int(_squared_distances(points, mean[None])[:, 0].argmin())]
    nearest = _squared_distances(points, places[chosen])[:, 0]
    while len(chosen) < num_clusters and nearest.max() > 0:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, _squared_distances(points, places[chosen[-1:]])[:, 0])
    return places[chosen]


def _means(
    points: NDArray[np.int64], assigned: NDArray[np.int64], centres: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean of each cluster's points; a cluster that lost all its points stays where it was."""
    counts = np.bincount(assigned, minlength=len(centres))
    sums = np.stack(
        [np.bincount(assigned, weights=points[:, axis], minlength=len(centres)) for axis in (0, 1)],
        axis=1,
    )
    return np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centres)


def _squared_distances(
    points: NDArray[np.int64], centres: NDArray[np.float64]
) -> NDArray[np.float64]:
    return np.square(points[:, None, :] - centres[None, :, :]).sum(axis=2)
