"""The detector that learns from tags: a frozen trunk describes each proposal by what is inside it
and what is around it; small heads learn on these descriptions.

The trunk is pretrained and never trained here, so an image's proposals are described once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from training.models.roi_pooling import ROI_SIZE, pool_rois
from training.models.squeezenet import PIXEL_MEAN, PIXEL_STD
from training.models.wsod_trunks import TRUNK_MAPS, TrunkName, WsodTrunk
from training.wsod.drop_block import ConcreteDropBlock, DropBlockConfig
from training.wsod.mil_head import MilHead
from training.wsod.refinement import BranchOutputs

_SIDE_MULTIPLE = 16
"""Sides of the input that every trunk divides into whole cells."""
_FRAME_CELLS = 1
"""Cells on each side of a pooled, enlarged box that lie around the box itself."""
CELLS = ROI_SIZE - 2 * _FRAME_CELLS
"""Cells along a side of a box."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WsodDetectorConfig:
    """Sizes of the network."""

    trunk: TrunkName = "squeezenet"
    """What describes the proposals."""
    image_size: int = 416
    """Side of the square input in pixels, a multiple of 16."""
    head_width: int = 256
    """Width of the hidden layer of the refinements."""
    dropout: float = 0.5
    """Share of hidden units dropped while training, in [0, 1)."""
    num_refinements: int = 3
    """Refinement branches, at least 1."""
    box_regression: bool = False
    """The branches also move boxes, by class."""
    drop_block: DropBlockConfig = field(default_factory=DropBlockConfig)
    """Hides parts of objects while training."""

    def __post_init__(self) -> None:
        if self.num_refinements < 1:
            raise ValueError(f"num_refinements must be at least 1, got {self.num_refinements}")
        if self.image_size % _SIDE_MULTIPLE:
            raise ValueError(
                f"image_size must be a multiple of {_SIDE_MULTIPLE}, got {self.image_size}"
            )


