"""SAM's answers to proposals: which masks count, which boxes go."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.boxes import Boxes, nms
from weaksam_rt.types import ImageSize, PromptSource, Proposals

SourceName = Literal["grid", "coarse", "fine", "cross"]
SOURCE_NAMES: tuple[SourceName, ...] = get_args(SourceName)
"""Of the values of ``PromptSource``, in their order."""

_TO_LAST_PIXEL = np.array([0, 0, 1, 1], np.float32)
"""From our boxes, which end after a mask's last pixel, to ``segment_anything``'s, which end on it:
small ones overlap less there, and its generator suppresses by that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProposalConfig:
    """From point prompts to proposals: which points, which of SAM's masks, which boxes stay.

    Source:
        WeakSAM's released settings. The last two rules, ``min_side_px`` and that exact copies of an
        earlier box go, are those of the detector that reads the proposals.
    """

    sources: tuple[SourceName, ...] = ("grid", "coarse", "fine", "cross")
    """The prompts that are used: a grid, peaks of coarse and of fine maps, clustered peaks of
    cross-attention maps. At least one."""
    points_per_side: int = 32
    """Grid points along each side; 0: no grid."""
    crops_per_side: tuple[int, ...] = ()
    """So many by so many overlapping crops of the image get a grid too, each number at least 2;
    (2, 3): 4 and 9 crops. SAM sees small objects larger there. A crop costs one more pass of the
    encoder, and a quarter of the whole image's grid points: half as many along each side. Empty,
    as published: the whole image only."""
    grid_masks: tuple[int, ...] = (0, 1, 2)
    """Which of SAM's three masks of a grid point count, smallest part first."""
    peak_masks: tuple[int, ...] = (1, 2)
    """Which of SAM's three masks of a peak count: the first is the smallest part and left out."""
    class_prompts: bool = True
    """All coarse peaks of a class, and all its fine peaks, are also one prompt together."""
    grid_iou_thresh: float = 0.3
    """Grid masks with a predicted IoU below this go, in [0, 1]."""
    grid_stability_thresh: float = 0.3
    """Grid masks with a stability score below this go, in [0, 1]."""
    grid_nms_thresh: float = 0.3
    """Grid boxes that overlap a better one by more than this IoU go."""
    cross_nms_thresh: float = 0.9
    """Cross-attention boxes that overlap an earlier one by more than this IoU go."""
    min_side_px: float = 20.0
    """Boxes narrower or lower than this go, in pixels of the original image."""
    max_prompts_per_call: int = 64
    """Prompts of one decoder call."""
    full_resolution_boxes: bool = False
    """Boxes, stability scores near their threshold, and suppression of the grid as
    ``segment_anything``'s generator has them, from masks at the image's resolution. Without, they
    come from low-resolution logits: faster, and those of small and ragged masks differ."""

    def __post_init__(self) -> None:
        if not self.sources or not set(self.sources) <= set(SOURCE_NAMES):
            raise ValueError(f"sources must be some of {SOURCE_NAMES}, got {self.sources}")
        for name in ("grid_masks", "peak_masks"):
            masks = getattr(self, name)
            if not masks or sorted(set(masks)) != list(masks) or not set(masks) <= {0, 1, 2}:
                raise ValueError(f"{name} must be some of 0, 1, 2, ascending, got {masks}")
        lowest = {"min_side_px": 0, "points_per_side": 0, "max_prompts_per_call": 1}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if sorted({1, *self.crops_per_side}) != [1, *self.crops_per_side]:
            raise ValueError(
                f"crops_per_side must be numbers from 2, ascending, got {self.crops_per_side}"
            )
        for name in (
            "grid_iou_thresh",
            "grid_stability_thresh",
            "grid_nms_thresh",
            "cross_nms_thresh",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptedBoxes:
    """One box for each mask that SAM gave, n masks in the order of their prompts."""

    boxes: Boxes
    """[n, 4]."""
    iou_predictions: NDArray[np.float32]
    """[n]."""
    stability: NDArray[np.float32]
    """[n]."""
    sources: NDArray[np.int32]
    """[n], values of ``PromptSource``."""

    def subset(self, positions: NDArray[np.int64] | NDArray[np.bool_]) -> "PromptedBoxes":
        """The boxes at ``positions``, in that order."""
        return PromptedBoxes(
            boxes=self.boxes[positions],
            iou_predictions=self.iou_predictions[positions],
            stability=self.stability[positions],
            sources=self.sources[positions],
        )

    @staticmethod
    def concatenate(parts: "Sequence[PromptedBoxes]") -> "PromptedBoxes":
        """All boxes of ``parts`` in their order; none gives no boxes."""
        return PromptedBoxes(
            boxes=np.concatenate([np.zeros((0, 4), np.float32), *(p.boxes for p in parts)]),
            iou_predictions=np.concatenate(
                [np.zeros(0, np.float32), *(p.iou_predictions for p in parts)]
            ),
            stability=np.concatenate([np.zeros(0, np.float32), *(p.stability for p in parts)]),
            sources=np.concatenate([np.zeros(0, np.int32), *(p.sources for p in parts)]),
        )


def passes_scores(
    sources: NDArray[np.int32],
    iou_predictions: NDArray[np.float32],
    stability: NDArray[np.float32],
    config: ProposalConfig,
) -> NDArray[np.bool_]:
    """Which masks pass the score filters of their source, [n]; only the grid has any."""
    is_good = (iou_predictions >= config.grid_iou_thresh) & (
        stability >= config.grid_stability_thresh
    )
    return is_good | (sources != PromptSource.GRID)


def select_proposals(
    prompted: PromptedBoxes, image_size: ImageSize, config: ProposalConfig
) -> Proposals:
    """Filter each source by its own rule, then drop small and duplicate boxes over all sources.

    Grid boxes are filtered by SAM's scores and suppressed by IoU; coarse and fine boxes all stay;
    cross boxes only lose near-duplicates. There is no joint suppression: the detector that learns
    from the proposals needs the overlapping ones.

    Returns:
        In the order grid, coarse, fine, cross; grid best first, the others in prompt order.
    """
    keep = np.concatenate([_keep_of_source(prompted, s, config) for s in PromptSource])
    sides = prompted.boxes[keep, 2:] - prompted.boxes[keep, :2]
    keep = keep[(sides >= config.min_side_px).all(axis=1)]
    _, first = np.unique(prompted.boxes[keep], axis=0, return_index=True)
    keep = keep[np.sort(first)]
    return Proposals(
        boxes=prompted.boxes[keep],
        scores=prompted.iou_predictions[keep],
        sources=prompted.sources[keep],
        image_size=image_size,
    )


def _keep_of_source(
    prompted: PromptedBoxes, source: PromptSource, config: ProposalConfig
) -> NDArray[np.int64]:
    members = np.flatnonzero(prompted.sources == source)
    if source == PromptSource.GRID:
        is_good = passes_scores(
            prompted.sources, prompted.iou_predictions, prompted.stability, config
        )
        members = members[is_good[members]]
        boxes = prompted.boxes[members]
        if config.full_resolution_boxes:
            boxes = boxes - _TO_LAST_PIXEL
        kept = nms(boxes, prompted.iou_predictions[members], config.grid_nms_thresh)
        return members[kept]
    if source == PromptSource.CROSS:
        in_order = np.zeros(len(members), np.float32)
        return members[np.sort(nms(prompted.boxes[members], in_order, config.cross_nms_thresh))]
    return members
