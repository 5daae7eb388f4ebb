"""Masks at image resolution without the image's logits: the fast way on a CPU, with equal results.

A pixel is a mean of the few low-resolution nodes around it, but for rounding errors, whose bound is
known. Where these nodes are all above the threshold by more than the bound, or all below it, the
pixel needs no arithmetic: in masks of real images some 97 to 99 of 100 pixels. The others are
computed one by one, with the definition's operations in the definition's order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.masks import MASK_THRESHOLD
from weaksam_rt.preprocessing import ModelFrame, axis_samples, interpolate

Ints = NDArray[np.int32]
_ROUNDING = np.float32(1e-5)
"""Of the largest logit: 8 times what 4 interpolations after each other can be off in float32."""
_UNDERFLOW = np.float32(1e-40)
_PIXELS_AT_ONCE = 2**18
"""Of those that are computed: a mask whose logits are all near the threshold has many."""
_UNCLEAR, _INSIDE = 2, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class _FrameSamples:
    """For some pixels along one axis: a pixel of the frame, between two low-resolution nodes."""

    low: Ints
    high: Ints
    weight: NDArray[np.float32]

    def take(self, pixels: NDArray[np.int64]) -> "_FrameSamples":
        """Those of some pixels."""
        return _FrameSamples(
            low=self.low.take(pixels), high=self.high.take(pixels), weight=self.weight.take(pixels)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Axis:
    """For pixels of the image along one axis: between two pixels of the frame."""

    low: _FrameSamples
    high: _FrameSamples
    weight: NDArray[np.float32]

    def take(self, pixels: NDArray[np.int64]) -> "_Axis":
        """Those of some pixels."""
        return _Axis(
            low=self.low.take(pixels), high=self.high.take(pixels), weight=self.weight.take(pixels)
        )

    @property
    def reach(self) -> int:
        """Nodes that a pixel depends on at most; they follow each other from ``low.low``."""
        return int((self.high.high - self.low.low).max()) + 1


def inside_down_columns(logits: NDArray[np.float32], frame: ModelFrame) -> NDArray[np.bool_]:
    """Which pixels of the image are inside a mask, [w * h], down the columns.

    Args:
        logits: [m, m] over the model frame, finite, of at most 1e30.
        frame: Where the image lies in it.
    """
    (height, width), side = frame.image_size, len(logits)
    rows = _axis(height, frame.valid_size[0], frame.model_size, side)
    columns = _axis(width, frame.valid_size[1], frame.model_size, side)
    kinds = _kinds_of_windows(logits, rows.reach, columns.reach)
    pixels = kinds.T.take(columns.low.low, axis=0).take(rows.low.low, axis=1).ravel()
    is_inside = pixels == _INSIDE
    unclear = np.flatnonzero(pixels == _UNCLEAR)
    for begin in range(0, len(unclear), _PIXELS_AT_ONCE):
        chosen = unclear[begin : begin + _PIXELS_AT_ONCE]
        x, y = np.divmod(chosen, height)
        values = _values(logits, rows.take(y), columns.take(x))
        is_inside[chosen] = values > MASK_THRESHOLD
    return is_inside


def _kinds_of_windows(logits: NDArray[np.float32], height: int, width: int) -> NDArray[np.uint8]:
    """``_INSIDE``, ``_UNCLEAR`` or, outside, 0 for the window of nodes from each node on, [m, m];
    at the border windows are cut.
    """
    slack = _ROUNDING * max(logits.max(), -logits.min()) + _UNDERFLOW
    all_above = _over_windows(logits > MASK_THRESHOLD + slack, height, width, np.logical_and)
    any_near = _over_windows(logits > MASK_THRESHOLD - slack, height, width, np.logical_or)
    return all_above.astype(np.uint8) + np.uint8(_UNCLEAR) * any_near.astype(np.uint8)


def _over_windows(
    nodes: NDArray[np.bool_], height: int, width: int, combine: Callable[..., object]
) -> NDArray[np.bool_]:
    down = nodes.copy()
    for step in range(1, height):
        combine(down[:-step], nodes[step:], out=down[:-step])
    both = down.copy()
    for step in range(1, width):
        combine(both[:, :-step], down[:, step:], out=both[:, :-step])
    return both


def _values(logits: NDArray[np.float32], rows: _Axis, columns: _Axis) -> NDArray[np.float32]:
    """Logits of n pixels of the image, [n]; row and column i belong to pixel i."""
    above, below = (
        interpolate(
            _frame_values(logits, row, columns.low),
            _frame_values(logits, row, columns.high),
            columns.weight,
        )
        for row in (rows.low, rows.high)
    )
    return interpolate(above, below, rows.weight)


def _frame_values(
    logits: NDArray[np.float32], row: _FrameSamples, column: _FrameSamples
) -> NDArray[np.float32]:
    nodes, side = logits.ravel(), len(logits)
    top, bottom = (
        interpolate(
            nodes.take(nodes_of_row + column.low),
            nodes.take(nodes_of_row + column.high),
            column.weight,
        )
        for nodes_of_row in (row.low * side, row.high * side)
    )
    return interpolate(top, bottom, row.weight)


@lru_cache(maxsize=64)
def _axis(image: int, valid: int, model: int, side: int) -> _Axis:
    to_image, to_frame = axis_samples(image, valid), axis_samples(model, side)
    low, high = (
        _FrameSamples(
            low=to_frame.low[pixels].astype(np.int32),
            high=to_frame.high[pixels].astype(np.int32),
            weight=to_frame.weight[pixels],
        )
        for pixels in (to_image.low, to_image.high)
    )
    return _Axis(low=low, high=high, weight=to_image.weight)
