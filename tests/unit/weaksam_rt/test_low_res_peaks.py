import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.weaksam_rt.prompt_kernels.cases import random_nodes, random_rule
from weaksam_rt.class_activation_map import CROSS_PEAKS, PeakConfig
from weaksam_rt.preprocessing import resize_maps, upsample_maps
from weaksam_rt.prompt_clustering._low_res_peaks import low_res_peaks
from weaksam_rt.prompt_clustering._reference import map_peaks

seeds = st.integers(0, 2**32 - 1)


def assert_same_peaks(ours, expected):
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(one.points, other.points)
        np.testing.assert_array_equal(one.scores, other.scores)


@settings(max_examples=300, deadline=None)
@given(seeds)
def test_peaks_equal_those_of_the_whole_map(seed):
    rng = np.random.default_rng(seed)
    kind = str(rng.choice(["smooth", "plateaus", "sparse", "constant", "nan", "inf", "huge"]))
    nodes = random_nodes(rng, (2, *(int(s) for s in rng.integers(1, 9, 2))), kind)
    if kind not in ("inf", "huge"):
        # An offset much larger than the range makes rounding errors visible.
        nodes = nodes * np.float32(rng.choice([1, 1e-3])) + np.float32(rng.choice([0, 5, 1e4]))
    size = (int(rng.integers(1, 70)), int(rng.integers(1, 70)))
    rule = random_rule(rng)
    assert_same_peaks(low_res_peaks(nodes, size, rule), map_peaks(nodes, size, rule))


def test_a_plateau_across_nodes_and_borders_gives_its_first_pixels():
    nodes = np.zeros((1, 6, 7), np.float32)
    nodes[0, :3, :3] = 1
    rule = PeakConfig(kernel_size=33)
    ours = low_res_peaks(nodes, (90, 120), rule)
    assert ours[0].points[0].tolist() == [0, 0]
    assert_same_peaks(ours, map_peaks(nodes, (90, 120), rule))


def test_no_maps_have_no_peaks():
    assert low_res_peaks(np.zeros((0, 3, 3), np.float32), (9, 9), CROSS_PEAKS) == []


@given(seeds)
def test_upsampling_pixel_by_pixel_is_bilinear_resizing(seed):
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(2, *rng.integers(1, 9, 2))).astype(np.float32)
    size = (int(rng.integers(1, 40)), int(rng.integers(1, 40)))
    np.testing.assert_allclose(upsample_maps(maps, size), resize_maps(maps, size), atol=2e-6)
