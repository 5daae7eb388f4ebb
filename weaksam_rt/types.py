"""The values that cross package borders: frozen, NumPy, checked once when they are made.

All coordinates are pixels of the original image; boxes are XYXY, points (x, y), sizes (height,
width).
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

ImageSize = tuple[int, int]
"""(height, width) in pixels."""

NO_CLASS = -1
"""The class id of a prompt or proposal that belongs to no class."""


class PromptSource(IntEnum):
    """Where a point prompt came from; the numbers are part of the serving contract."""

    GRID = 0
    COARSE = 1
    FINE = 2
    CROSS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class PointPrompts:
    """Points to prompt SAM with. Empty is a valid value: no peaks means no prompts."""

    points: NDArray[np.float32]
    """[n, 2], (x, y)."""
    scores: NDArray[np.float32]
    """[n], the normalised activation at the point in [0, 1]; 1 for grid points and cluster
    centres.
    """
    class_ids: NDArray[np.int32]
    """[n], 0-based class or ``NO_CLASS``."""
    sources: NDArray[np.int32]
    """[n], values of ``PromptSource``."""

    def __post_init__(self) -> None:
        _check(self, "points", np.float32, (len(self.points), 2))
        for name, dtype in (("scores", np.float32), ("class_ids", np.int32), ("sources", np.int32)):
            _check(self, name, dtype, (len(self.points),))

    def __len__(self) -> int:
        return len(self.points)

    def subset(self, positions: NDArray[np.int64]) -> "PointPrompts":
        """The prompts at ``positions``, in that order."""
        return PointPrompts(
            points=self.points[positions],
            scores=self.scores[positions],
            class_ids=self.class_ids[positions],
            sources=self.sources[positions],
        )

    @staticmethod
    def concatenate(parts: "list[PointPrompts]") -> "PointPrompts":
        """All prompts of ``parts`` in their order; an empty list gives empty prompts."""
        empty = PointPrompts(
            points=np.zeros((0, 2), np.float32),
            scores=np.zeros(0, np.float32),
            class_ids=np.zeros(0, np.int32),
            sources=np.zeros(0, np.int32),
        )
        parts = [empty, *parts]
        return PointPrompts(
            points=np.concatenate([p.points for p in parts]),
            scores=np.concatenate([p.scores for p in parts]),
            class_ids=np.concatenate([p.class_ids for p in parts]),
            sources=np.concatenate([p.sources for p in parts]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposals:
    """Class-agnostic boxes around SAM's masks, in the order grid, coarse, fine, cross."""

    boxes: NDArray[np.float32]
    """[n, 4]."""
    scores: NDArray[np.float32]
    """[n], SAM's predicted IoU, about [0, 1]."""
    sources: NDArray[np.int32]
    """[n], values of ``PromptSource``."""
    image_size: ImageSize

    def __post_init__(self) -> None:
        _check(self, "boxes", np.float32, (len(self.boxes), 4))
        _check(self, "scores", np.float32, (len(self.boxes),))
        _check(self, "sources", np.int32, (len(self.boxes),))

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceMasks:
    """Binary masks of one image as COCO run-length encodings."""

    rle_counts: tuple[bytes, ...]
    """COCO's compressed ``counts`` of each mask."""
    image_size: ImageSize

    def __len__(self) -> int:
        return len(self.rle_counts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Detections:
    """What was found in one image, best score first."""

    boxes: NDArray[np.float32]
    """[n, 4]."""
    scores: NDArray[np.float32]
    """[n], in [0, 1]."""
    labels: NDArray[np.int64]
    """[n], 0-based positions in the model's class names."""
    image_size: ImageSize
    masks: InstanceMasks | None = None
    """One mask per box, if asked for."""

    def __post_init__(self) -> None:
        _check(self, "boxes", np.float32, (len(self.boxes), 4))
        _check(self, "scores", np.float32, (len(self.boxes),))
        _check(self, "labels", np.int64, (len(self.boxes),))
        if self.masks is not None and len(self.masks) != len(self.boxes):
            raise ValueError(f"got {len(self.masks)} masks for {len(self.boxes)} boxes")

    def __len__(self) -> int:
        return len(self.boxes)

    def take(self, index: NDArray[Any]) -> "Detections":
        """The detections at ``index`` (positions or a boolean mask), in that order."""
        positions = np.arange(len(self))[index]
        masks = None
        if self.masks is not None:
            counts = tuple(self.masks.rle_counts[i] for i in positions)
            masks = InstanceMasks(rle_counts=counts, image_size=self.image_size)
        return Detections(
            boxes=self.boxes[positions],
            scores=self.scores[positions],
            labels=self.labels[positions],
            image_size=self.image_size,
            masks=masks,
        )

    @staticmethod
    def empty(image_size: ImageSize) -> "Detections":
        """Nothing was found."""
        return Detections(
            boxes=np.zeros((0, 4), np.float32),
            scores=np.zeros(0, np.float32),
            labels=np.zeros(0, np.int64),
            image_size=image_size,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentResult:
    """SAM's masks of p prompts, m for each: three with ``multimask``, else one."""

    mask_counts: tuple[tuple[bytes, ...], ...]
    """[p][m], COCO run-length counts."""
    boxes: NDArray[np.float32]
    """[p, m, 4], around each mask; zeros for an empty one."""
    scores: NDArray[np.float32]
    """[p, m], SAM's predicted IoU."""
    stability_scores: NDArray[np.float32]
    """[p, m], in [0, 1], of the masks as SAM's decoder gave them, the frame's padding left out."""
    image_size: ImageSize


def _check(owner: object, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    array = getattr(owner, name)
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(
            f"{type(owner).__name__}.{name}: expected {np.dtype(dtype)} {list(shape)}, "
            f"got {array.dtype} {list(array.shape)}"
        )
