"""Activation maps to peak points. Knows maps and pixels, not models."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_EPSILON = 1e-8
_MANY_VISITS = 200
"""After so many points visited in vain, filtering the whole region is cheaper."""
_NUM_RULERS = 16
"""So many of the highest points rule out what is lower and near before any is visited."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeakConfig:
    """How peaks are picked from one normalised map at image resolution."""

    kernel_size: int
    """Side of the window, odd pixels, in which a peak must be the maximum."""
    value_thresh: float = 0.9
    """Lowest value of a peak, in (0, 1]."""
    max_candidates: int = 25
    """Only so many of the highest window maxima are looked at."""
    distance: Literal["l1", "l2"] = "l1"
    """Peaks keep apart: ``l1``, as in the released code, by (kernel_size - 1) // 2 city blocks;
    ``l2``, as in the paper, by more than kernel_size / 2 pixels."""

    def __post_init__(self) -> None:
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {self.kernel_size}")
        if not 0 < self.value_thresh <= 1:
            raise ValueError(f"value_thresh must be in (0, 1], got {self.value_thresh}")
        if self.max_candidates < 1:
            raise ValueError(f"max_candidates must be positive, got {self.max_candidates}")


CAM_PEAKS = PeakConfig(kernel_size=17)
"""For coarse and fine class activation maps."""
CROSS_PEAKS = PeakConfig(kernel_size=129)
"""For cross-attention maps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """Peaks of one map, highest first."""

    points: NDArray[np.int64]
    """[n, 2], (x, y) pixels."""
    scores: NDArray[np.float32]
    """[n], the map's value there."""


