"""Activation maps to peak points. Knows maps and pixels, not models."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_EPSILON = 1e-8
_MANY_SURVIVORS = 64
"""Above this many points to verify one by one, filtering the whole region is cheaper."""


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
    """Peaks keep apart: ``l1`` by (kernel_size - 1) // 2 city blocks, ``l2`` by more than
    kernel_size / 2 pixels."""

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
    low = maps.min(axis=(-2, -1), keepdims=True)
    high = maps.max(axis=(-2, -1), keepdims=True)
    return (maps - low) * (1 / (high - low + _EPSILON))


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
    ys, xs = np.nonzero(activation_map >= config.value_thresh)
    if len(ys) == 0:
        return Peaks(points=np.zeros((0, 2), np.int64), scores=np.zeros(0, np.float32))
    is_candidate = _is_window_maximum(activation_map, ys, xs, config.kernel_size // 2)
    ys, xs = ys[is_candidate], xs[is_candidate]
    values = activation_map[ys, xs]
    order = np.argsort(-values, kind="stable")[: config.max_candidates]
    kept = _keep_apart(np.stack([xs, ys], axis=1)[order], config)
    return Peaks(points=np.stack([xs, ys], axis=1)[order][kept], scores=values[order][kept])


def _is_window_maximum(
    values: NDArray[np.float32], ys: NDArray[np.int64], xs: NDArray[np.int64], radius: int
) -> NDArray[np.bool_]:
    """Which pixels (ys, xs), all those at or above the threshold, are maxima of their windows.

    A window maximum is above all its direct neighbours, which few pixels of a smooth map are; only
    those are compared with their whole windows. On maps with plateaus many survive; then the window
    maximum of the whole region is cheaper. Both are exact.
    """
    survives = np.ones(len(ys), dtype=bool)
    if radius == 0:
        return survives
    height, width = values.shape
    centre = values[ys, xs]
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)):
        neighbour = values[(ys + dy).clip(0, height - 1), (xs + dx).clip(0, width - 1)]
        survives &= centre >= neighbour
    remaining = np.flatnonzero(survives)
    if len(remaining) > _MANY_SURVIVORS:
        # Whatever exceeds a pixel above the threshold lies in the box around all such pixels.
        top, left = ys.min(), xs.min()
        region = values[top : ys.max() + 1, left : xs.max() + 1]
        region_max = _window_maximum(_window_maximum(region, radius).T, radius).T
        return centre == region_max[ys - top, xs - left]
    for i in remaining:
        y, x = ys[i], xs[i]
        window = values[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
        survives[i] = window.max() <= centre[i]
    return survives


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


def _keep_apart(points: NDArray[np.int64], config: PeakConfig) -> NDArray[np.int64]:
    kept: list[int] = []
    for i, point in enumerate(points):
        offsets = np.abs(points[kept] - point)
        if config.distance == "l1":
            is_near = offsets.sum(axis=1) < (config.kernel_size - 1) // 2
        else:
            is_near = np.square(offsets).sum(axis=1) <= (config.kernel_size / 2) ** 2
        if not is_near.any():
            kept.append(i)
    return np.array(kept, dtype=np.int64)
