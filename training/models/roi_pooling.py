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
_NUM_SAMPLES = 14
"""Samples along a side of an RoI."""


def pool_rois(
    feature_map: Float[Tensor, "b c h w"],
    rois: Float[Tensor, "b k 4"],
    *,
    stride: int,
    num_cells: int = ROI_SIZE,
) -> Float[Tensor, "b k n n c"]:
    """Features of each RoI on a square grid of cells, channels last.

    Equals ``torchvision.ops.roi_align`` with ``aligned=True`` and 14 samples along each side of an
    RoI (``sampling_ratio=2`` for 7 cells), for RoIs inside the map.

    Args:
        feature_map: One map per image.
        rois: XYXY in pixels, the same number for each image.
        stride: Pixels per cell of the map.
        num_cells: Cells along a side of the grid; 1, 2, 7 or 14.
    """
    height, width = feature_map.shape[2:]
    along_y = _axis_weights(rois[..., 1], rois[..., 3], height, stride, num_cells)  # [b, k, n, h]
    along_x = _axis_weights(rois[..., 0], rois[..., 2], width, stride, num_cells)  # [b, k, n, w]
    rows = feature_map.permute(0, 2, 3, 1).flatten(2)  # [b, h, w * c]
    pooled_rows = torch.bmm(along_y.flatten(1, 2), rows)  # [b, k * n, w * c]
    pooled_rows = pooled_rows.unflatten(2, (width, -1)).unflatten(1, (-1, num_cells))
    return torch.matmul(along_x[:, :, None], pooled_rows)  # [b, k, 1, n, w] @ [b, k, n, w, c]


def _axis_weights(
    low: Float[Tensor, "b k"],
    high: Float[Tensor, "b k"],
    map_side: int,
    stride: int,
    num_cells: int,
) -> Float[Tensor, "b k n m"]:
    """The share of each of the map's cells in each of the RoI's cells, along one axis."""
    steps = (torch.arange(_NUM_SAMPLES, device=low.device, dtype=low.dtype) + 0.5) / _NUM_SAMPLES
    samples = low[..., None] + (high - low)[..., None] * steps
    positions = (samples / stride - 0.5).clamp(0, map_side - 1)  # [b, k, 14]
    centres = torch.arange(map_side, device=low.device, dtype=low.dtype)
    weights = (1 - (positions[..., None] - centres).abs()).clamp(min=0)
    return weights.unflatten(2, (num_cells, _NUM_SAMPLES // num_cells)).mean(dim=3)
