"""The detector that learns from tags: frozen trunk, pooled proposals, MIL head, refinements."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from training.models.roi_pooling import ROI_SIZE, pool_rois
from training.models.squeezenet import PIXEL_MEAN, PIXEL_STD, SqueezeNetFeatures
from training.wsod.mil_head import MilHead

ROI_STRIDE = 8
"""Pixels per cell of the map that RoIs are pooled from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WsodDetectorConfig:
    """Sizes of the network."""

    image_size: int = 320
    """Side of the square input in pixels, a multiple of 16."""
    roi_channels: int = 128
    """Channels of the map that RoIs are pooled from."""
    head_width: int = 256
    """Width of the two fully-connected layers of the RoI head."""
    dropout: float = 0.5
    """Share of hidden units dropped while training, in [0, 1)."""
    num_refinements: int = 3
    """OICR branches."""

    def __post_init__(self) -> None:
        if self.image_size % 16:
            raise ValueError(f"image_size must be a multiple of 16, got {self.image_size}")


@dataclass(frozen=True, kw_only=True)
class FrozenFeatures:
    """What the frozen trunk sees of a batch of images; bfloat16 to keep many in memory."""

    stride8: Float[Tensor, "b 512 h8 w8"]
    stride16: Float[Tensor, "b 512 h16 w16"]


@dataclass(frozen=True, kw_only=True)
class WsodOutputs:
    """Answers for the RoIs of one image."""

    mil_scores: Float[Tensor, "n c"]
    """In [0, 1]."""
    refinement_logits: list[Float[Tensor, "n k"]]
    """By branch, background first."""

    def scores(self) -> Float[Tensor, "n c"]:
        """Test-time scores in [0, 1]: the mean of the branches' softmaxes, without background."""
        softmaxes = [logits.float().softmax(dim=1) for logits in self.refinement_logits]
        return torch.stack(softmaxes).mean(dim=0)[:, 1:]


class WsodTrunk(nn.Module):
    """The frozen part: no parameter of it is trained, so its features are computed once."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, trunk: SqueezeNetFeatures) -> None:
        super().__init__()
        self.trunk = trunk.requires_grad_(False)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).reshape(1, 3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).reshape(1, 3, 1, 1))

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b 3 s s"]) -> FrozenFeatures:
        """Features of RGB in [0, 255]."""
        pyramid = self.trunk((images - self.pixel_mean) / self.pixel_std)
        return FrozenFeatures(
            stride8=pyramid.stride8.bfloat16(), stride16=pyramid.stride16.bfloat16()
        )


class WsodHead(nn.Module):
    """The trained part: a map from both strides, RoI features, MIL head and refinements."""

    def __init__(self, config: WsodDetectorConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        _, channels8, channels16 = SqueezeNetFeatures.out_channels
        self.lateral8 = nn.Conv2d(channels8, config.roi_channels, 1)
        self.lateral16 = nn.Conv2d(channels16, config.roi_channels, 1)
        self.norm = nn.GroupNorm(1, config.roi_channels)
        width = config.head_width
        self.hidden = nn.Sequential(
            nn.Linear(config.roi_channels * ROI_SIZE**2, width),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Dropout(config.dropout),
        )
        self.mil = MilHead(width, num_classes)
        self.refinements = nn.ModuleList(
            nn.Linear(width, num_classes + 1) for _ in range(config.num_refinements)
        )

    def forward(self, features: FrozenFeatures, boxes: Float[Tensor, "n 4"]) -> WsodOutputs:
        """Answers for the boxes (XYXY, model frame, at least one) of one image (batch axis 1)."""
        coarse = self.lateral16(features.stride16.float())
        fine = self.lateral8(features.stride8.float())
        roi_map = functional.relu(
            self.norm(fine + functional.interpolate(coarse, scale_factor=2.0))
        )
        pooled = pool_rois(roi_map, boxes[None], stride=ROI_STRIDE)[0]
        hidden = self.hidden(pooled.flatten(1))
        return WsodOutputs(
            mil_scores=self.mil(hidden),
            refinement_logits=[branch(hidden).float() for branch in self.refinements],
        )
