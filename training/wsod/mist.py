"""Multiple instance self-training: a branch trusts several separate boxes of each class, so that
an image with three dogs teaches three dogs.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchvision.ops import box_iou

from training.wsod.refinement import Seeds


@dataclass(frozen=True, kw_only=True, slots=True)
class MistConfig:
    """How a branch's scores become labels for the next."""

    top_share: float = 0.15
    """Share of the RoIs, in (0, 1], that are candidates of a class: those with its best scores, at
    least one."""
    separation_thresh: float = 0.2
    """IoU in (0, 1] with a better candidate from which on a candidate is no seed."""
    foreground_thresh: float = 0.5
    """Least IoU in [0, 1] with a seed for an RoI to take its class."""
    first_branch_weight: float = 3.0
    """Weight of the first branch's loss, above 0; the others have 1."""

    def __post_init__(self) -> None:
        if not (0 < self.top_share <= 1 and 0 < self.separation_thresh <= 1):
            raise ValueError(f"MIST needs a top share and a separation in (0, 1], got {self}")
        if not 0 <= self.foreground_thresh <= 1 or self.first_branch_weight <= 0:
            raise ValueError(
                f"MIST needs a foreground_thresh in [0, 1] and a positive weight, got {self}"
            )


def select_seeds(
    scores: Float[Tensor, "n c"],
    boxes: Float[Tensor, "n 4"],
    tags: Float[Tensor, " c"],
    config: MistConfig,
) -> Seeds:
    """The RoIs that a branch trusts, best score first.

    Args:
        scores: Without background, at least 0.
        boxes: XYXY, any frame.
        tags: 1 where the class is in the image, else 0.
        config: The rule.

    Returns:
        At least one seed for each present class; empty without RoIs. One RoI may be the seed of
        two classes.

    Source:
        MIST (arXiv:2004.04725), algorithm 1, with the constants of WeakSAM (arXiv:2402.14812). As
        in the released code a candidate has to be apart from *every* better one, also from those
        that are no seeds, and a class of fewer than ten RoIs has one candidate.
    """
    pairs = [torch.zeros((0, 2), dtype=torch.int64, device=scores.device)]
    num_candidates = max(1, int(config.top_share * len(boxes)))
    for label in torch.nonzero(tags).flatten().tolist() if len(boxes) else []:
        order = scores[:, label].argsort(descending=True, stable=True)[:num_candidates]
        index = order[is_separate(boxes[order], config.separation_thresh)]
        pairs.append(torch.stack([index, torch.full_like(index, label)], dim=1))
    rois, classes = torch.cat(pairs).unbind(dim=1)
    seed_scores = scores[rois, classes]
    order = seed_scores.argsort(descending=True, stable=True)
    return Seeds(boxes=boxes[rois[order]], labels=classes[order] + 1, scores=seed_scores[order])


def is_separate(boxes: Float[Tensor, "n 4"], thresh: float) -> Bool[Tensor, " n"]:
    """Which boxes overlap every earlier one by an IoU below ``thresh``; the first always does."""
    overlap = box_iou(boxes, boxes).triu(diagonal=1)  # [earlier, later]
    return overlap.amax(dim=0) < thresh
