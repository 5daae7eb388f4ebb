"""Peaks of many upsampled maps at once without the upsampled maps: the fast way on a CPU, with
equal results.

Pixels between the same four nodes form a *cell*, in which the map is bilinear. Its value at any
pixel follows from the cell's *corners*, the first and last pixel along each axis, but for rounding
errors, whose bound is known (``_Surface.error``). So a pixel beside a corner that is higher by more
than the bound allows needs no look. Of 14x14 nodes on 375x500 pixels, 0.4 % are corners. Where a
cell is so flat that errors could decide, the map counts as *unclear* and is searched in full; few
are.

The first and last pixels of an axis repeat a node (edges do not rise). They are left out of cells:
whatever holds for the last one that differs holds for its *copies*, each in its own window.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.class_activation_map import (
    PeakConfig,
    Peaks,
    normalization,
    normalize_maps,
    peak_points,
    too_near,
)
from weaksam_rt.preprocessing import AxisSamples, axis_samples, interpolate, upsample_maps
from weaksam_rt.prompt_clustering._reference import is_usable
from weaksam_rt.types import ImageSize

Ints = NDArray[np.int64]
_ROUNDING = 2.0**-22
"""Four times float32's rounding error: twice what a difference of two values can be off."""
_MARGIN = 1.1
"""Bounds are computed with rounding errors of their own."""
_WINDOWS_AT_ONCE = 1024
"""So many windows are compared at a time, which keeps them in the processor's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Axis:
    """One axis of the image, by its distinct pixels [first, last]."""

    samples: AxisSamples
    first: int
    """Pixels before it repeat it."""
    last: int
    """Pixels after it repeat it."""
    ends: Ints
    """[e], first and last pixel of each cell, ascending, each once."""
    mates: Ints
    """[e], position of the other end of the cell; its own where no pixel lies between them."""
    steps: Ints
    """[e], pixels from an end to its mate."""

    def copies_of(self, ends: Ints) -> tuple[Ints, Ints]:
        """First and last pixel that repeats each of these ends, by position."""
        pixels = self.ends[ends]
        starts = np.where(pixels == self.first, 0, pixels)
        stops = np.where(pixels == self.last, len(self.samples.low) - 1, pixels)
        return starts, stops

    def window(self, starts: Ints, stops: Ints, radius: int) -> tuple[Ints, Ints]:
        """Distinct pixels, both inclusive, of the windows around [starts, stops]."""
        border = np.stack([starts - radius, stops + radius]).clip(self.first, self.last)
        return border[0], border[1]

    def inside(self, starts: Ints, stops: Ints) -> "_EndsInside":
        """The ends in each window."""
        begin = np.searchsorted(self.ends, starts)
        end = np.searchsorted(self.ends, stops, side="right")
        positions = begin[:, None] + np.arange(max(1, int((end - begin).max(initial=0))))
        positions = positions.clip(max=np.maximum(end - 1, 0)[:, None])
        return _EndsInside(positions=positions, is_any=end > begin)

    def beside(self, pixels: Ints, starts: Ints, stops: Ints) -> Ints:
        """[n, 3], the end before, the pixel itself, the end after; none beyond the window."""
        before = self.ends[(np.searchsorted(self.ends, pixels) - 1).clip(0)]
        position = np.searchsorted(self.ends, pixels, side="right")
        after = self.ends[position.clip(max=len(self.ends) - 1)]
        return np.stack([before.clip(starts, pixels), pixels, after.clip(pixels, stops)], axis=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _EndsInside:
    """Ends of an axis in each of n windows."""

    positions: Ints
    """[n, most]; a window with fewer repeats its last one."""
    is_any: NDArray[np.bool_]
    """[n], False: the positions of this window are not in it."""

    def pixels(self, axis: _Axis, starts: Ints, stops: Ints) -> Ints:
        """[n, most + 2]: the window's own first and last pixel, and the ends in it."""
        ends = np.where(self.is_any[:, None], axis.ends[self.positions], starts[:, None])
        return np.concatenate([starts[:, None], stops[:, None], ends], axis=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Surface:
    """Normalised maps, computed where they are looked at."""

    nodes: NDArray[np.float32]
    """[m, h, w]."""
    down: _Axis
    right: _Axis
    corners: NDArray[np.float32]
    """[m, ends down, ends right], normalised."""
    low: NDArray[np.float32]
    """[m], least value before normalisation."""
    scale: NDArray[np.float32]
    """[m]."""
    error: NDArray[np.float32]
    """[m], how far the difference of two pixels can be off a bilinear map's."""

    @property
    def most_steps(self) -> int:
        """Of the longest cell."""
        return int(max(self.down.steps.max(), self.right.steps.max()))

    def at(self, maps: Ints, ys: Ints, xs: Ints) -> NDArray[np.float32]:
        """Values at pixels (ys, xs) of maps, which broadcast."""
        _, height, width = self.nodes.shape
        down, right = self.down.samples, self.right.samples
        start = maps * (height * width)
        upper, lower = start + down.low[ys] * width, start + down.high[ys] * width
        before, after, weight = right.low[xs], right.high[xs], right.weight[xs]
        flat = self.nodes.ravel()
        above = interpolate(flat[upper + before], flat[upper + after], weight)
        below = interpolate(flat[lower + before], flat[lower + after], weight)
        return (interpolate(above, below, down.weight[ys]) - self.low[maps]) * self.scale[maps]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pixels:
    """Blocks of equal pixels that repeat one corner; most blocks are one pixel."""

    maps: Ints
    """[n]."""
    tops: Ints
    """[n], first row; ``bottoms`` is the last."""
    bottoms: Ints
    lefts: Ints
    """[n], first column; ``rights`` is the last."""
    rights: Ints
    heights: NDArray[np.float32]
    """[n], the value."""

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, members: NDArray[Any] | slice) -> "_Pixels":
        return _Pixels(**{name: getattr(self, name)[members] for name in self.__slots__})

    def apart(self, most: int | None = None) -> "_Pixels":
        """Each pixel for itself, in row order; of each block the first ``most``."""
        columns = self.rights - self.lefts + 1
        counts = (self.bottoms - self.tops + 1) * columns
        if most is not None:
            counts = counts.clip(max=most)
        block = np.repeat(np.arange(len(self)), counts)
        rank = np.arange(len(block)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows, offsets = np.divmod(rank, columns[block])
        ys, xs = self.tops[block] + rows, self.lefts[block] + offsets
        return _Pixels(
            maps=self.maps[block], tops=ys, bottoms=ys, lefts=xs, rights=xs,
            heights=self.heights[block],
        )  # fmt: skip


def low_res_peaks(
    nodes: NDArray[np.float32], image_size: ImageSize, config: PeakConfig
) -> list[Peaks]:
    """``peak_points`` of each map, upsampled to the image and normalised.

    Args:
        nodes: [m, h, w]. A map with values or differences that are not finite has no peaks.
        image_size: (height, width) of the image.
        config: Window, threshold and distance.
    """
    # A constant map is zero after normalisation, and no threshold is.
    is_constant = nodes.max(axis=(1, 2)) == nodes.min(axis=(1, 2))
    searched = np.flatnonzero(is_usable(nodes) & ~is_constant)
    peaks = [Peaks(points=np.zeros((0, 2), np.int64), scores=np.zeros(0, np.float32))] * len(nodes)
    unclear = np.ones(len(searched), bool)
    # With windows of one pixel every pixel is a maximum.
    if len(searched) and config.kernel_size > 1:
        surface = _surface(nodes[searched], image_size)
        maxima, unclear = _window_maxima(surface, config)
        all_found = _peaks(maxima, len(searched), config, image_size[1])
        for position, found in zip(searched, all_found, strict=True):
            peaks[position] = found
    for position in searched[unclear]:
        values = normalize_maps(upsample_maps(nodes[position], image_size))
        peaks[position] = peak_points(values, config)
    return peaks


def normalized_corners(nodes: NDArray[np.float32], image_size: ImageSize) -> NDArray[np.float32]:
    """What min-max normalisation costs here: the corners of usable maps [m, h, w], in [0, 1]."""
    return _surface(nodes, image_size).corners


@lru_cache(maxsize=64)
def _axis(num_out: int, num_in: int) -> _Axis:
    samples = axis_samples(num_out, num_in)
    last = min(int(np.searchsorted(samples.low, num_in - 1)), num_out - 1)
    # Before the first node's centre the weight stays 0.
    num_first = int(np.count_nonzero((samples.low == 0) & (samples.weight == 0)))
    first = min(max(num_first - 1, 0), last)
    starts = first + np.flatnonzero(np.diff(samples.low[first : last + 1], prepend=-1))
    stops = np.append(starts[1:] - 1, last)
    ends = np.unique(np.concatenate([starts, stops]))
    mates = np.arange(len(ends))
    wide = stops - starts > 1
    pairs = np.searchsorted(ends, starts[wide]), np.searchsorted(ends, stops[wide])
    mates[pairs[0]], mates[pairs[1]] = pairs[1], pairs[0]
    return _Axis(
        samples=samples, first=first, last=last, ends=ends, mates=mates,
        steps=np.abs(ends - ends[mates]),
    )  # fmt: skip


def _surface(nodes: NDArray[np.float32], image_size: ImageSize) -> _Surface:
    down, right = _axis(image_size[0], nodes.shape[1]), _axis(image_size[1], nodes.shape[2])
    columns, rows = right.ends, down.ends
    wide = interpolate(
        nodes[:, :, right.samples.low[columns]],
        nodes[:, :, right.samples.high[columns]],
        right.samples.weight[columns],
    )
    corners = interpolate(
        wide[:, down.samples.low[rows]],
        wide[:, down.samples.high[rows]],
        down.samples.weight[rows][:, None],
    )
    low, scale = normalization(corners)
    corners -= low
    corners *= scale
    largest = np.abs(nodes).max(axis=(1, 2)).astype(np.float64)
    # Rounding errors of a value: 7 times the largest node's, of its normalisation: twice its own.
    error = _MARGIN * _ROUNDING * (7 * largest * scale[:, 0, 0] + 2)
    # Above 1 everything is uncertain.
    error = np.minimum(error, 2)
    return _Surface(
        nodes=nodes, down=down, right=right, corners=corners, low=low[:, 0, 0],
        scale=scale[:, 0, 0], error=error.astype(np.float32),
    )  # fmt: skip


def _window_maxima(surface: _Surface, config: PeakConfig) -> tuple[_Pixels, NDArray[np.bool_]]:
    """All window maxima at or above the threshold, and which maps are unclear."""
    unclear = _has_uncertain_minimum(surface)
    thresh = np.float32(config.value_thresh)
    bound = np.minimum(thresh, surface.corners.max(axis=(1, 2))) - surface.error
    positions = np.flatnonzero(surface.corners >= bound[:, None, None])
    maps, rows, columns = np.unravel_index(positions, surface.corners.shape)
    unclear[maps[_may_hide_a_maximum(surface, maps, rows, columns)]] = True

    heights = surface.corners.ravel()[positions]
    keep = np.flatnonzero((heights >= thresh) & ~unclear[maps])
    maps, rows, columns, heights = maps[keep], rows[keep], columns[keep], heights[keep]
    summit = _is_not_below_corners_beside(surface, maps, rows, columns, config.kernel_size // 2)
    maps, rows, columns, heights = maps[summit], rows[summit], columns[summit], heights[summit]
    tops, bottoms = surface.down.copies_of(rows)
    lefts, rights = surface.right.copies_of(columns)
    blocks = _Pixels(
        maps=maps, tops=tops, bottoms=bottoms, lefts=lefts, rights=rights, heights=heights
    )
    is_maximum, uncertain = _compare_with_windows(surface, blocks, config)
    unclear[maps[uncertain]] = True
    # What is higher may lie in the windows of some of the copies only.
    others = blocks[~is_maximum & ((bottoms > tops) | (rights > lefts))].apart()
    other_is_maximum, uncertain = _compare_with_windows(surface, others, config)
    unclear[others.maps[uncertain]] = True
    found = [blocks[is_maximum].apart(config.max_candidates), others[other_is_maximum]]
    return _joined(found), unclear


def _joined(parts: list[_Pixels]) -> _Pixels:
    return _Pixels(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in _Pixels.__slots__})


def _has_uncertain_minimum(surface: _Surface) -> NDArray[np.bool_]:
    """Whether a pixel between corners could lie below all corners of a map."""
    # Of nodes that are not negative, none below zero can come.
    is_certain = (surface.low == 0) & (surface.nodes.min(axis=(1, 2)) >= 0)
    limit = np.where(is_certain, np.float32(-1), surface.error)
    maps, rows, columns = np.nonzero(surface.corners <= limit[:, None, None])
    falls, is_other = _falls_in_cell(surface, maps, rows, columns)
    is_alone = np.where(is_other, -falls, np.inf).min(axis=0) > _gap(surface, maps)
    uncertain = np.zeros(len(surface.nodes), bool)
    uncertain[maps[~is_alone]] = True
    return uncertain


def _gap(surface: _Surface, maps: Ints) -> NDArray[np.float32]:
    """A corner that is farther than this from the other corners of its cell is its only extreme:
    any other pixel has at least 1 / steps of its value from those.
    """
    return (surface.most_steps + 2) * surface.error[maps]


def _falls_in_cell(
    surface: _Surface, maps: Ints, rows: Ints, columns: Ints
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """How far it falls from corners [n] to the others of their cells, [3, n]: along the column,
    along the row, diagonally; and whether pixels lie between.
    """
    other_rows, other_columns = surface.down.mates[rows], surface.right.mates[columns]
    others = (
        surface.corners[maps, other_rows, columns],
        surface.corners[maps, rows, other_columns],
        surface.corners[maps, other_rows, other_columns],
    )
    has_rows, has_columns = other_rows != rows, other_columns != columns
    is_other = np.stack([has_rows, has_columns, has_rows | has_columns])
    return surface.corners[maps, rows, columns] - np.stack(others), is_other


def _may_hide_a_maximum(
    surface: _Surface, maps: Ints, rows: Ints, columns: Ints
) -> NDArray[np.bool_]:
    """Whether a pixel between a corner and the others of its cell could be a window maximum, or
    above all corners of the map.

    A window maximum is not below its neighbours. On an edge of the cell that bounds the rise from
    pixel to pixel, and inside the cell, where the diagonal neighbours count, its change too.
    """
    falls, is_other = _falls_in_cell(surface, maps, rows, columns)
    down, right = surface.down.steps[rows], surface.right.steps[columns]
    error = surface.error[maps]
    rises, twist = np.abs(falls[:2]), np.abs(falls[0] + falls[1] - falls[2])
    is_flat_edge = is_other[:2] & (rises <= (np.stack([down, right]) + 1) * error)
    is_flat_inside = is_other[0] & is_other[1] & (twist <= (down * right + 2) * error)
    is_flat_inside &= rises[0] <= (down * (right + 1) + 1) * error
    is_flat_inside &= rises[1] <= (right * (down + 1) + 1) * error
    highest = surface.corners.max(axis=(1, 2))[maps]
    is_near_highest = surface.corners[maps, rows, columns] >= highest - error
    is_alone = np.where(is_other, falls, np.inf).min(axis=0) > _gap(surface, maps)
    return is_flat_edge.any(axis=0) | is_flat_inside | (is_near_highest & ~is_alone)


def _is_not_below_corners_beside(
    surface: _Surface, maps: Ints, rows: Ints, columns: Ints, radius: int
) -> NDArray[np.bool_]:
    """Whether no corner next to one, and within the radius of all its copies, is higher."""
    heights = surface.corners[maps, rows, columns]
    is_summit = np.ones(len(maps), bool)
    for other_rows in _near_ends(surface.down, rows, radius):
        for other_columns in _near_ends(surface.right, columns, radius):
            is_summit &= heights >= surface.corners[maps, other_rows, other_columns]
    return is_summit


def _near_ends(axis: _Axis, ends: Ints, radius: int) -> list[Ints]:
    starts, stops = axis.copies_of(ends)
    before, after = (ends - 1).clip(0), (ends + 1).clip(max=len(axis.ends) - 1)
    return [
        np.where(stops - axis.ends[before] <= radius, before, ends),
        ends,
        np.where(axis.ends[after] - starts <= radius, after, ends),
    ]


def _compare_with_windows(
    surface: _Surface, blocks: _Pixels, config: PeakConfig
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether nothing is higher in the windows of all pixels of a block; whether that is
    uncertain.
    """
    is_maximum, uncertain = np.zeros(len(blocks), bool), np.zeros(len(blocks), bool)
    for start in range(0, len(blocks), _WINDOWS_AT_ONCE):
        part = slice(start, start + _WINDOWS_AT_ONCE)
        is_maximum[part], uncertain[part] = _compare(surface, blocks[part], config)
    return is_maximum, uncertain


def _compare(
    surface: _Surface, blocks: _Pixels, config: PeakConfig
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    radius = config.kernel_size // 2
    tops, bottoms = surface.down.window(blocks.tops, blocks.bottoms, radius)
    lefts, rights = surface.right.window(blocks.lefts, blocks.rights, radius)
    rows, columns = surface.down.inside(tops, bottoms), surface.right.inside(lefts, rights)
    corners = surface.corners[
        blocks.maps[:, None, None], rows.positions[:, :, None], columns.positions[:, None, :]
    ]
    is_higher = (corners > blocks.heights[:, None, None]).any(axis=(1, 2))
    is_higher &= rows.is_any & columns.is_any
    left = np.flatnonzero(~is_higher)

    maps, heights = blocks.maps[left], blocks.heights[left, None, None]
    ys = rows.pixels(surface.down, tops, bottoms)[left]
    xs = columns.pixels(surface.right, lefts, rights)[left]
    values = surface.at(maps[:, None, None], ys[:, :, None], xs[:, None, :])
    is_higher[left] = (values > heights).any(axis=(1, 2))
    is_near = values > heights - surface.error[maps][:, None, None]
    is_near[is_higher[left]] = False
    window, row, column = np.nonzero(is_near)
    block, y, x = left[window], ys[window, row], xs[window, column]
    ys = surface.down.beside(y, tops[block], bottoms[block])
    xs = surface.right.beside(x, lefts[block], rights[block])
    others = surface.at(blocks.maps[block, None, None], ys[:, :, None], xs[:, None, :])
    has_between = (np.abs(ys - y[:, None]) > 1)[:, :, None] | (np.abs(xs - x[:, None]) > 1)[:, None]
    limit = blocks.heights[block] - _gap(surface, blocks.maps[block])
    uncertain = np.zeros(len(blocks), bool)
    uncertain[block[(has_between & (others > limit[:, None, None])).any(axis=(1, 2))]] = True
    return ~is_higher, uncertain


def _peaks(maxima: _Pixels, num_maps: int, config: PeakConfig, width: int) -> list[Peaks]:
    """The peaks of each map among its window maxima."""
    order = np.lexsort((maxima.tops * width + maxima.lefts, -maxima.heights, maxima.maps))
    maps = maxima.maps[order]
    rank = np.arange(len(maps)) - np.searchsorted(maps, maps)
    order = order[rank < config.max_candidates]
    points = np.stack([maxima.lefts, maxima.tops], axis=1)[order]
    kept = _keep_apart(points, maxima.maps[order], config)
    starts = np.searchsorted(maxima.maps[order][kept], np.arange(num_maps + 1))
    points, scores = points[kept], maxima.heights[order][kept]
    return [
        Peaks(points=points[start:stop], scores=scores[start:stop])
        for start, stop in pairwise(starts.tolist())
    ]


def _keep_apart(points: Ints, maps: Ints, config: PeakConfig) -> Ints:
    """``keep_apart`` of all maps at once, one kept point of each map at a time; ``maps`` rises."""
    kept = [np.zeros(0, np.int64)]
    remaining = np.arange(len(points))
    while len(remaining):
        of_map = maps[remaining]
        is_first = np.diff(of_map, prepend=-1) != 0
        kept.append(remaining[is_first])
        leaders = kept[-1][np.cumsum(is_first) - 1]
        is_near = too_near(points[remaining] - points[leaders], config)
        remaining = remaining[~is_near & ~is_first]
    return np.sort(np.concatenate(kept))
