import math

import pytest
import torch

from training.wsod.mil_head import MilHead, image_loss


def _head():
    torch.manual_seed(0)
    return MilHead(5, 3)


def test_scores_are_shares_and_sum_to_at_most_one_over_the_rois():
    scores = _head()(torch.randn(7, 5, generator=torch.Generator().manual_seed(1)))
    assert scores.shape == (7, 3)
    assert bool((scores >= 0).all())
    assert bool((scores.sum(dim=0) <= 1 + 1e-6).all())


def test_a_class_that_is_around_the_box_too_speaks_against_it():
    head = _head()
    inside = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).repeat_interleave(2, 0)
    nothing = torch.zeros(4, 5)
    towards_class_0 = head.detection.weight[0].detach() * 3
    around = nothing.clone()
    around[1] = towards_class_0
    scores = head(inside, around)
    assert scores[1, 0] < scores[0, 0]
    torch.testing.assert_close(scores[2], scores[3])


def test_the_loss_compares_the_sum_over_rois_with_the_tags():
    scores = torch.tensor([[0.2, 0.1], [0.3, 0.0]])
    expected = -math.log(0.5) - math.log(1 - 0.1)
    assert image_loss(scores, torch.tensor([1.0, 0.0])).item() == pytest.approx(expected, rel=1e-5)


def test_certain_scores_give_a_finite_loss():
    scores = torch.tensor([[1.0, 0.0]])
    assert torch.isfinite(image_loss(scores, torch.tensor([0.0, 1.0])))
