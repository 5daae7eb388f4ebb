"""Mask R-CNN's mask head: what is object and what is background inside an RoI, class by class.

It knows pooled RoIs and true masks of the model frame; which RoIs count is decided elsewhere.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.roi_heads import project_masks_on_boxes

MASK_ROI_SIZE = 14
"""Cells along a side of an RoI that the head reads."""
MASK_SIZE = 28
"""Cells along a side of a mask."""
_NUM_CONVS = 2


class RoiMaskHead(nn.Module):
    """Mask logits of pooled RoIs, float32; there is no mask of the background.

    Source:
        Mask R-CNN (arXiv:1703.06870), figure 4, right; two convolutions instead of four, and as
        wide as the caller says instead of 256.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * _NUM_CONVS
        self.convs = nn.ModuleList(
            nn.Conv2d(wide, channels, 3, padding=1) for wide in widths[:_NUM_CONVS]
        )
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.classes = nn.Conv2d(channels, num_classes, 1)
        for layer in (*self.convs, self.upsample, self.classes):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, cells: Float[Tensor, "n c 14 14"]) -> Float[Tensor, "n k 28 28"]:
        """Logits; above 0 is inside."""
        for conv in self.convs:
            cells = functional.relu(conv(cells))
        logits: Tensor = self.classes(functional.relu(self.upsample(cells)))
        return logits.float()


def mask_targets(
    masks: Sequence[Float[Tensor, "_ s s"]],
    rois: Sequence[Float[Tensor, "_ 4"]],
    matches: Sequence[Int64[Tensor, " _"]],
) -> Float[Tensor, "n 28 28"]:
    """What each RoI shall answer: its object's mask inside the RoI, shares in [0, 1].

    Args:
        masks: By image: true masks in the model frame, 0 or 1.
        rois: By image: XYXY in the model frame.
        matches: By image: the mask of each RoI.
    """
    return torch.cat(
        [
            project_masks_on_boxes(of_image, boxes, match, MASK_SIZE)
            for of_image, boxes, match in zip(masks, rois, matches, strict=True)
        ]
    )


def mask_losses(
    logits: Float[Tensor, "n k 28 28"],
    labels: Int64[Tensor, " n"],
    targets: Float[Tensor, "n 28 28"],
) -> Float[Tensor, " n"]:
    """Cross-entropy of each RoI's mask of its own class, the mean over the cells.

    Args:
        logits: Of every class.
        labels: 0-based classes.
        targets: Shares in [0, 1].

    Source:
        Mask R-CNN, section 3; the mean over RoIs is torchvision's ``maskrcnn_loss``.
    """
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    losses = functional.binary_cross_entropy_with_logits(own, targets, reduction="none")
    return losses.mean(dim=(1, 2))
