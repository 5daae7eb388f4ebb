"""RoIAlign as two matrix products.

Bilinear sampling on a regular grid is separable: along each axis, a cell of an RoI is a weighted
mean of the map's cells. Two batched products give the pooled features with operators that every
engine has, and train several times faster on a CPU than scattered reads and writes.
"""

import torch
from jaxtyping import Float
from torch import Tensor

ROI_SIZE = 7
"""Cells along a side of a pooled RoI."""
_SAMPLES_PER_CELL = 2
"""Samples along a side of a cell."""


def pool_rois(
    feature_map: Float[Tensor, "b c h w"], rois: Float[Tensor, "b k 4"], *, stride: int
) -> Float[Tensor, "b k 7 7 c"]:
    """Features of each RoI on a grid of 7x7 cells, channels last.

    Equals ``torchvision.ops.roi_align`` with ``aligned=True`` and ``sampling_ratio=2`` for RoIs
    inside the map.

    Args:
        feature_map: One map per image.
        rois: XYXY in pixels, the same number for each image.
        stride: Pixels per cell of the map.
    """
    height, width = feature_map.shape[2:]
    along_y = _axis_weights(rois[..., 1], rois[..., 3], height, stride)  # [b, k, 7, h]
    along_x = _axis_weights(rois[..., 0], rois[..., 2], width, stride)  # [b, k, 7, w]
    rows = feature_map.permute(0, 2, 3, 1).flatten(2)  # [b, h, w * c]
    pooled_rows = torch.bmm(along_y.flatten(1, 2), rows)  # [b, k * 7, w * c]
    pooled_rows = pooled_rows.unflatten(2, (width, -1)).unflatten(1, (-1, ROI_SIZE))
    return torch.matmul(along_x[:, :, None], pooled_rows)  # [b, k, 1, 7, w] @ [b, k, 7, w, c]


def _axis_weights(
    low: Float[Tensor, "b k"], high: Float[Tensor, "b k"], num_cells: int, stride: int
) -> Float[Tensor, "b k 7 n"]:
    """The share of each of the map's cells in each of the RoI's cells, along one axis."""
    num_samples = ROI_SIZE * _SAMPLES_PER_CELL
    steps = (torch.arange(num_samples, device=low.device, dtype=low.dtype) + 0.5) / num_samples
    samples = low[..., None] + (high - low)[..., None] * steps
    positions = (samples / stride - 0.5).clamp(0, num_cells - 1)  # [b, k, 14]
    cells = torch.arange(num_cells, device=low.device, dtype=low.dtype)
    weights = (1 - (positions[..., None] - cells).abs()).clamp(min=0)
    return weights.unflatten(2, (ROI_SIZE, _SAMPLES_PER_CELL)).mean(dim=3)