def normalize_maps(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Min-max normalise each map of [..., h, w] to [0, 1]; a constant map becomes all zero.

    Source:
        WeakTr: (m - min) / (max - min + 1e-8).
    """
    low, scale = normalization(maps)
    return (maps - low) * scale


def normalization(
    maps: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What ``normalize_maps`` subtracts from, then multiplies with, each map; both [..., 1, 1]."""
    low = maps.min(axis=(-2, -1), keepdims=True)
    high = maps.max(axis=(-2, -1), keepdims=True)
    return low, 1 / (high - low + _EPSILON)


def peak_points(activation_map: NDArray[np.float32], config: PeakConfig) -> Peaks:
    """The peaks of one map.

    A candidate is a pixel that equals the maximum of its window. Of the ``max_candidates`` highest
    candidates (ties in row order), taken from the highest down, each is kept unless it lies too
    near a kept one; values below ``value_thresh`` never become peaks. Because of that last rule
    only pixels at or above the threshold are ever looked at.

    Args:
        activation_map: [h, w], normalised to [0, 1], at image resolution.
        config: Window, threshold and distance.

    Returns:
        No peaks if no value reaches the threshold.

    Source:
        WeakSAM (arXiv:2402.14812) algorithm 1. ``l1`` is the distance of the released code,
        ``l2`` that of the paper.
    """
    width = activation_map.shape[1]
    ys, xs = np.divmod(np.flatnonzero(activation_map >= config.value_thresh), width)
    points = _highest_window_maxima(activation_map, ys, xs, config)
    kept = points[keep_apart(points, config)]
    return Peaks(points=kept, scores=activation_map[kept[:, 1], kept[:, 0]])


def _highest_window_maxima(
    values: NDArray[np.float32], ys: NDArray[np.int64], xs: NDArray[np.int64], config: PeakConfig
) -> NDArray[np.int64]:
    """The ``max_candidates`` highest window maxima, [n, 2] as (x, y), among the pixels (ys, xs).

    The pixels are all those at or above the threshold, in row order. A window maximum is at least
    as high as its direct neighbours, which few pixels of a smooth map are. Those few are visited
    from the highest down and compared with their whole windows; each visited pixel, maximum or not,
    rules out every lower pixel in its window, so visits stay far apart. Where plateaus make them
    many all the same, the window maximum of the whole region is cheaper. Both ways are exact.
    """
    radius = config.kernel_size // 2
    if radius > 0:
        summit = _is_not_below_neighbours(values, ys, xs)
        ys, xs = ys[summit], xs[summit]
    order = np.argsort(-values[ys, xs], kind="stable")
    ys, xs = ys[order], xs[order]

    def window_maxima(ys: NDArray[np.int64], xs: NDArray[np.int64]) -> NDArray[np.float32]:
        tops, lefts = (ys - radius).clip(0), (xs - radius).clip(0)
        windows = zip(tops, ys + radius + 1, lefts, xs + radius + 1, strict=True)
        return np.array([values[y:y_end, x:x_end].max() for y, y_end, x, x_end in windows])

    found = visit_window_maxima(ys, xs, values[ys, xs], config, window_maxima)
    if found is None:
        found = _window_maxima_of_region(values, ys, xs, radius)[: config.max_candidates]
    return np.stack([xs, ys], axis=1)[found]


def visit_window_maxima(
    ys: NDArray[np.int64],
    xs: NDArray[np.int64],
    heights: NDArray[np.float32],
    config: PeakConfig,
    window_maxima: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]],
) -> list[int] | None:
    """Positions of the first ``max_candidates`` window maxima among pixels, highest first.

    Args:
        ys: [n], rows of the pixels, in the order of visits: highest first, ties in row order. The
            map's highest pixels are among them.
        xs: [n], their columns.
        heights: [n], their values.
        config: Window and number.
        window_maxima: The maxima of the windows around pixels (ys, xs).

    Returns:
        None where plateaus would take too many visits.
    """
    radius = config.kernel_size // 2

    def not_ruled_out(members: NDArray[np.int64], rulers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The members that have none of the rulers above them in their window."""
        is_ruled = heights[members, None] < heights[rulers]
        is_ruled &= np.abs(ys[members, None] - ys[rulers]) <= radius
        is_ruled &= np.abs(xs[members, None] - xs[rulers]) <= radius
        return members[~is_ruled.any(axis=1)]

    # One point of each height: those of a plateau lie together and rule out the same ones.
    rulers = np.flatnonzero(np.diff(heights, prepend=np.float32(np.inf)))[:_NUM_RULERS]
    possible = not_ruled_out(np.arange(len(ys)), rulers)
    found: list[int] = []
    num_visits = 0
    while len(possible) and len(found) < config.max_candidates:
        if num_visits > _MANY_VISITS:
            return None
        num_next = min(config.max_candidates - len(found), _MANY_VISITS)
        visited, possible = possible[:num_next], possible[num_next:]
        # Nothing is above the first height: it needs no look at its window.
        is_maximum = heights[visited] == heights[0]
        others = visited[~is_maximum]
        if len(others):
            is_maximum[~is_maximum] = window_maxima(ys[others], xs[others]) == heights[others]
        found.extend(visited[is_maximum].tolist())
        num_visits += len(visited) - int(is_maximum.sum())
        if len(found) < config.max_candidates:
            possible = not_ruled_out(possible, visited)
    return found


def _is_not_below_neighbours(
    values: NDArray[np.float32], ys: NDArray[np.int64], xs: NDArray[np.int64]
) -> NDArray[np.bool_]:
    height, width = values.shape
    flat = values.ravel()
    centre = flat[ys * width + xs]
    rows = [(ys + d).clip(0, height - 1) * width for d in (-1, 0, 1)]
    columns = [(xs + d).clip(0, width - 1) for d in (-1, 0, 1)]
    summit = np.ones(len(ys), dtype=bool)
    for row in rows:
        for column in columns:
            summit &= centre >= flat[row + column]
    return summit


def _window_maxima_of_region(
    values: NDArray[np.float32], ys: NDArray[np.int64], xs: NDArray[np.int64], radius: int
) -> list[int]:
    """Positions of all window maxima among the summits (ys, xs), highest first as these are."""
    top, left = max(0, ys.min() - radius), max(0, xs.min() - radius)
    region = values[top : ys.max() + radius + 1, left : xs.max() + radius + 1]
    region_max = _window_maximum(_window_maximum(region, radius).T, radius).T
    is_maximum = values[ys, xs] == region_max[ys - top, xs - left]
    return np.flatnonzero(is_maximum).tolist()


def _window_maximum(values: NDArray[np.float32], radius: int) -> NDArray[np.float32]:
    """Maximum over 2 * radius + 1 columns around each pixel, in constant time per pixel.

    Source:
        van Herk (1992), Gil and Werman (1993): running maxima from both ends of blocks as long as
        the window.
    """
    height, width = values.shape
    window = 2 * radius + 1
    padded_width = -(-(width + 2 * radius) // window) * window
    padded = np.full((height, padded_width), -np.inf, dtype=values.dtype)
    padded[:, radius : radius + width] = values
    blocks = padded.reshape(height, -1, window)
    from_left = np.maximum.accumulate(blocks, axis=2).reshape(height, -1)
    from_right = np.maximum.accumulate(blocks[:, :, ::-1], axis=2)[:, :, ::-1].reshape(height, -1)
    return np.maximum(from_right[:, :width], from_left[:, window - 1 : window - 1 + width])


def keep_apart(points: NDArray[np.int64], config: PeakConfig) -> list[int]:
    """Positions of the points that are not too near an earlier kept one."""
    kept: list[int] = []
    remaining = np.arange(len(points))
    while len(remaining):
        first, remaining = int(remaining[0]), remaining[1:]
        kept.append(first)
        remaining = remaining[~too_near(points[remaining] - points[first], config)]
    return kept


def too_near(offsets: NDArray[np.int64], config: PeakConfig) -> NDArray[np.bool_]:
    """Whether points this far [n, 2] from each other are too near for two peaks."""
    if config.distance == "l1":
        return np.abs(offsets).sum(axis=1) < (config.kernel_size - 1) // 2
    return np.square(offsets).sum(axis=1) <= (config.kernel_size / 2) ** 2
