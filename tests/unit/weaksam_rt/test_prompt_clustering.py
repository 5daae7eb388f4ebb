import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from weaksam_rt.errors import ContractError
from weaksam_rt.prompt_clustering import (
    ClusteringConfig,
    cluster_prompts,
    prompt_clustering_model,
    prompts_from_maps,
)
from weaksam_rt.types import NO_CLASS, PromptSource

points_strategy = st.lists(
    st.tuples(st.integers(0, 500), st.integers(0, 375)), min_size=1, max_size=60
).map(lambda p: np.array(p, np.int64))


def _inertia(points, centres):
    return np.square(points[:, None] - centres[None]).sum(axis=2).min(axis=1).sum()


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


def test_clusters_are_about_as_tight_as_scikit_learns():
    rng = np.random.default_rng(1)
    ratios = []
    for _ in range(20):
        points = rng.integers(0, 400, (40, 2))
        ours = cluster_prompts(points, 5)
        theirs = KMeans(8, random_state=0, n_init="auto").fit(points).cluster_centers_
        ratios.append(_inertia(points, ours) / _inertia(points, theirs))
    assert np.mean(ratios) < 1.1


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
