"""Online instance classifier refinement: each branch learns from the boxes that the one before it
trusts.

Pure functions on the RoIs of one image; the branches are linear layers of the detector.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchvision.ops import box_iou, nms

BACKGROUND = 0
"""Label of an RoI without object; class c has the label c + 1."""
_MARGIN = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class OicrConfig:
    """How a branch's scores become labels for the next."""

    num_refinements: int = 3
    """Branches."""
    seeds: Literal["near_best", "best"] = "near_best"
    """near_best: all RoIs almost as good as the class's best (WeakSAM's code). best: only the best
    one (the OICR paper)."""
    seed_share: float = 0.9
    """near_best: least score relative to the best, in [0, 1]."""
    seed_nms_thresh: float = 0.5
    """near_best: IoU in [0, 1] above which the lesser of two seeds, of any class, is dropped."""
    foreground_thresh: float = 0.5
    """Least IoU in [0, 1] with a seed for an RoI to take its class."""

    def __post_init__(self) -> None:
        shares = (self.seed_share, self.seed_nms_thresh, self.foreground_thresh)
        if not all(0 <= share <= 1 for share in shares) or self.num_refinements < 1:
            raise ValueError(f"OICR needs shares in [0, 1] and at least one branch, got {self}")


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Pseudo ground truth of one image; empty where no class is present."""

    boxes: Float[Tensor, "m 4"]
    labels: Int64[Tensor, " m"]
    """Class + 1."""
    scores: Float[Tensor, " m"]


@dataclass(frozen=True, kw_only=True)
class RoiTargets:
    """What a branch shall answer for each RoI."""

    labels: Int64[Tensor, " n"]
    """``BACKGROUND`` or class + 1."""
    weights: Float[Tensor, " n"]
    """Score of the seed that an RoI overlaps best, for background too."""


def select_seeds(
    scores: Float[Tensor, "n c"],
    boxes: Float[Tensor, "n 4"],
    tags: Float[Tensor, " c"],
    config: OicrConfig,
) -> Seeds:
    """The RoIs that a branch trusts, best score first.

    Args:
        scores: Without background, at least 0.
        boxes: XYXY, any frame.
        tags: 1 where the class is in the image, else 0.
        config: The rule.

    Source:
        WeakSAM (arXiv:2402.14812), released OICR code; ``best`` is OICR (arXiv:1704.00138), alg. 1.
    """
    pairs = [torch.zeros((0, 2), dtype=torch.int64, device=scores.device)]
    for label in torch.nonzero(tags).flatten().tolist() if len(boxes) else []:
        of_class = scores[:, label]
        if config.seeds == "best":
            index = of_class.argmax().reshape(1)
        else:
            index = torch.nonzero(of_class >= config.seed_share * of_class.max()).flatten()
        pairs.append(torch.stack([index, torch.full_like(index, label)], dim=1))
    rois, classes = torch.cat(pairs).unbind(dim=1)
    seed_scores = scores[rois, classes]
    if config.seeds == "near_best":
        keep = nms(boxes[rois], seed_scores, config.seed_nms_thresh)
    else:
        keep = seed_scores.argsort(descending=True)
    return Seeds(boxes=boxes[rois[keep]], labels=classes[keep] + 1, scores=seed_scores[keep])


def assign_rois(
    boxes: Float[Tensor, "n 4"], seeds: Seeds, *, foreground_thresh: float
) -> RoiTargets:
    """Each RoI takes the class of the seed that it overlaps best, or background below the
    threshold; without seeds nothing counts (all weights are 0).
    """
    if len(seeds.boxes) == 0:
        nothing = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return RoiTargets(labels=nothing, weights=nothing.to(boxes.dtype))
    best = box_iou(boxes, seeds.boxes).max(dim=1)
    labels = torch.where(
        best.values >= foreground_thresh,
        seeds.labels[best.indices],
        torch.full_like(best.indices, BACKGROUND),
    )
    return RoiTargets(labels=labels, weights=seeds.scores[best.indices])


def refinement_losses(logits: Float[Tensor, "n k"], targets: RoiTargets) -> Float[Tensor, " n"]:
    """Weighted cross-entropy of each RoI; the branch's loss is the mean.

    Args:
        logits: Background first.
        targets: Of ``assign_rois``.
    """
    probability = logits.softmax(dim=1)
    own = probability.gather(1, targets.labels[:, None])[:, 0]
    return -targets.weights * (own + _MARGIN).log()


def oicr_loss(
    mil_scores: Float[Tensor, "n c"],
    refinement_logits: list[Float[Tensor, "n k"]],
    boxes: Float[Tensor, "n 4"],
    tags: Float[Tensor, " c"],
    config: OicrConfig,
) -> Float[Tensor, ""]:
    """Sum of the branches' losses; branch 1 learns from ``mil_scores``, each other from the one
    before it. No gradient flows through the labels.
    """
    total = mil_scores.new_zeros(())
    source = mil_scores.detach()
    for logits in refinement_logits:
        seeds = select_seeds(source, boxes, tags, config)
        targets = assign_rois(boxes, seeds, foreground_thresh=config.foreground_thresh)
        total = total + refinement_losses(logits, targets).mean()
        source = logits.detach().softmax(dim=1)[:, 1:]
    return total
