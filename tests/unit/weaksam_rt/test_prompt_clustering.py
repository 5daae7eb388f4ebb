import os
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.clustering import attention_peaks, imitated_peaks, inertia_ratio
from weaksam_rt.errors import ContractError
from weaksam_rt.prompt_clustering import (
    ClusteringConfig,
    cluster_prompts,
    prompt_clustering_model,
    prompts_from_maps,
)
from weaksam_rt.prompt_clustering._reference import kmeans
from weaksam_rt.types import NO_CLASS, PromptSource

_PHOTOGRAPHS = (
    Path(os.environ.get("WEAKSAM_DATA", "../shared/data")) / "animals7" / "val" / "images"
)

points_strategy = st.lists(
    st.tuples(st.integers(0, 500), st.integers(0, 375)), min_size=1, max_size=60
).map(lambda p: np.array(p, np.int64))


def test_no_points_give_no_prompts():
    assert cluster_prompts(np.zeros((0, 2), np.int64), 5).shape == (0, 2)


@given(points_strategy)
def test_n_points_give_n_over_five_centres_unless_fewer_are_distinct(points):
    expected = min(max(1, len(points) // 5), len(np.unique(points, axis=0)))
    assert len(cluster_prompts(points, 5)) == expected


@given(points_strategy)
def test_a_single_cluster_is_the_truncated_mean(points):
    centre = cluster_prompts(points, len(points))
    assert centre.tolist() == [np.floor(points.mean(axis=0) + 1e-9).astype(int).tolist()]


def test_well_separated_groups_are_found_in_any_order():
    rng = np.random.default_rng(0)
    groups = np.array([[50, 50], [300, 60], [200, 300]])
    points = (groups.repeat(5, axis=0) + rng.integers(-8, 9, (15, 2))).astype(np.int64)
    for order in (np.arange(15), rng.permutation(15)):
        centres = cluster_prompts(points[order], 5)
        distance = np.abs(centres[:, None] - groups[None]).max(axis=2).min(axis=1)
        assert distance.max() <= 8


def test_clusters_of_peaks_are_as_tight_as_scikit_learns_best_of_ten():
    rng = np.random.default_rng(1)
    ratios = [inertia_ratio(imitated_peaks(rng)) for _ in range(40)]
    assert np.mean(ratios) <= 1.02
    assert np.percentile(ratios, 90) <= 1.06


def test_clusters_of_attention_peaks_are_as_tight_as_scikit_learns_best_of_ten():
    if not _PHOTOGRAPHS.exists():
        pytest.skip(f"no photographs at {_PHOTOGRAPHS}; set WEAKSAM_DATA")
    images = sorted(_PHOTOGRAPHS.glob("*"))[::15]
    sets = [points for points in attention_peaks(images, (2, 4)) if len(points) >= 10]
    assert len(sets) >= 20
    ratios = [inertia_ratio(points) for points in sets]
    assert np.mean(ratios) <= 1.02
    assert np.mean(np.array(ratios) <= 1.02) >= 0.9


def _squared(a, b):
    return (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2


def _seeded(places, mean, num_clusters, start):
    by_distance = sorted(range(len(places)), key=lambda i: (_squared(places[i], mean), i))
    centres = [places[by_distance[start % 4 * len(places) // 4]]]
    while len(centres) < num_clusters:
        nearest = [min(_squared(p, c) for c in centres) for p in places]
        if max(nearest) == 0:
            break
        left = [sum(map(min, nearest, [_squared(p, q) for p in places])) for q in places]
        best = left.index(min(left)) if start < 4 else nearest.index(max(nearest))
        centres.append(places[best])
    return centres


def _moved(places, centres):
    """Lloyd's iterations, and how tight the clusters are."""
    assigned = None
    while True:
        now = [min(range(len(centres)), key=lambda c: _squared(p, centres[c])) for p in places]
        groups = [
            [p for p, a in zip(places, now, strict=True) if a == c] for c in range(len(centres))
        ]
        sums = [[sum(p[axis] for p in group) for axis in (0, 1)] for group in groups]
        if now == assigned:
            shares = [(x * x + y * y) / len(g) for (x, y), g in zip(sums, groups, strict=True) if g]
            # One rounded addition after the other: since Python 3.12 `sum` makes up for rounding.
            return reduce(add, shares, 0.0), centres
        assigned = now
        centres = [
            (x / len(g), y / len(g)) if g else c
            for (x, y), g, c in zip(sums, groups, centres, strict=True)
        ]


def _kmeans_start_by_start(points, num_clusters):
    """The definition's words, one start after the other, in Python's exact numbers."""
    places = [(int(x), int(y)) for x, y in points]
    mean = tuple(points.sum(axis=0) / len(points))
    results = [_moved(places, _seeded(places, mean, num_clusters, start)) for start in range(8)]
    _, centres = max(results, key=lambda result: result[0])
    return [[int(x), int(y)] for x, y in centres]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
@example(2625)  # two starts are equally tight but for the last bit
def test_kmeans_is_its_definition(seed):
    rng = np.random.default_rng(seed)
    points = rng.integers(0, int(rng.choice([4, 60, 500])), (int(rng.integers(1, 26)), 2))
    num_clusters = int(rng.integers(1, len(points) + 1))
    assert kmeans(points, num_clusters).tolist() == _kmeans_start_by_start(points, num_clusters)


def _maps(rng, num_classes=2, side=14):
    return {
        "coarse_maps": rng.random((num_classes, side, side), dtype=np.float32),
        "fine_maps": rng.random((num_classes, side, side), dtype=np.float32),
        "cross_maps": rng.random((6, num_classes, side, side), dtype=np.float32),
        "class_ids": np.array([3, 5], np.int32)[:num_classes],
    }


def test_cam_prompts_carry_their_class_and_cross_prompts_none():
    maps = _maps(np.random.default_rng(2))
    prompts = prompts_from_maps(**maps, image_size=(150, 200), config=ClusteringConfig())
    of_class = prompts.class_ids[prompts.sources != PromptSource.CROSS]
    assert set(of_class.tolist()) == {3, 5}
    assert set(prompts.class_ids[prompts.sources == PromptSource.CROSS].tolist()) == {NO_CLASS}
    assert (prompts.points >= 0).all()
    assert (prompts.points < [200, 150]).all()
    assert (np.diff(prompts.sources) >= 0).all()


def test_maps_of_absent_objects_invent_nothing():
    zeros = {
        "coarse_maps": np.zeros((1, 4, 4), np.float32),
        "fine_maps": np.zeros((1, 4, 4), np.float32),
        "cross_maps": np.zeros((2, 1, 4, 4), np.float32),
        "class_ids": np.zeros(1, np.int32),
    }
    assert len(prompts_from_maps(**zeros, image_size=(50, 60), config=ClusteringConfig())) == 0


def test_the_model_speaks_its_contract():
    maps = _maps(np.random.default_rng(3))
    size = np.array([150, 200], np.int32)
    answer = prompt_clustering_model({**maps, "image_size": size}, ["points", "sources"])
    assert set(answer) == {"points", "sources"}
    with pytest.raises(ContractError, match=r"prompt_clustering\.image_size: expected INT32"):
        prompt_clustering_model({**maps, "image_size": size.astype(np.int64)})
