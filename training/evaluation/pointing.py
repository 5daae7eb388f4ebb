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


def pointing_accuracy(folder: CocoFolder, prompts: Mapping[int, PointPrompts]) -> PointingAccuracy:
    """Score point prompts by image id against the boxes of ``folder``; for evaluation only.

    Classes that are not in the image (predicted wrongly) and images without prompts do not count.
    """
    hits: dict[PromptSource, list[bool]] = {source: [] for source in PromptSource}
    for record in folder.records:
        found = prompts.get(record.image_id)
        if found is None:
            continue
        for source in (PromptSource.COARSE, PromptSource.FINE):
            hits[source] += _hits_of_classes(record, found, source)
        points = found.points[found.sources == PromptSource.CROSS]
        hits[PromptSource.CROSS] += [_is_inside(point, record.boxes) for point in points]
    share = {s: float(np.mean(h)) if h else float("nan") for s, h in hits.items()}
    return PointingAccuracy(
        coarse=share[PromptSource.COARSE],
        fine=share[PromptSource.FINE],
        cross=share[PromptSource.CROSS],
        num_pairs=len(hits[PromptSource.FINE]),
    )


def _hits_of_classes(
    record: ImageRecord, prompts: PointPrompts, source: PromptSource
) -> list[bool]:
    hits = []
    for tag in record.tags:
        members = np.flatnonzero((prompts.sources == source) & (prompts.class_ids == tag))
        if len(members):
            highest = members[prompts.scores[members].argmax()]
            hits.append(_is_inside(prompts.points[highest], record.boxes[record.labels == tag]))
    return hits


def _is_inside(point: NDArray[np.float32], boxes: NDArray[np.float32]) -> bool:
    """Pixel (x, y) covers [x, x + 1) by [y, y + 1); its centre counts."""
    centre = point + 0.5
    return bool(((boxes[:, :2] <= centre) & (centre <= boxes[:, 2:])).all(axis=1).any())
