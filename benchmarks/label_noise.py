"""Wrong boxes in a known share: what a detector meets that learns from pseudo boxes."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from training.data.coco import CocoFolder, ImageRecord
from weaksam_rt.boxes import box_iou

_MAX_TRIES = 20
_SAME_PLACE_IOU = 0.3


def with_label_noise(folder: CocoFolder, share: float, seed: int) -> CocoFolder:
    """The folder with a share of its boxes made wrong, each box independently.

    A wrong box is, with equal chance, named after another class, moved to another place in the
    image (IoU with where it was below 0.3 where 20 draws find such a place), or missing. Masks are
    dropped; tags stay.

    Args:
        folder: True boxes.
        share: Chance of a box to become wrong, in [0, 1].
        seed: Of all draws; the boxes that are wrong at a lower share are wrong at a higher one too.

    Raises:
        ValueError: The share is not in [0, 1], or there is only one class to be confused with.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share of wrong boxes must be in [0, 1], got {share}")
    if share > 0 and len(folder.class_names) < 2:
        raise ValueError(f"label noise needs at least 2 classes, {folder.root} has one")
    records = tuple(
        _spoil(record, share, len(folder.class_names), np.random.default_rng((seed, position)))
        for position, record in enumerate(folder.records)
    )
    return replace(folder, records=records)


def _spoil(
    record: ImageRecord, share: float, num_classes: int, generator: np.random.Generator
) -> ImageRecord:
    num_boxes = len(record.boxes)
    is_wrong = generator.random(num_boxes) < share
    kinds = generator.integers(0, 3, num_boxes)
    others = generator.integers(1, max(2, num_classes), num_boxes)
    is_renamed, is_moved = is_wrong & (kinds == 0), is_wrong & (kinds == 1)
    labels = np.where(is_renamed, (record.labels + others) % num_classes, record.labels)
    boxes = record.boxes.copy()
    for index in np.flatnonzero(is_moved):
        boxes[index] = _elsewhere(boxes[index], record.image_size, generator)
    stays = ~(is_wrong & (kinds == 2))
    return replace(
        record,
        boxes=boxes[stays],
        labels=labels[stays].astype(np.int64),
        is_crowd=record.is_crowd[stays],
        segmentations=(),
        given_tags=record.tags,
    )


def _elsewhere(
    box: NDArray[np.float32], image_size: tuple[int, int], generator: np.random.Generator
) -> NDArray[np.float32]:
    """A box of the same size at a random place; the last draw where none is far enough."""
    size = box[2:] - box[:2]
    room = np.maximum(np.array(image_size[::-1], np.float32) - size, 0)
    moved = box
    for _ in range(_MAX_TRIES):
        corner = (generator.random(2) * room).astype(np.float32)
        moved = np.concatenate([corner, corner + size])
        if box_iou(moved[None], box[None])[0, 0] < _SAME_PLACE_IOU:
            break
    return moved
