"""Peaks of upsampled maps without the upsampled maps: the fast way on a CPU, with equal results.

Rows between the same two rows of nodes form a *block*. Within a block and a column the upsampled
value never changes direction (``preprocessing.interpolate``), rounding included, so its extremes
lie in the block's first and last row: the *end rows*, a tenth of all rows or less. A pixel in
another row can only be a window maximum where the column of its block is flat; such columns are
rare and looked at in full. Everything else is decided on end rows.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.class_activation_map import (
    PeakConfig,
    Peaks,
    keep_apart,
    normalization,
    normalize_maps,
    peak_points,
    visit_window_maxima,
)
from weaksam_rt.preprocessing import AxisSamples, axis_samples, interpolate, upsample_maps
from weaksam_rt.prompt_clustering._reference import is_usable
from weaksam_rt.types import ImageSize

_MANY_FLAT_PIXELS = 4096
"""With more of them, a map is mostly plateaus and searching all its pixels is faster."""
_ROUNDING = 2.0**-22
"""Four times float32's rounding error: twice what a difference of two values can be off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Blocks:
    """The blocks of an axis of the image."""

    first: NDArray[np.int64]
    """[b], first row of each block."""
    last: NDArray[np.int64]
    """[b], last row."""
    end_rows: NDArray[np.int64]
    """[e], all first and last rows, ascending, each once."""
    first_end: NDArray[np.int64]
    """[b], position of ``first`` in ``end_rows``."""
    last_end: NDArray[np.int64]
    """[b], position of ``last``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _EndRows:
    """The part of one normalised map that decides."""

    nodes: NDArray[np.float32]
    """[h, w]."""
    wide: NDArray[np.float32]
    """[h, W], interpolated along x only, not normalised."""
    ends: NDArray[np.float32]
    """[e, W], the end rows, normalised."""
    low: np.float32
    scale: np.float32
    blocks: _Blocks
    down: AxisSamples

    def pixels(self, ys: NDArray[np.int64], xs: NDArray[np.int64]) -> NDArray[np.float32]:
        """Normalised values at (ys, xs), which broadcast."""
        above, below = self.wide[self.down.low[ys], xs], self.wide[self.down.high[ys], xs]
        return (interpolate(above, below, self.down.weight[ys]) - self.low) * self.scale


def low_res_peaks(
    nodes: NDArray[np.float32], image_size: ImageSize, config: PeakConfig
) -> list[Peaks]:
    """``peak_points`` of each map, upsampled to the image and normalised.

    Args:
        nodes: [m, h, w]. A map with values or differences that are not finite has no peaks.
        image_size: (height, width) of the image.
        config: Window, threshold and distance.
    """
    usable = is_usable(nodes)
    found = iter(_peaks_of_usable(nodes[usable], image_size, config))
    return [next(found) if is_good else _no_peaks() for is_good in usable]


def _no_peaks() -> Peaks:
    return Peaks(points=np.zeros((0, 2), np.int64), scores=np.zeros(0, np.float32))


def _peaks_of_usable(
    nodes: NDArray[np.float32], image_size: ImageSize, config: PeakConfig
) -> list[Peaks]:
    if len(nodes) == 0:
        return []
    down = axis_samples(image_size[0], nodes.shape[1])
    right = axis_samples(image_size[1], nodes.shape[2])
    blocks = _blocks(image_size[0], nodes.shape[1])
    wide = interpolate(nodes[:, :, right.low], nodes[:, :, right.high], right.weight)
    rows = blocks.end_rows
    ends = interpolate(
        wide[:, down.low[rows]], wide[:, down.high[rows]], down.weight[rows][:, None]
    )
    low, scale = normalization(ends)
    ends -= low
    ends *= scale
    return [
        _peaks(
            _EndRows(
                nodes=nodes[i], wide=wide[i], ends=ends[i], low=low[i, 0, 0],
                scale=scale[i, 0, 0], blocks=blocks, down=down,
            ),
            config,
        )
        for i in range(len(nodes))
    ]  # fmt: skip


def _peaks(rows: _EndRows, config: PeakConfig) -> Peaks:
    flat = _flat_pixels(rows, config)
    if flat is None or config.kernel_size == 1:
        return _peaks_of_all_pixels(rows, config)
    ys, xs, heights = _possible_maxima(rows, config)
    ys, xs = np.concatenate([ys, flat[0]]), np.concatenate([xs, flat[1]])
    heights = np.concatenate([heights, flat[2]])
    order = np.lexsort((ys * rows.ends.shape[1] + xs, -heights))
    ys, xs, heights = ys[order], xs[order], heights[order]

    window_maxima = partial(_window_maxima, rows, config.kernel_size // 2)
    found = visit_window_maxima(ys, xs, heights, config, window_maxima)
    if found is None:
        return _peaks_of_all_pixels(rows, config)
    points = np.stack([xs, ys], axis=1)[found]
    kept = keep_apart(points, config)
    return Peaks(points=points[kept], scores=heights[found][kept])


def _peaks_of_all_pixels(rows: _EndRows, config: PeakConfig) -> Peaks:
    size = (len(rows.down.low), rows.ends.shape[1])
    return peak_points(normalize_maps(upsample_maps(rows.nodes, size)), config)


def _possible_maxima(
    rows: _EndRows, config: PeakConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Rows, columns and values of end-row pixels not below the threshold or their neighbours.

    The end row before or after is a neighbour too if it is within the window.
    """
    end_rows, width = rows.blocks.end_rows, rows.ends.shape[1]
    values = rows.ends.ravel()
    positions = np.flatnonzero(values >= np.float32(config.value_thresh))
    heights = values[positions]
    ends, columns = np.divmod(positions, width)
    steps = np.diff(end_rows) <= config.kernel_size // 2
    has_above, has_below = np.append(False, steps), np.append(steps, False)
    neighbours = np.stack(
        [
            positions - (columns > 0),
            positions + (columns < width - 1),
            positions - width * has_above[ends],
            positions + width * has_below[ends],
        ]
    )
    summit = (heights >= values[neighbours]).all(axis=0)
    return end_rows[ends[summit]], columns[summit], heights[summit]


