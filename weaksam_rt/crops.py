"""Overlapping parts of an image, which a model of fixed input size sees larger."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.boxes import Boxes
from weaksam_rt.types import ImageSize

_OVERLAP = 0.25
"""Share of a crop's side that its neighbour shows too: what is smaller is whole in one of them."""
_CUT_MARGIN = 0.02
"""A box that ends nearer to an inner edge than this share of the crop's longest side is taken for
cut: a mask rarely ends on the edge exactly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """A rectangle of whole pixels inside an image."""

    x: int
    y: int
    width: int
    height: int
    image_size: ImageSize
    """Of the whole image."""

    @property
    def size(self) -> ImageSize:
        """(height, width) of the crop."""
        return self.height, self.width

    @property
    def offset(self) -> NDArray[np.float32]:
        """(x, y) of its top left corner in the image, [2]."""
        return np.array([self.x, self.y], np.float32)

    def of(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Its pixels, [height, width, 3], a copy."""
        rows = slice(self.y, self.y + self.height)
        return np.ascontiguousarray(image[rows, self.x : self.x + self.width])

    def boxes_in_image(self, boxes: Boxes) -> Boxes:
        """Boxes of the crop's frame in the image's, [n, 4]."""
        return boxes + np.tile(self.offset, 2)

    def is_cut(self, boxes: Boxes) -> NDArray[np.bool_]:
        """Which boxes, in the crop's frame, reach an edge that is none of the image: what they
        hold goes on outside. [n].
        """
        margin = _CUT_MARGIN * max(self.size)
        height, width = self.image_size
        inner_first = np.array([self.x > 0, self.y > 0])
        inner_last = np.array([self.x + self.width < width, self.y + self.height < height])
        first = (boxes[:, :2] < margin) & inner_first
        last = (boxes[:, 2:] > np.array([self.width, self.height]) - margin) & inner_last
        return (first | last).any(axis=1)


def image_crops(image_size: ImageSize, per_side: int) -> Iterator[Crop]:
    """``per_side`` x ``per_side`` crops of equal size that cover an image, in row order.

    Source:
        The crops of SAM's automatic mask generator, here of any number and a quarter shared.
    """
    height, width = image_size
    crop_height, crop_width = (_crop_side(side, per_side) for side in image_size)
    for y in _starts(height, crop_height, per_side):
        for x in _starts(width, crop_width, per_side):
            yield Crop(x=x, y=y, width=crop_width, height=crop_height, image_size=image_size)


def _crop_side(side: int, per_side: int) -> int:
    return min(side, int(np.ceil(side / (per_side - (per_side - 1) * _OVERLAP))))


def _starts(side: int, crop_side: int, per_side: int) -> list[int]:
    return [int(start) for start in np.linspace(0, side - crop_side, per_side).round()]