@dataclass(frozen=True, kw_only=True)
class RoiDescriptions:
    """What the frozen trunk sees of the proposals of one image; bfloat16, to keep many.

    Descriptions of a whole data set are views of one memory-mapped file.
    """

    mean_inside: Float[Tensor, "n d"]
    max_inside: Float[Tensor, "n d"]
    mean_around: Float[Tensor, "n d"]
    """Over a frame around the box, a fifth of its sides wide."""
    cells: Float[Tensor, "n 5 5 d"] | None = None
    """What ``mean_inside`` and ``max_inside`` summarise, not normalised; only for DropBlock."""

    def to(self, device: torch.device) -> "RoiDescriptions":
        """The same on ``device``."""
        return RoiDescriptions(
            mean_inside=self.mean_inside.to(device),
            max_inside=self.max_inside.to(device),
            mean_around=self.mean_around.to(device),
            cells=None if self.cells is None else self.cells.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class WsodOutputs:
    """Answers for the proposals of one image."""

    mil_scores: Float[Tensor, "n c"]
    """In [0, 1]."""
    refinement_logits: list[Float[Tensor, "n k"]]
    """By branch, background first."""
    refinement_offsets: list[Float[Tensor, "n k 4"]] = field(default_factory=list)
    """By branch; empty without box regression."""

    def branches(self) -> list[BranchOutputs]:
        """The same by branch, for ``training.wsod.refinement``."""
        if not self.refinement_offsets:
            return [BranchOutputs(logits=logits) for logits in self.refinement_logits]
        return [
            BranchOutputs(logits=logits, offsets=offsets)
            for logits, offsets in zip(self.refinement_logits, self.refinement_offsets, strict=True)
        ]

    def offsets(self) -> Float[Tensor, "n c 4"] | None:
        """Test-time encoded boxes by class: the mean of the branches, without background."""
        if not self.refinement_offsets:
            return None
        return torch.stack(self.refinement_offsets).mean(dim=0)[:, 1:]

    def scores(self) -> Float[Tensor, "n c"]:
        """Test-time scores in [0, 1]: the mean of the branches' softmaxes, without background."""
        softmaxes = [logits.softmax(dim=1) for logits in self.refinement_logits]
        return torch.stack(softmaxes).mean(dim=0)[:, 1:]


class RoiDescriber(nn.Module):
    """The frozen part."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, trunk: WsodTrunk, *, keep_cells: bool = False) -> None:
        super().__init__()
        self.keep_cells = keep_cells
        self.trunk = trunk
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).reshape(1, 3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).reshape(1, 3, 1, 1))

    @torch.no_grad()
    def forward(
        self, image: Float[Tensor, "1 3 s s"], boxes: Float[Tensor, "n 4"]
    ) -> RoiDescriptions:
        """Describe boxes (XYXY, model frame) of one image (RGB in [0, 255])."""
        maps = self.trunk((image - self.pixel_mean) / self.pixel_std)
        return concatenate(
            [
                describe_rois(features.float(), boxes, stride=stride, keep_cells=self.keep_cells)
                for features, stride in zip(maps, self.trunk.maps.strides, strict=True)
            ]
        )


class WsodHead(nn.Module):
    """The trained part: MIL scores and refinements.

    The MIL head prefers boxes with the object inside and not around them: its detection stream is
    the difference of the two, which works against boxes on parts of objects.

    Source:
        OICR (arXiv:1704.00138); the difference is the contrastive model of ContextLocNet
        (arXiv:1609.04331).
    """

    def __init__(self, config: WsodDetectorConfig, num_classes: int) -> None:
        super().__init__()
        self.map_channels = TRUNK_MAPS[config.trunk].channels
        num_features = sum(self.map_channels)
        self.mil = MilHead(num_features, num_classes)
        self.hidden = nn.Sequential(
            nn.Linear(3 * num_features, config.head_width),
            nn.ReLU(),
            nn.Dropout(config.dropout),
        )
        self.refinements = nn.ModuleList(
            nn.Linear(config.head_width, num_classes + 1) for _ in range(config.num_refinements)
        )
        self.regressions = nn.ModuleList(
            _offset_layer(config.head_width, num_classes)
            for _ in range(config.num_refinements if config.box_regression else 0)
        )
        self.drop_block = (
            ConcreteDropBlock(num_features, config.drop_block)
            if config.drop_block.enabled
            else None
        )

    def forward(self, rois: RoiDescriptions) -> WsodOutputs:
        """Answers for the proposals of one image, at least one.

        Raises:
            ValueError: DropBlock is on and the descriptions have no cells.
        """
        if self.drop_block is not None and self.training:
            if rois.cells is None:
                raise ValueError("DropBlock needs the cells; describe RoIs with keep_cells=True")
            keep = self.drop_block(rois.cells.float())
            rois = describe_kept_cells(rois, keep, map_channels=self.map_channels)
        inside, around = rois.mean_inside.float(), rois.mean_around.float()
        hidden = self.hidden(torch.cat([inside, rois.max_inside.float(), around], dim=1))
        return WsodOutputs(
            mil_scores=self.mil(inside, around),
            refinement_logits=[branch(hidden) for branch in self.refinements],
            refinement_offsets=[
                branch(hidden).unflatten(1, (-1, 4)) for branch in self.regressions
            ],
        )


def enlarge(boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
    """Boxes with a frame around them, such that the inner cells of the pooled grid are the box."""
    scale = ROI_SIZE / (ROI_SIZE - 2 * _FRAME_CELLS)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]) * (scale / 2)
    return torch.cat([centres - half, centres + half], dim=1)


def describe_rois(
    features: Float[Tensor, "1 d h w"],
    boxes: Float[Tensor, "n 4"],
    *,
    stride: int,
    keep_cells: bool = False,
) -> RoiDescriptions:
    """Summaries of a map inside and around boxes (XYXY, model frame), each normalised over its
    channels.
    """
    pooled = pool_rois(features, enlarge(boxes)[None], stride=stride)[0]  # [n, 7, 7, d]
    inner = slice(_FRAME_CELLS, ROI_SIZE - _FRAME_CELLS)
    cells = pooled[:, inner, inner]  # [n, 5, 5, d]
    inside = cells.flatten(1, 2)
    num_around = ROI_SIZE**2 - inside.shape[1]
    around = (pooled.sum(dim=(1, 2)) - inside.sum(dim=1)) / num_around
    return RoiDescriptions(
        mean_inside=_normalised(inside.mean(dim=1)),
        max_inside=_normalised(inside.amax(dim=1)),
        mean_around=_normalised(around),
        cells=cells.bfloat16() if keep_cells else None,
    )


def describe_kept_cells(
    rois: RoiDescriptions, keep: Float[Tensor, "n 5 5"], *, map_channels: Sequence[int]
) -> RoiDescriptions:
    """The descriptions again, of the kept cells only; the surroundings stay.

    Args:
        rois: With cells, none of which is negative (the trunk's maps end in a ReLU).
        keep: 1 for a cell that counts, else 0; at least one 1 for each RoI. Gradients flow into
            it.
        map_channels: Channels of each map, which were normalised by themselves.

    Returns:
        Descriptions without cells; those of ``describe_rois`` up to rounding where all is kept.
        The mean is over the kept cells: what is left is not made weaker.
    """
    assert rois.cells is not None
    weights = keep.flatten(1)[:, :, None]  # [n, 25, 1]
    kept = rois.cells.float().flatten(1, 2) * weights
    return RoiDescriptions(
        mean_inside=_normalised_by_map(kept.sum(dim=1) / weights.sum(dim=1), map_channels),
        max_inside=_normalised_by_map(kept.amax(dim=1), map_channels),
        mean_around=rois.mean_around,
    )


def concatenate(parts: Sequence[RoiDescriptions]) -> RoiDescriptions:
    """Descriptions of the same boxes from several maps, side by side."""
    cells = [part.cells for part in parts if part.cells is not None]
    return RoiDescriptions(
        mean_inside=torch.cat([part.mean_inside for part in parts], dim=1),
        max_inside=torch.cat([part.max_inside for part in parts], dim=1),
        mean_around=torch.cat([part.mean_around for part in parts], dim=1),
        cells=torch.cat(cells, dim=3) if len(cells) == len(parts) else None,
    )


def _offset_layer(in_features: int, num_classes: int) -> nn.Linear:
    """Starts with boxes that stay where they are, nearly."""
    layer = nn.Linear(in_features, 4 * (num_classes + 1))
    nn.init.normal_(layer.weight, std=1e-3)
    nn.init.zeros_(layer.bias)
    return layer


def _normalised_by_map(x: Tensor, map_channels: Sequence[int]) -> Tensor:
    parts = x.split(list(map_channels), dim=1)
    return torch.cat([functional.layer_norm(part, part.shape[-1:]) for part in parts], dim=1)


def _normalised(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:]).bfloat16()
