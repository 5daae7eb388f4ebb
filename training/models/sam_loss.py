"""The loss that trains a SAM: focal and dice on masks, squared error on predicted IoU.

Pure functions of tensors; nothing here knows images or prompts beyond what kind each prompt is.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from training.models.sam_decoder import MaskPrediction


@dataclass(frozen=True, kw_only=True, slots=True)
class SamLossConfig:
    """Weights of the parts."""

    focal: float = 20.0
    """Of the focal loss."""
    dice: float = 1.0
    """Of the dice loss."""
    iou: float = 1.0
    """Of the squared error of the predicted IoU."""
    other_token: float = 0.5
    """Of the output not asked for (the single mask at points, the multimask at boxes)."""
    losing_masks: float = 0.05
    """Of the mean over the three masks beside their minimum, so that no mask token starves."""


class SamLoss(NamedTuple):
    """The loss and what it is made of; scalars."""

    total: Float[Tensor, ""]
    masks: Float[Tensor, ""]
    iou_error: Float[Tensor, ""]
    best_iou: Float[Tensor, ""]
    """Mean IoU of the better output the prompt asks for: a reading, without gradient."""


def sam_loss(
    prediction: MaskPrediction,
    coverage: Float[Tensor, "p h w"],
    is_ambiguous: Bool[Tensor, " p"],
    config: SamLossConfig,
) -> SamLoss:
    """The loss of p prompts, averaged.

    Args:
        prediction: Of the decoder, masks at the resolution of ``coverage``.
        coverage: The share of each cell inside the object, in [0, 1].
        is_ambiguous: True for one-point prompts: the best of masks 1 to 3 counts. False for boxes
            and several clicks: mask 0 counts.
        config: Weights.

    Source:
        Segment Anything (arXiv:2304.02643), appendix A; here the output not asked for is trained
        too, with less weight, and targets are fractional at the border.
    """
    logits = prediction.low_res_logits.float()
    target = coverage.unsqueeze(1)
    per_mask = config.focal * focal_loss(logits, target) + config.dice * dice_loss(logits, target)
    multi = per_mask[:, 1:]
    multimask = multi.min(dim=1).values + config.losing_masks * multi.mean(dim=1)
    single = per_mask[:, 0]
    other = config.other_token
    masks = torch.where(is_ambiguous, multimask + other * single, single + other * multimask).mean()
    iou = hard_iou(logits, target)
    iou_error = functional.mse_loss(prediction.iou_predictions.float(), iou)
    best_iou = torch.where(is_ambiguous, iou[:, 1:].amax(dim=1), iou[:, 0]).mean()
    return SamLoss(masks + config.iou * iou_error, masks.detach(), iou_error.detach(), best_iou)


def focal_loss(
    logits: Float[Tensor, "p m h w"], target: Float[Tensor, "p n h w"]
) -> Float[Tensor, "p m"]:
    """Mean focal loss per mask (alpha 0.25, gamma 2); targets may be fractional.

    Source:
        Focal loss (arXiv:1708.02002); the distance between probability and target modulates it.
    """
    # The entropy of a logit x against t is softplus(x) - x t.
    entropy = functional.softplus(logits) - logits * target
    alpha = 0.75 - 0.5 * target
    return (alpha * (logits.sigmoid() - target).square() * entropy).mean(dim=(2, 3))


def dice_loss(
    logits: Float[Tensor, "p m h w"], target: Float[Tensor, "p n h w"]
) -> Float[Tensor, "p m"]:
    """One minus the dice overlap per mask, in [0, 1]; 1 is added above and below the fraction."""
    probability = logits.sigmoid()
    overlap = (probability * target).sum(dim=(2, 3))
    total = probability.sum(dim=(2, 3)) + target.sum(dim=(2, 3))
    return 1 - (2 * overlap + 1) / (total + 1)


@torch.no_grad()
def hard_iou(
    logits: Float[Tensor, "p m h w"], target: Float[Tensor, "p n h w"]
) -> Float[Tensor, "p m"]:
    """IoU of masks cut at logit 0 with targets cut at one half, in [0, 1]; 0 for two empty ones."""
    inside, truth = logits > 0, target >= 0.5
    intersection = (inside & truth).sum(dim=(2, 3))
    union = (inside | truth).sum(dim=(2, 3))
    return intersection / union.clamp(min=1)


def distillation_loss(
    student: MaskPrediction, teacher: MaskPrediction, config: SamLossConfig
) -> Float[Tensor, ""]:
    """How far the student's four masks and IoU predictions are from the teacher's, token by token.

    Args:
        student: With gradient.
        teacher: Without; masks of any resolution, over the same picture.
        config: Weights.
    """
    logits = student.low_res_logits.float()
    soft = functional.interpolate(
        teacher.low_res_logits.float(), logits.shape[2:], mode="bilinear", align_corners=False
    ).sigmoid()
    masks = config.focal * focal_loss(logits, soft) + config.dice * dice_loss(logits, soft)
    iou_error = functional.mse_loss(
        student.iou_predictions.float(), teacher.iou_predictions.float()
    )
    return masks.mean() + config.iou * iou_error
