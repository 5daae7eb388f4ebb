"""Prompts for SAM, packed so that one decoder call takes many prompts of many images."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.preprocessing import ModelFrame
from weaksam_rt.types import NO_CLASS, ImageSize, PointPrompts, PromptSource

PADDING = -1
BACKGROUND = 0
FOREGROUND = 1
BOX_TOP_LEFT = 2
BOX_BOTTOM_RIGHT = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class SamPrompt:
    """One prompt as SAM's decoder sees it: labelled points of the original image, box corners
    too.
    """

    points: NDArray[np.float32]
    """[k, 2], (x, y), k >= 1."""
    labels: NDArray[np.int32]
    """[k], ``FOREGROUND``, ``BACKGROUND``, ``PADDING`` or a box corner."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedPrompts:
    """Prompts with equally many points, ready for one call of ``sam_mask_decoder``."""

    point_coords: NDArray[np.float32]
    """[p, k, 2], (x, y) in the model frame."""
    point_labels: NDArray[np.int32]
    """[p, k]."""
    image_index: NDArray[np.int32]
    """[p], position of each prompt's image."""
    positions: NDArray[np.int64]
    """[p], position of each prompt in the unpacked list of its image."""


def point_prompt(points: NDArray[np.float32], labels: NDArray[np.int32]) -> SamPrompt:
    """A prompt of points alone; SAM was trained to see one padding point after them."""
    padding = np.zeros((1, 2), np.float32), np.array([PADDING], np.int32)
    return SamPrompt(
        points=np.concatenate([points, padding[0]]), labels=np.concatenate([labels, padding[1]])
    )


def box_prompt(
    box: NDArray[np.float32],
    points: NDArray[np.float32] | None = None,
    labels: NDArray[np.int32] | None = None,
) -> SamPrompt:
    """A prompt of a box XYXY [4], optionally with points before it; no padding point."""
    corners = box.reshape(2, 2).astype(np.float32)
    corner_labels = np.array([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], np.int32)
    if points is None or labels is None:
        return SamPrompt(points=corners, labels=corner_labels)
    return SamPrompt(
        points=np.concatenate([points, corners]), labels=np.concatenate([labels, corner_labels])
    )


def grid_prompts(points_per_side: int, image_size: ImageSize) -> PointPrompts:
    """The centres of ``points_per_side`` x ``points_per_side`` cells, in row order; 0 gives none.

    Source:
        WeakSAM's spatial prompts; the points of SAM's automatic mask generator.
    """
    height, width = image_size
    steps = (np.arange(points_per_side) + 0.5) / max(points_per_side, 1)
    xs, ys = np.meshgrid(steps * width, steps * height)
    num = points_per_side**2
    return PointPrompts(
        points=np.stack([xs.ravel(), ys.ravel()], axis=1).astype(np.float32),
        scores=np.ones(num, np.float32),
        class_ids=np.full(num, NO_CLASS, np.int32),
        sources=np.full(num, PromptSource.GRID, np.int32),
    )


def sam_prompts(prompts: PointPrompts) -> list[SamPrompt]:
    """One prompt for each point."""
    label = np.array([FOREGROUND], np.int32)
    return [point_prompt(point[None], label) for point in prompts.points]


def class_prompts(prompts: PointPrompts) -> list[SamPrompt]:
    """For each class of the given points, in class order, one prompt of all its points together.

    Source:
        WeakSAM, the class-aware prompts of coarse and fine maps. A class with a single point gives
        none: it would repeat that point's own prompt.
    """
    groups = (np.flatnonzero(prompts.class_ids == c) for c in np.unique(prompts.class_ids))
    return [
        point_prompt(prompts.points[members], np.full(len(members), FOREGROUND, np.int32))
        for members in groups
        if len(members) > 1
    ]


def pack_prompts(
    prompts: Sequence[Sequence[SamPrompt]],
    frames: Sequence[ModelFrame],
    *,
    max_prompts: int,
) -> Iterator[PackedPrompts]:
    """Group the prompts of several images by their number of points and cut the groups into calls.

    Prompts of different lengths are never padded to match: each padding point is a token that SAM
    attends to, so padding would change the masks.

    Args:
        prompts: For each image its prompts.
        frames: For each image its model frame.
        max_prompts: Most prompts of one call; bounds the memory of the decoder.
    """
    by_length = defaultdict(list)
    for image, image_prompts in enumerate(prompts):
        for position, prompt in enumerate(image_prompts):
            by_length[len(prompt.points)].append((image, position, prompt))
    for _, group in sorted(by_length.items()):
        for start in range(0, len(group), max_prompts):
            yield _pack(group[start : start + max_prompts], frames)


def _pack(
    group: Sequence[tuple[int, int, SamPrompt]], frames: Sequence[ModelFrame]
) -> PackedPrompts:
    images = np.array([image for image, _, _ in group], np.int32)
    points = np.stack([prompt.points for _, _, prompt in group])
    for image in np.unique(images):
        points[images == image] = frames[image].to_model(points[images == image])
    return PackedPrompts(
        point_coords=points,
        point_labels=np.stack([prompt.labels for _, _, prompt in group]),
        image_index=images,
        positions=np.array([position for _, position, _ in group], np.int64),
    )
