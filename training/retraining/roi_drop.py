"""RoI drop: late in training, a high loss of an RoI more likely comes from a wrong pseudo box than
from a hard true one, so it is left out.

Pure functions of per-RoI losses; the schedule (when dropping begins) belongs to the training loop.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class RoiDropConfig:
    """When an RoI is dropped."""

    enabled: bool = True
    """Without it every RoI counts."""
    mode: Literal["independent", "joint"] = "independent"
    """independent: each loss is dropped by its own threshold (the paper). joint: both losses of a
    foreground RoI are dropped when both are above their thresholds (the released script)."""
    classification_thresh: float = 4.0
    """Cross-entropy above this is dropped, at least 0; 4 for VOC, 5 for COCO."""
    regression_thresh: float = 4.0
    """Sum of the four absolute errors of the encoded box above this is dropped, at least 0."""
    start_fraction: float = 0.5
    """Dropping begins after this share of all steps, in [0, 1]. The paper's 2000 of 9000 steps are
    0.22; a short schedule has not learnt its classes by then and would drop hard true boxes (13 %
    of the foreground after 0.22 of 700 steps on true boxes)."""

    def __post_init__(self) -> None:
        if min(self.classification_thresh, self.regression_thresh) < 0:
            raise ValueError(
                f"RoI drop thresholds are losses and at least 0, got "
                f"{self.classification_thresh} and {self.regression_thresh}"
            )
        if not 0 <= self.start_fraction <= 1:
            raise ValueError(f"start_fraction is a share in [0, 1], got {self.start_fraction}")

    def is_active(self, step: int, num_steps: int) -> bool:
        """Whether RoIs are dropped in the 0-based ``step``."""
        return self.enabled and step >= self.start_fraction * num_steps


@dataclass(frozen=True, kw_only=True)
class RoiLosses:
    """Losses of the sampled RoIs of a batch, not reduced."""

    classification: Float[Tensor, " r"]
    """Cross-entropy over the classes and background."""
    regression: Float[Tensor, " r"]
    """Sum of the four absolute errors of the encoded box; 0 for background."""
    is_foreground: Bool[Tensor, " r"]
    mask: Float[Tensor, " r"] | None = None
    """Mean cross-entropy over the mask's cells; 0 for background. None: there is no mask head."""


@dataclass(frozen=True, kw_only=True)
class KeptRois:
    """Which losses count."""

    classification: Bool[Tensor, " r"]
    regression: Bool[Tensor, " r"]

    @property
    def mask(self) -> Bool[Tensor, " r"]:
        """The mask of an RoI counts where both its class and its box do: a pseudo mask is made
        from the pseudo box, and a wrong box or class has a wrong mask.
        """
        return self.classification & self.regression


@dataclass(frozen=True, kw_only=True)
class ReducedRoiLosses:
    """Scalars to minimise."""

    classification: Float[Tensor, ""]
    regression: Float[Tensor, ""]
    mask: Float[Tensor, ""]
    """0 without a mask head."""


def keep_all_rois(losses: RoiLosses) -> KeptRois:
    """Before dropping begins: everything counts."""
    everything = torch.ones_like(losses.is_foreground)
    return KeptRois(classification=everything, regression=everything)


def keep_trusted_rois(losses: RoiLosses, config: RoiDropConfig) -> KeptRois:
    """The losses that are at most their thresholds; no gradient flows through the choice.

    Source:
        WeakSAM (arXiv:2402.14812), the figure of RoI drop regularisation. ``joint`` follows the
        released script in what it drops, without its errors (wrong indices, lost normaliser).
    """
    low_classification = losses.classification.detach() <= config.classification_thresh
    low_regression = losses.regression.detach() <= config.regression_thresh
    if config.mode == "independent":
        return KeptRois(classification=low_classification, regression=low_regression)
    trusted = low_classification | low_regression | ~losses.is_foreground
    return KeptRois(classification=trusted, regression=trusted)


def reduce_roi_losses(losses: RoiLosses, kept: KeptRois) -> ReducedRoiLosses:
    """Sums of the losses that count, divided by the number of *all* RoIs: dropped ones count as 0,
    they do not raise the weight of the others. 0 without RoIs. Masks are divided by the number of
    all foreground RoIs, as Mask R-CNN does.
    """
    num_rois = max(1, len(losses.classification))
    zero = losses.classification.new_zeros(())
    foreground = losses.is_foreground
    regression = torch.where(kept.regression & foreground, losses.regression, zero)
    mask = zero
    if losses.mask is not None:
        counted = torch.where(kept.mask & foreground, losses.mask, zero)
        mask = counted.sum() / foreground.sum().clamp(min=1)
    return ReducedRoiLosses(
        classification=torch.where(kept.classification, losses.classification, zero).sum()
        / num_rois,
        regression=regression.sum() / num_rois,
        mask=mask,
    )


def drop_statistics(losses: RoiLosses, kept: KeptRois) -> dict[str, float]:
    """Shares of dropped RoIs, in [0, 1], for the log; 0 where there are none to drop."""
    foreground = losses.is_foreground
    shares = {
        "dropped_background": _share(~kept.classification, ~foreground),
        "dropped_classification": _share(~kept.classification, foreground),
        "dropped_regression": _share(~kept.regression, foreground),
    }
    if losses.mask is not None:
        shares["dropped_mask"] = _share(~kept.mask, foreground)
    return shares


def _share(dropped: Tensor, among: Tensor) -> float:
    count = int(among.sum())
    return float((dropped & among).sum()) / count if count else 0.0
