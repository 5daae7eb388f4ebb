"""Refinement: each branch learns classes, and optionally boxes, from the RoIs that the branch
before it trusts.

Pure functions on the RoIs of one image. Which RoIs are trusted is the one thing in which OICR
(``training.wsod.oicr``) and MIST (``training.wsod.mist``) differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection._utils import encode_boxes
from torchvision.ops import box_iou

BACKGROUND = 0
"""Label of an RoI without object; class c has the label c + 1."""
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""Scales of the encoded centre and size offsets."""
_MARGIN = 1e-6


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Pseudo ground truth of one image; empty where no class is present."""

    boxes: Float[Tensor, "m 4"]
    labels: Int64[Tensor, " m"]
    """Class + 1."""
    scores: Float[Tensor, " m"]


SelectSeeds = Callable[[Tensor, Tensor, Tensor], Seeds]
"""From scores [n, c], boxes [n, 4] and tags [c] to the seeds, best score first."""


@dataclass(frozen=True, kw_only=True)
class RoiTargets:
    """What a branch shall answer for each RoI."""

    labels: Int64[Tensor, " n"]
    """``BACKGROUND`` or class + 1."""
    weights: Float[Tensor, " n"]
    """Score of the seed that an RoI overlaps best, for background too."""
    boxes: Float[Tensor, "n 4"]
    """That seed's box; the RoI's own box where there is no seed."""


@dataclass(frozen=True, kw_only=True)
class BranchOutputs:
    """Answers of one branch."""

    logits: Float[Tensor, "n k"]
    """Background first."""
    offsets: Float[Tensor, "n k 4"] | None = None
    """Encoded boxes by class, background first; None for a branch that moves no boxes."""


@dataclass(frozen=True, kw_only=True)
class BranchLosses:
    """Losses of one branch, not reduced."""

    classification: Float[Tensor, " n"]
    regression: Float[Tensor, " n"]
    """0 for background and for a branch that moves no boxes."""

    def mean(self) -> Float[Tensor, ""]:
        """The branch's loss: both sums divided by the number of *all* RoIs."""
        return self.classification.mean() + self.regression.mean()


def assign_rois(
    boxes: Float[Tensor, "n 4"], seeds: Seeds, *, foreground_thresh: float
) -> RoiTargets:
    """Each RoI takes the class of the seed that it overlaps best, or background below the
    threshold; without seeds nothing counts (all weights are 0).
    """
    if len(seeds.boxes) == 0:
        nothing = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return RoiTargets(labels=nothing, weights=nothing.to(boxes.dtype), boxes=boxes)
    best = box_iou(boxes, seeds.boxes).max(dim=1)
    labels = torch.where(
        best.values >= foreground_thresh,
        seeds.labels[best.indices],
        torch.full_like(best.indices, BACKGROUND),
    )
    return RoiTargets(
        labels=labels, weights=seeds.scores[best.indices], boxes=seeds.boxes[best.indices]
    )


def classification_losses(logits: Float[Tensor, "n k"], targets: RoiTargets) -> Float[Tensor, " n"]:
    """Weighted cross-entropy of each RoI.

    Args:
        logits: Background first.
        targets: Of ``assign_rois``.
    """
    probability = logits.softmax(dim=1)
    own = probability.gather(1, targets.labels[:, None])[:, 0]
    return -targets.weights * (own + _MARGIN).log()


def regression_losses(
    offsets: Float[Tensor, "n k 4"], boxes: Float[Tensor, "n 4"], targets: RoiTargets
) -> Float[Tensor, " n"]:
    """Weighted smooth L1 error, summed over the four offsets of an RoI's own class; 0 for
    background.

    Args:
        offsets: By class, background first.
        boxes: The RoIs, XYXY, any frame.
        targets: Of ``assign_rois``, in the same frame.

    Source:
        Fast R-CNN (arXiv:1504.08083), section 2.3, with the weights of MIST.
    """
    own = offsets[torch.arange(len(boxes), device=boxes.device), targets.labels]
    wanted = encode_boxes(targets.boxes, boxes, boxes.new_tensor(BOX_WEIGHTS))
    errors = functional.smooth_l1_loss(own, wanted, beta=1.0, reduction="none").sum(dim=1)
    is_foreground = targets.labels != BACKGROUND
    return torch.where(is_foreground, targets.weights * errors, torch.zeros_like(errors))


def refine(
    mil_scores: Float[Tensor, "n c"],
    branches: Sequence[BranchOutputs],
    boxes: Float[Tensor, "n 4"],
    tags: Float[Tensor, " c"],
    *,
    select_seeds: SelectSeeds,
    foreground_thresh: float,
) -> list[BranchLosses]:
    """Losses of every RoI in every branch; branch 1 learns from ``mil_scores``, each other from the
    one before it. No gradient flows through the labels.

    Args:
        mil_scores: In [0, 1].
        branches: In order.
        boxes: XYXY, any frame.
        tags: 1 where the class is in the image, else 0.
        select_seeds: The rule by which a branch's scores become pseudo ground truth.
        foreground_thresh: Least IoU in [0, 1] with a seed for an RoI to take its class.

    Source:
        OICR (arXiv:1704.00138), section 3.2.
    """
    losses = []
    source = mil_scores.detach()
    for branch in branches:
        targets = assign_rois(
            boxes, select_seeds(source, boxes, tags), foreground_thresh=foreground_thresh
        )
        classification = classification_losses(branch.logits, targets)
        regression = torch.zeros_like(classification)
        if branch.offsets is not None:
            regression = regression_losses(branch.offsets, boxes, targets)
        losses.append(BranchLosses(classification=classification, regression=regression))
        source = branch.logits.detach().softmax(dim=1)[:, 1:]
    return losses
