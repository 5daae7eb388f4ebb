import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weaksam_rt.class_activation_map import PeakConfig, normalize_maps, peak_points
from weaksam_rt.preprocessing import resize_maps


def _definition(values, config):
    """weaksam_spec section 2.1, step by step, with nothing clever."""
    radius = config.kernel_size // 2
    height, width = values.shape
    candidates = []
    for y in range(height):
        for x in range(width):
            window = values[
                max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1
            ]
            if values[y, x] == window.max():
                candidates.append((x, y))
    candidates.sort(key=lambda p: -values[p[1], p[0]])
    kept: list[tuple[int, int]] = []
    for x, y in candidates[: config.max_candidates]:
        dx_dy = [(abs(x - kx), abs(y - ky)) for kx, ky in kept]
        if config.distance == "l1":
            near = any(dx + dy < (config.kernel_size - 1) // 2 for dx, dy in dx_dy)
        else:
            near = any(dx * dx + dy * dy <= (config.kernel_size / 2) ** 2 for dx, dy in dx_dy)
        if near:
            continue
        if values[y, x] < config.value_thresh:
            break
        kept.append((x, y))
    return kept


def _smooth_map(rng, coarse, size):
    return normalize_maps(resize_maps(rng.random((coarse, coarse), dtype=np.float32), size))


@given(st.integers(0, 10_000), st.sampled_from([1, 3, 5, 9, 17]), st.sampled_from(["l1", "l2"]))
def test_peaks_of_smooth_maps_equal_the_definition(seed, kernel_size, distance):
    rng = np.random.default_rng(seed)
    values = _smooth_map(rng, int(rng.integers(2, 8)), (31, 43))
    config = PeakConfig(kernel_size=kernel_size, value_thresh=0.8, distance=distance)
    assert [tuple(p) for p in peak_points(values, config).points] == _definition(values, config)


@given(st.integers(0, 10_000), st.sampled_from([3, 7, 31]))
def test_peaks_of_maps_full_of_plateaus_equal_the_definition(seed, kernel_size):
    rng = np.random.default_rng(seed)
    values = rng.choice(np.array([0.5, 0.9, 0.95, 1.0], np.float32), (24, 29))
    config = PeakConfig(kernel_size=kernel_size)
    assert [tuple(p) for p in peak_points(values, config).points] == _definition(values, config)


def test_a_constant_map_has_no_peaks_after_normalisation():
    flat = normalize_maps(np.full((5, 7), 3.0, np.float32))
    assert flat.max() == 0
    assert len(peak_points(flat, PeakConfig(kernel_size=3)).points) == 0


def test_a_single_pixel_is_found_with_its_score():
    values = np.zeros((40, 50), np.float32)
    values[7, 31] = 1.0
    peaks = peak_points(values, PeakConfig(kernel_size=17))
    assert peaks.points.tolist() == [[31, 7]]
    assert peaks.scores.tolist() == [1.0]


def test_at_most_max_candidates_are_looked_at():
    values = np.zeros((100, 100), np.float32)
    values[5::10, 5::10] = 1.0
    assert len(peak_points(values, PeakConfig(kernel_size=3, max_candidates=25)).points) == 25


@pytest.mark.parametrize(
    ("field", "value"), [("kernel_size", 4), ("value_thresh", 0.0), ("max_candidates", 0)]
)
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        PeakConfig(**{"kernel_size": 3, field: value})


def test_normalisation_is_per_map():
    maps = np.stack([np.arange(6.0).reshape(2, 3), 10 * np.arange(6.0).reshape(2, 3) + 5])
    normalized = normalize_maps(maps.astype(np.float32))
    np.testing.assert_allclose(normalized[0], normalized[1], atol=1e-6)
    assert normalized.min() == 0
    assert normalized.max() == pytest.approx(1)
