"""The detector as a dense graph with a fixed number of candidates, as it is exported and served.

No suppression by overlap inside: RPN boxes are thinned by keeping local maxima of objectness, RoIs
are pooled by matrix products, and the runtime suppresses what overlaps (``weaksam_rt.boxes``).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor, nn
from torch.nn import functional

from training.retraining.faster_rcnn import (
    BOX_WEIGHTS,
    DetectorFeatures,
    FasterRcnn,
    pool_all_masks,
    pool_all_rois,
)
from training.retraining.mask_head import MASK_SIZE, RoiMaskHead

_MAX_LOG_SCALE = math.log(1000 / 16)
"""Bound on decoded log sizes, torchvision's."""
_NOT_A_PEAK = -1e4
"""Added to the logits of suppressed anchors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateConfig:
    """How many boxes go through the graph."""

    num_rois: int = 150
    """RPN boxes that the RoI head looks at, per image."""
    num_candidates: int = 100
    """Boxes returned per image."""
    peak_window: int = 3
    """Side, in cells and odd, of the window in which an anchor must be the best of its shape; 1
    keeps all."""

    def __post_init__(self) -> None:
        if self.peak_window % 2 == 0 or min(self.num_rois, self.num_candidates) < 1:
            raise ValueError(
                f"peak_window must be odd and the counts at least 1, got {self.peak_window}, "
                f"{self.num_rois}, {self.num_candidates}"
            )


class DetectorAdapter(nn.Module):
    """A ``FasterRcnn`` in the shape of the detector's serving contract."""

    def __init__(self, model: FasterRcnn, config: CandidateConfig | None = None) -> None:
        super().__init__()
        self.model = model
        self.config = CandidateConfig() if config is None else config
        self.register_buffer("anchors", torch.cat(model.anchors()), persistent=False)

    anchors: Tensor

    @property
    def mask_size(self) -> int:
        """Side of the masks; 0 without a mask head."""
        return 0 if self.model.mask_head is None else MASK_SIZE

    def forward(
        self, image: UInt8[Tensor, "b s s 3"]
    ) -> (
        tuple[Float[Tensor, "b d 4"], Float[Tensor, "b d"], Int32[Tensor, "b d"]]
        | tuple[
            Float[Tensor, "b d 4"], Float[Tensor, "b d"], Int32[Tensor, "b d"],
            Float[Tensor, "b d m m"],
        ]
    ):  # fmt: skip
        """Candidates of each image, best score first.

        Args:
            image: RGB, longest side scaled to ``s``, top-left aligned, padded with zeros.

        Returns:
            Boxes XYXY in the model frame and inside it, scores in [0, 1], 0-based labels. A box
            may come with several labels, and boxes overlap: suppress per label. With a mask head
            also the logits of each box's mask of its own class, on a grid over the box.
        """
        features = self.model.features(image.permute(0, 3, 1, 2).float())
        rois = self._propose(features.levels)  # [b, k, 4]
        logits, offsets = self.model.box_head(pool_all_rois(features, rois))
        shape = rois.shape[:2]
        scores = logits.softmax(dim=-1).unflatten(0, shape)[:, :, 1:]  # [b, k, c]
        boxes = decode_boxes(
            rois[:, :, None, :],
            offsets.unflatten(1, (-1, 4)).unflatten(0, shape)[:, :, 1:],
            BOX_WEIGHTS,
        )
        best, index = scores.flatten(1).topk(self.config.num_candidates, dim=1)
        boxes = self._clip(boxes.flatten(1, 2).gather(1, index[:, :, None].expand(-1, -1, 4)))
        labels = index % self.model.num_classes
        if self.model.mask_head is None:
            return boxes, best, labels.int()
        masks = self._masks(self.model.mask_head, features, boxes, labels)
        return boxes, best, labels.int(), masks

    def _masks(
        self, head: RoiMaskHead, features: DetectorFeatures, boxes: Tensor, labels: Tensor
    ) -> Tensor:
        """Mask logits of each box's own class, [b, d, m, m]."""
        logits = head(pool_all_masks(features, boxes)).unflatten(0, boxes.shape[:2])
        own = labels[:, :, None, None, None].expand(-1, -1, 1, MASK_SIZE, MASK_SIZE)
        return logits.gather(2, own)[:, :, 0]

    def _propose(self, levels: tuple[Tensor, ...]) -> Tensor:
        """The most object-like RPN boxes, [b, k, 4]."""
        objectness, offsets = self.model.rpn.head(levels)
        peaks = torch.cat([_in_anchor_order(self._peaks(x), 1) for x in objectness], dim=1)
        flat_offsets = torch.cat([_in_anchor_order(x, 4) for x in offsets], dim=1)
        index = peaks[:, :, 0].topk(self.config.num_rois, dim=1).indices
        chosen = flat_offsets.gather(1, index[:, :, None].expand(-1, -1, 4))
        anchors = self.anchors[index]
        return self._clip(decode_boxes(anchors, chosen, (1.0, 1.0, 1.0, 1.0)))

    def _peaks(self, objectness: Tensor) -> Tensor:
        """Logits with ``_NOT_A_PEAK`` added where a neighbour of the same shape is better."""
        window = self.config.peak_window
        best = functional.max_pool2d(objectness, window, stride=1, padding=window // 2)
        return objectness + _NOT_A_PEAK * (objectness < best).float()

    def _clip(self, boxes: Tensor) -> Tensor:
        return boxes.clamp(0.0, float(self.model.config.image_size))


def decode_boxes(
    boxes: Float[Tensor, "*n 4"],
    offsets: Float[Tensor, "*m 4"],
    weights: tuple[float, float, float, float],
) -> Float[Tensor, "*m 4"]:
    """Boxes moved and scaled by encoded offsets; the shapes broadcast.

    Source:
        torchvision's ``BoxCoder.decode``, without its reshaping.
    """
    sizes = boxes[..., 2:] - boxes[..., :2]
    centres = boxes[..., :2] + 0.5 * sizes
    scale = torch.tensor(weights, device=boxes.device)
    scaled = offsets / scale
    new_centres = centres + scaled[..., :2] * sizes
    half = 0.5 * sizes * scaled[..., 2:].clamp(max=_MAX_LOG_SCALE).exp()
    return torch.cat([new_centres - half, new_centres + half], dim=-1)


def _in_anchor_order(x: Tensor, num_values: int) -> Tensor:
    """[b, a * v, h, w] as [b, h * w * a, v], the order of the anchors."""
    by_anchor = x.unflatten(1, (-1, num_values))  # [b, a, v, h, w]
    return by_anchor.permute(0, 3, 4, 1, 2).flatten(1, 3)
