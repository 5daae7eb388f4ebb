"""The pointing game: does the highest peak of a class lie on an object of the class?"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.data.coco import CocoFolder, ImageRecord
from weaksam_rt.types import PointPrompts, PromptSource


@dataclass(frozen=True, kw_only=True, slots=True)
class PointingAccuracy:
    """Shares in [0, 1]; nan where there is nothing to count."""

    coarse: float
    """Of the (image, class) pairs with coarse peaks, those whose highest lies in a true box."""
    fine: float
    """As ``coarse``, of fine peaks."""
    cross: float
    """Of all cross-attention prompts, those in a true box of any class."""
    num_pairs: int
    """(image, class) pairs that are truly there and have a fine peak."""


class PointingCounter:
    """``pointing_accuracy`` image by image: holds counts, no prompts."""

    def __init__(self) -> None:
        self._num_hits = dict.fromkeys(PromptSource, 0)
        self._num = dict.fromkeys(PromptSource, 0)

    def add(self, record: ImageRecord, prompts: PointPrompts) -> None:
        """Count the prompts of one image."""
        points = prompts.points[prompts.sources == PromptSource.CROSS]
        hits = {
            source: _hits_of_classes(record, prompts, source)
            for source in (PromptSource.COARSE, PromptSource.FINE)
        }
        hits[PromptSource.CROSS] = [
            _is_inside(point, record.boxes) for point in points if record.has_known_boxes
        ]
        for source, of_source in hits.items():
            self._num_hits[source] += sum(of_source)
            self._num[source] += len(of_source)

    def result(self) -> PointingAccuracy:
        """Of all images so far."""
        share = {
            source: self._num_hits[source] / num if num else float("nan")
            for source, num in self._num.items()
        }
        return PointingAccuracy(
            coarse=share[PromptSource.COARSE],
            fine=share[PromptSource.FINE],
            cross=share[PromptSource.CROSS],
            num_pairs=self._num[PromptSource.FINE],
        )


def pointing_accuracy(folder: CocoFolder, prompts: Mapping[int, PointPrompts]) -> PointingAccuracy:
    """Score point prompts by image id against the boxes of ``folder``; for evaluation only.

    Classes that are not in the image (predicted wrongly), images without prompts and tags without
    a box of their class do not count.
    """
    counter = PointingCounter()
    for record in folder.records:
        if record.image_id in prompts:
            counter.add(record, prompts[record.image_id])
    return counter.result()


def _hits_of_classes(
    record: ImageRecord, prompts: PointPrompts, source: PromptSource
) -> list[bool]:
    hits = []
    for tag in record.tags:
        if tag not in record.labels:
            continue
        members = np.flatnonzero((prompts.sources == source) & (prompts.class_ids == tag))
        if len(members):
            highest = members[prompts.scores[members].argmax()]
            hits.append(_is_inside(prompts.points[highest], record.boxes[record.labels == tag]))
    return hits


def _is_inside(point: NDArray[np.float32], boxes: NDArray[np.float32]) -> bool:
    """Pixel (x, y) covers [x, x + 1) by [y, y + 1); its centre counts."""
    centre = point + 0.5
    return bool(((boxes[:, :2] <= centre) & (centre <= boxes[:, 2:])).all(axis=1).any())
