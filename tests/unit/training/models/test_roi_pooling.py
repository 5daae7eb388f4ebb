import pytest
import torch
from torchvision.ops import roi_align

from training.models.roi_pooling import pool_rois


def _random_rois(num_images, num_rois, side, generator):
    corners = torch.rand(num_images, num_rois, 2, 2, generator=generator) * side
    return torch.cat([corners.min(dim=2).values, corners.max(dim=2).values], dim=-1)


@pytest.mark.parametrize("stride", [8, 16])
def test_equals_roi_align_for_rois_inside_the_map(stride):
    generator = torch.Generator().manual_seed(0)
    feature_map = torch.randn(2, 5, 12, 12, generator=generator)
    rois = _random_rois(2, 9, 12 * stride, generator)
    rois[0, 0] = torch.tensor([0.0, 0.0, 12 * stride, 12 * stride])
    ours = pool_rois(feature_map, rois, stride=stride)
    theirs = roi_align(feature_map, list(rois), 7, 1 / stride, 2, aligned=True)
    theirs = theirs.unflatten(0, (2, 9)).permute(0, 1, 3, 4, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_map_that_is_not_square_is_pooled_alike():
    generator = torch.Generator().manual_seed(1)
    feature_map = torch.randn(1, 3, 6, 10, generator=generator)
    rois = _random_rois(1, 4, 48, generator)
    theirs = roi_align(feature_map, list(rois), 7, 1 / 8, 2, aligned=True)
    ours = pool_rois(feature_map, rois, stride=8)[0].permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_one_cell_is_the_mean_of_all():
    generator = torch.Generator().manual_seed(3)
    feature_map, rois = torch.randn(1, 3, 8, 8), _random_rois(1, 5, 64, generator)
    cells = pool_rois(feature_map, rois, stride=8)
    mean = pool_rois(feature_map, rois, stride=8, num_cells=1)
    torch.testing.assert_close(mean[:, :, 0, 0], cells.mean(dim=(2, 3)))


def test_gradients_are_those_of_roi_align():
    generator = torch.Generator().manual_seed(2)
    feature_map = torch.randn(1, 2, 8, 8, generator=generator)
    rois = _random_rois(1, 3, 64, generator)
    ours, theirs = (feature_map.clone().requires_grad_() for _ in range(2))
    pool_rois(ours, rois, stride=8).square().sum().backward()
    roi_align(theirs, list(rois), 7, 1 / 8, 2, aligned=True).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_no_rois_give_no_features():
    assert pool_rois(torch.zeros(2, 3, 4, 4), torch.zeros(2, 0, 4), stride=8).shape == (
        2,
        0,
        7,
        7,
        3,
    )
