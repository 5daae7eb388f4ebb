"""Online instance classifier refinement: a branch trusts the best boxes of each class, and those
nearly as good.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.ops import nms

from training.wsod.refinement import Seeds


@dataclass(frozen=True, kw_only=True, slots=True)
class OicrConfig:
    """How a branch's scores become labels for the next."""

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
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"OICR needs shares in [0, 1], got {self}")


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