def _flat_pixels(
    rows: _EndRows, config: PeakConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]] | None:
    """All pixels between the end rows of flat columns of blocks; None if they are many.

    Equal neighbours in a column mean that the column's whole rise over its block is not above the
    rounding errors of as many values as the block has rows.
    """
    blocks = rows.blocks
    first, last = rows.ends[blocks.first_end], rows.ends[blocks.last_end]
    num_rows = blocks.last - blocks.first
    # Rounding errors of a value: 7 times the largest node's, of its normalisation: twice its own.
    error = _ROUNDING * (7 * float(np.abs(rows.nodes).max()) * float(rows.scale) + 2)
    is_flat = np.abs(last - first) <= (num_rows * error)[:, None]
    is_flat &= np.maximum(first, last) >= np.float32(config.value_thresh)
    is_flat &= (num_rows > 1)[:, None]
    block, xs = np.nonzero(is_flat)
    counts = num_rows[block] - 1
    if counts.sum() > _MANY_FLAT_PIXELS:
        return None
    starts = np.cumsum(counts) - counts
    ys = np.arange(counts.sum()) - np.repeat(starts - blocks.first[block] - 1, counts)
    xs = np.repeat(xs, counts)
    heights = rows.pixels(ys, xs)
    reached = heights >= np.float32(config.value_thresh)
    return ys[reached], xs[reached], heights[reached]


def _window_maxima(
    rows: _EndRows, radius: int, ys: NDArray[np.int64], xs: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The maximum of each window: its end rows, and its own first and last row."""
    height, width = len(rows.down.low), rows.ends.shape[1]
    border = np.stack([ys - radius, ys + radius], axis=1).clip(0, height - 1)
    # Beyond the map its edge is repeated, which adds no value.
    columns = (xs[:, None] + np.arange(-radius, radius + 1)).clip(0, width - 1)[:, None]
    maxima = rows.pixels(border[:, :, None], columns).max(axis=(1, 2))
    starts = np.searchsorted(rows.blocks.end_rows, border[:, 0])
    stops = np.searchsorted(rows.blocks.end_rows, border[:, 1], side="right")
    num_ends = int((stops - starts).max())
    if num_ends == 0:
        return maxima
    # A window with fewer end rows than another repeats its last one; one with none counts for
    # nothing.
    inside = (starts[:, None] + np.arange(num_ends)).clip(max=np.maximum(stops - 1, 0)[:, None])
    of_ends = rows.ends[inside[:, :, None], columns].max(axis=(1, 2))
    return np.where(starts < stops, np.maximum(maxima, of_ends), maxima)


@lru_cache(maxsize=64)
def _blocks(num_out: int, num_in: int) -> _Blocks:
    samples = axis_samples(num_out, num_in)
    # Before the first node's centre the weight stays 0 and the value constant: a block of its own.
    part = 2 * samples.low + (samples.weight > 0)
    part[samples.low > 0] |= 1
    starts = np.flatnonzero(np.diff(part, prepend=-1))
    first, last = starts, np.append(starts[1:], num_out) - 1
    end_rows = np.unique(np.concatenate([first, last]))
    return _Blocks(
        first=first,
        last=last,
        end_rows=end_rows,
        first_end=np.searchsorted(end_rows, first),
        last_end=np.searchsorted(end_rows, last),
    )
