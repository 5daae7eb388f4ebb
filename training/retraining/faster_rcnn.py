"""A small Faster R-CNN, with a mask head if wanted Mask R-CNN: SqueezeNet trunk, feature pyramid,
torchvision's RPN and RoI sampling.

It knows images and boxes of the model frame (a square; padding at the right and bottom). It gives
per-RoI losses to the training loop; inference goes through ``training.models.detector_adapter``,
so that what is measured is what is deployed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from training.models.roi_pooling import ROI_SIZE, pool_rois
from training.models.squeezenet import PIXEL_MEAN, PIXEL_STD, SqueezeNetFeatures
from training.retraining.mask_head import (
    MASK_ROI_SIZE,
    RoiMaskHead,
    mask_losses,
    mask_targets,
)
from training.retraining.roi_drop import RoiLosses

STRIDES = (8, 16, 32)
"""Of the pyramid's levels, in pixels of the model frame."""
ROI_STRIDE = 8
"""Stride of the map that RoIs are pooled from, cell by cell."""
SEMANTIC_STRIDE = 16
"""Stride of the map that RoIs are averaged over."""
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""Scales of the encoded centre and size offsets in the RoI head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FasterRcnnConfig:
    """Sizes of the network and of its sampling."""

    image_size: int = 320
    """Side of the square input in pixels, a multiple of 32."""
    neck_channels: int = 128
    """Channels of the pyramid, a multiple of 16."""
    roi_channels: int = 96
    """Channels of the map that RoIs are pooled from, a multiple of 16."""
    head_width: int = 256
    """Width of the two fully-connected layers of the RoI head."""
    semantic: bool = True
    """The RoI head also reads the trunk's last features, averaged over each RoI: they know classes
    before any training here, so few images suffice."""
    anchor_sizes: tuple[tuple[int, ...], ...] = ((20, 34), (56, 92), (148, 236))
    """Square roots of the anchors' areas in pixels, by level (strides 8, 16, 32)."""
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width of the anchors."""
    rois_per_image: int = 64
    """RoIs sampled for the loss of the head."""
    foreground_share: float = 0.25
    """Highest share of foreground among them, in (0, 1]."""
    proposals_per_image: int = 300
    """RPN boxes kept after suppression while training."""
    mask_channels: int | None = None
    """Width of the mask head, above 0; None: boxes only."""

    def __post_init__(self) -> None:
        if self.image_size % 32 or self.neck_channels % 16 or self.roi_channels % 16:
            raise ValueError(
                f"image_size must be a multiple of 32 and channels of 16, got {self.image_size}, "
                f"{self.neck_channels}, {self.roi_channels}"
            )
        if len(self.anchor_sizes) != len(STRIDES) or len(set(map(len, self.anchor_sizes))) != 1:
            raise ValueError(
                f"anchor_sizes needs {len(STRIDES)} levels of equal length, got {self.anchor_sizes}"
            )
        if self.mask_channels is not None and self.mask_channels < 1:
            raise ValueError(f"mask_channels must be positive or None, got {self.mask_channels}")

    @property
    def anchors_per_cell(self) -> int:
        """Anchors at each cell of each level."""
        return len(self.anchor_sizes[0]) * len(self.aspect_ratios)


@dataclass(frozen=True, kw_only=True)
class DetectorFeatures:
    """What the heads read."""

    levels: tuple[
        Float[Tensor, "b c h8 w8"], Float[Tensor, "b c h16 w16"], Float[Tensor, "b c h32 w32"]
    ]
    """For the RPN, at ``STRIDES``."""
    roi_map: Float[Tensor, "b r h8 w8"]
    """For the RoI head, at ``ROI_STRIDE``: where things are."""
    semantic_map: Float[Tensor, "b d h16 w16"]
    """For the RoI head, at ``SEMANTIC_STRIDE``: the trunk's own last features, which know classes
    before any training here."""


@dataclass(frozen=True, kw_only=True)
class PooledRois:
    """What the RoI head reads of n RoIs."""

    cells: Float[Tensor, "n 7 7 c"]
    semantic: Float[Tensor, "n d"]
    """Mean of the semantic map over each RoI."""


@dataclass(frozen=True, kw_only=True)
class SampledRois:
    """The RoIs that a batch learns from, in the order of their losses."""

    boxes: tuple[Float[Tensor, "_ 4"], ...]
    """By image, XYXY in the model frame."""
    labels: Int64[Tensor, " r"]
    """0 is background, class c has c + 1."""
    matched: Float[Tensor, "r 4"]
    """The box to learn from that each RoI overlaps best; meaningless for background."""


@dataclass(frozen=True, kw_only=True)
class DetectorLosses:
    """Losses of a batch; the RoI losses are not reduced, so that the loop may drop some."""

    objectness: Float[Tensor, ""]
    rpn_box: Float[Tensor, ""]
    rois: RoiLosses
    sampled: SampledRois


class FeaturePyramid(nn.Module):
    """Laterals from strides 8 and 16, context at stride 32, summed from coarse to fine."""

    def __init__(self, in_channels: tuple[int, int, int], config: FasterRcnnConfig) -> None:
        super().__init__()
        channels = config.neck_channels
        self.lateral8 = _conv_norm(in_channels[1], channels, 1)
        self.lateral16 = _conv_norm(in_channels[2], channels, 1)
        self.down32 = _conv_norm(channels, channels, 3, stride=2)
        self.context32 = _conv_norm(channels, channels, 3)
        self.output16 = _conv_norm(channels, channels, 3)
        self.output8 = _conv_norm(channels, channels, 3)
        self.roi_map = _conv_norm(channels, config.roi_channels, 1)

    def forward(
        self, stride8: Float[Tensor, "b c8 h8 w8"], stride16: Float[Tensor, "b c16 h16 w16"]
    ) -> DetectorFeatures:
        """The pyramid of trunk features; sides at stride 16 must be even."""
        lateral16 = self.lateral16(stride16)
        level32 = functional.relu(self.down32(functional.relu(lateral16)))
        level32 = functional.relu(self.context32(level32) + level32)
        sum16 = lateral16 + _double(level32)
        level16 = functional.relu(self.output16(sum16))
        sum8 = self.lateral8(stride8) + _double(level16)
        level8 = functional.relu(self.output8(sum8))
        return DetectorFeatures(
            levels=(level8, level16, level32),
            roi_map=functional.relu(self.roi_map(level8)),
            semantic_map=stride16,
        )


class RpnHead(nn.Module):
    """Objectness and box offsets of the anchors of every cell; results are float32."""

    def __init__(self, config: FasterRcnnConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(config.neck_channels, config.neck_channels, 3, padding=1)
        self.objectness = nn.Conv2d(config.neck_channels, config.anchors_per_cell, 1)
        self.offsets = nn.Conv2d(config.neck_channels, 4 * config.anchors_per_cell, 1)
        for layer in (self.objectness, self.offsets):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.bias, 0.0)  # type: ignore[arg-type]

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """By level: logits [b, a, h, w] and offsets [b, 4a, h, w] (the form torchvision's RPN
        expects).
        """
        hidden = [functional.relu(self.conv(level)) for level in levels]
        return [self.objectness(x).float() for x in hidden], [
            self.offsets(x).float() for x in hidden
        ]


class RoiBoxHead(nn.Module):
    """Class logits and class-specific box offsets of pooled RoIs; background is class 0."""

    def __init__(self, config: FasterRcnnConfig, num_classes: int, semantic_channels: int) -> None:
        super().__init__()
        self.cells = nn.Linear(config.roi_channels * ROI_SIZE**2, config.head_width)
        self.semantic: nn.Module | None = None
        if config.semantic:
            self.semantic = nn.Sequential(
                nn.LayerNorm(semantic_channels), nn.Linear(semantic_channels, config.head_width)
            )
        self.hidden = nn.Linear(config.head_width, config.head_width)
        self.classes = nn.Linear(config.head_width, num_classes + 1)
        self.offsets = nn.Linear(config.head_width, 4 * (num_classes + 1))
        for layer in (self.cells, self.hidden):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.offsets.weight, std=0.001)
        for layer in (self.cells, self.hidden, self.classes, self.offsets):
            nn.init.zeros_(layer.bias)

    def forward(
        self, rois: PooledRois
    ) -> tuple[Float[Tensor, "n classes"], Float[Tensor, "n offsets"]]:
        """Logits [n, classes + 1] and offsets [n, 4 * (classes + 1)], float32."""
        hidden = self.cells(rois.cells.flatten(1))
        if self.semantic is not None:
            hidden = hidden + self.semantic(rois.semantic.float())
        hidden = functional.relu(self.hidden(functional.relu(hidden)))
        return self.classes(hidden).float(), self.offsets(hidden).float()


class FasterRcnn(nn.Module):
    """The detector; ``training_losses`` trains it, ``DetectorAdapter`` runs it."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, config: FasterRcnnConfig, num_classes: int, trunk: SqueezeNetFeatures | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.trunk = SqueezeNetFeatures() if trunk is None else trunk
        self.neck = FeaturePyramid(self.trunk.out_channels, config)
        self.anchor_generator = AnchorGenerator(
            config.anchor_sizes, (config.aspect_ratios,) * len(STRIDES)
        )
        self.rpn = RegionProposalNetwork(
            self.anchor_generator, RpnHead(config),
            fg_iou_thresh=0.7, bg_iou_thresh=0.3, batch_size_per_image=128, positive_fraction=0.5,
            pre_nms_top_n={"training": 600, "testing": 600},
            post_nms_top_n=dict.fromkeys(("training", "testing"), config.proposals_per_image),
            nms_thresh=0.7,
        )  # fmt: skip
        self.box_head = RoiBoxHead(config, num_classes, self.trunk.out_channels[2])
        self.mask_head: RoiMaskHead | None = None
        if config.mask_channels is not None:
            self.mask_head = RoiMaskHead(config.roi_channels, config.mask_channels, num_classes)
        self._sampler = _RoiSampler(config)
        self.register_buffer("pixel_mean", _per_channel(PIXEL_MEAN), persistent=False)
        self.register_buffer("pixel_std", _per_channel(PIXEL_STD), persistent=False)

    def features(self, images: Float[Tensor, "b 3 s s"]) -> DetectorFeatures:
        """Features of RGB in [0, 255]."""
        pyramid = self.trunk((images - self.pixel_mean) / self.pixel_std)
        features: DetectorFeatures = self.neck(pyramid.stride8, pyramid.stride16)
        return features

    def anchors(self) -> tuple[Float[Tensor, "n 4"], ...]:
        """The anchors of each level in the order (row, column, anchor), XYXY in the model frame."""
        side = self.config.image_size
        levels = [torch.zeros(1, 1, side // stride, side // stride) for stride in STRIDES]
        images = ImageList(torch.zeros(1, 3, side, side), [(side, side)])
        (joined,) = self.anchor_generator(images, levels)
        sizes = [level.shape[-1] ** 2 * self.config.anchors_per_cell for level in levels]
        return tuple(joined.split(sizes))

    def training_losses(
        self,
        images: Float[Tensor, "b 3 s s"],
        boxes: Sequence[Float[Tensor, "_ 4"]],
        labels: Sequence[Int64[Tensor, " _"]],
        masks: Sequence[Bool[Tensor, "_ s s"]] | None = None,
    ) -> DetectorLosses:
        """Losses of one batch.

        Args:
            images: RGB in [0, 255], padded with zeros.
            boxes: By image: XYXY in the model frame, may be empty.
            labels: By image: 0-based classes.
            masks: By image: one mask per box, over the model frame; a model with a mask head
                needs them, another one does not read them.

        Raises:
            ValueError: The model has a mask head and there are no masks.
        """
        side = images.shape[-1]
        features = self.features(images)
        targets = [{"boxes": b, "labels": n + 1} for b, n in zip(boxes, labels, strict=True)]
        proposals, rpn_losses = self.rpn(
            ImageList(images, [(side, side)] * len(images)),
            {str(stride): level for stride, level in zip(STRIDES, features.levels, strict=True)},
            targets,
        )
        samples = self._sampler.sample(proposals, targets)
        sampled = samples.rois
        logits, offsets = self.box_head(pool_sampled_rois(features, sampled.boxes))
        rois = roi_losses(logits, offsets, sampled.labels, samples.encoded)
        if self.mask_head is not None:
            rois = replace(rois, mask=self._mask_losses(self.mask_head, features, samples, masks))
        return DetectorLosses(
            objectness=rpn_losses["loss_objectness"],
            rpn_box=rpn_losses["loss_rpn_box_reg"],
            rois=rois,
            sampled=sampled,
        )

    def _mask_losses(
        self,
        head: RoiMaskHead,
        features: DetectorFeatures,
        samples: "_Samples",
        masks: Sequence[Bool[Tensor, "_ s s"]] | None,
    ) -> Float[Tensor, " r"]:
        """Of every sampled RoI; 0 for background, whose masks are not computed."""
        if masks is None:
            raise ValueError("the model has a mask head; give the masks of the boxes to learn from")
        rois = samples.rois
        is_foreground = (rois.labels > 0).split([len(boxes) for boxes in rois.boxes])
        boxes = [b[f] for b, f in zip(rois.boxes, is_foreground, strict=True)]
        matches = [m[f] for m, f in zip(samples.matches, is_foreground, strict=True)]
        losses = features.roi_map.new_zeros(len(rois.labels), dtype=torch.float32)
        if not (rois.labels > 0).any():
            return losses
        logits = head(pool_sampled_masks(features, boxes))
        own = mask_losses(
            logits,
            rois.labels[rois.labels > 0] - 1,
            mask_targets([of_image.float() for of_image in masks], boxes, matches),
        )
        return losses.masked_scatter(rois.labels > 0, own)


def pool_all_rois(features: DetectorFeatures, rois: Float[Tensor, "b k 4"]) -> PooledRois:
    """What the head reads of the RoIs (XYXY in the model frame), n = b * k of them."""
    cells = pool_rois(features.roi_map, rois, stride=ROI_STRIDE)
    semantic = pool_rois(features.semantic_map, rois, stride=SEMANTIC_STRIDE, num_cells=1)
    return PooledRois(cells=cells.flatten(0, 1), semantic=semantic.flatten(0, 1).flatten(1))


def pool_sampled_rois(
    features: DetectorFeatures, rois: Sequence[Float[Tensor, "_ 4"]]
) -> PooledRois:
    """The same for RoIs given by image, whose numbers may differ."""
    padded, is_real = _padded(rois)
    pooled = pool_all_rois(features, padded)
    return PooledRois(cells=pooled.cells[is_real], semantic=pooled.semantic[is_real])


def pool_all_masks(
    features: DetectorFeatures, rois: Float[Tensor, "b k 4"]
) -> Float[Tensor, "n c 14 14"]:
    """What the mask head reads of the RoIs (XYXY in the model frame), n = b * k of them."""
    cells = pool_rois(features.roi_map, rois, stride=ROI_STRIDE, num_cells=MASK_ROI_SIZE)
    return cells.flatten(0, 1).permute(0, 3, 1, 2)


def pool_sampled_masks(
    features: DetectorFeatures, rois: Sequence[Float[Tensor, "_ 4"]]
) -> Float[Tensor, "n c 14 14"]:
    """The same for RoIs given by image, whose numbers may differ."""
    padded, is_real = _padded(rois)
    return pool_all_masks(features, padded)[is_real]


def _padded(rois: Sequence[Float[Tensor, "_ 4"]]) -> tuple[Tensor, Tensor]:
    """RoIs [b, k, 4], filled up with zeros, and which of the b * k are real."""
    padded = pad_sequence(list(rois), batch_first=True)
    counts = torch.tensor([len(boxes) for boxes in rois], device=padded.device)
    is_real = torch.arange(padded.shape[1], device=padded.device) < counts[:, None]
    return padded, is_real.flatten()


def roi_losses(
    logits: Float[Tensor, "n classes"],
    offsets: Float[Tensor, "n offsets"],
    labels: Int64[Tensor, " n"],
    targets: Float[Tensor, "n 4"],
) -> RoiLosses:
    """Losses of every RoI: cross-entropy, and the absolute errors of the offsets of its own class.

    Args:
        logits: Background first.
        offsets: Four per class, background first.
        labels: 0 is background.
        targets: Encoded boxes; read for foreground only.
    """
    own = offsets.unflatten(1, (-1, 4))[torch.arange(len(labels), device=labels.device), labels]
    is_foreground = labels > 0
    errors = (own - targets).abs().sum(dim=1)
    return RoiLosses(
        classification=functional.cross_entropy(logits, labels, reduction="none"),
        regression=torch.where(is_foreground, errors, torch.zeros_like(errors)),
        is_foreground=is_foreground,
    )


@dataclass(frozen=True, kw_only=True)
class _Samples:
    rois: SampledRois
    encoded: Float[Tensor, "r 4"]
    """What the offsets of each RoI shall be."""
    matches: tuple[Int64[Tensor, " _"], ...]
    """By image: the position of each RoI's box among those to learn from."""


class _RoiSampler(RoIHeads):  # type: ignore[misc]
    """torchvision's matching and sampling of RoIs; its own heads and losses are not used."""

    def __init__(self, config: FasterRcnnConfig) -> None:
        super().__init__(
            None, None, None,
            fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=config.rois_per_image,
            positive_fraction=config.foreground_share, bbox_reg_weights=BOX_WEIGHTS,
            score_thresh=0.0, nms_thresh=0.5, detections_per_img=1,
        )  # fmt: skip

    def sample(self, proposals: list[Tensor], targets: list[dict[str, Tensor]]) -> _Samples:
        """The RoIs and what they shall learn."""
        rois, matches, labels, encoded = self.select_training_samples(proposals, targets)
        matched = [
            target["boxes"][match] if len(target["boxes"]) else boxes
            for target, match, boxes in zip(targets, matches, rois, strict=True)
        ]
        sampled = SampledRois(
            boxes=tuple(rois), labels=torch.cat(labels), matched=torch.cat(matched)
        )
        return _Samples(rois=sampled, encoded=torch.cat(encoded), matches=tuple(matches))


def _conv_norm(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(
        in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.GroupNorm(out_channels // 16, out_channels))


def _double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).reshape(1, 3, 1, 1)
