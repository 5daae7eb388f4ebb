import math
from functools import partial

import pytest
import torch
from torchvision.ops import box_iou

from training.models.detector_adapter import decode_boxes
from training.wsod.oicr import OicrConfig, select_seeds
from training.wsod.refinement import (
    BOX_WEIGHTS,
    BranchOutputs,
    RoiTargets,
    Seeds,
    assign_rois,
    classification_losses,
    refine,
    regression_losses,
)

_BOXES = torch.tensor(
    [
        [0.0, 0.0, 10.0, 10.0],  # an object of class 0
        [0.0, 0.0, 10.0, 9.0],  # nearly the same
        [50.0, 50.0, 60.0, 60.0],  # a second object of class 0
        [80.0, 0.0, 90.0, 10.0],  # an object of class 1
        [30.0, 30.0, 34.0, 34.0],  # background
    ]
)
_SCORES = torch.tensor([[0.50, 0.0], [0.48, 0.0], [0.46, 0.1], [0.0, 0.30], [0.2, 0.05]])
_SEEDS = Seeds(
    boxes=_BOXES[[0, 2, 3]], labels=torch.tensor([1, 1, 2]), scores=torch.tensor([0.5, 0.46, 0.3])
)
_NO_SEEDS = Seeds(
    boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), scores=torch.zeros(0)
)


def _random_boxes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 60
    return torch.cat([corners, corners + 5 + torch.rand(count, 2, generator=generator) * 35], dim=1)


def test_rois_take_the_class_score_and_box_of_the_seed_they_overlap_best():
    targets = assign_rois(_BOXES, _SEEDS, foreground_thresh=0.5)
    assert targets.labels.tolist() == [1, 1, 1, 2, 0]
    assert targets.weights.tolist() == pytest.approx([0.50, 0.50, 0.46, 0.30, 0.50])
    torch.testing.assert_close(targets.boxes[:4], _BOXES[[0, 0, 2, 3]])


def test_without_seeds_no_roi_counts():
    targets = assign_rois(_BOXES, _NO_SEEDS, foreground_thresh=0.5)
    assert targets.labels.tolist() == [0] * 5
    assert targets.weights.tolist() == [0.0] * 5
    offsets = torch.ones(5, 3, 4)
    assert regression_losses(offsets, _BOXES, targets).tolist() == [0.0] * 5


def test_the_loss_is_weighted_cross_entropy():
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, math.log(2.0), 0.0]])
    targets = RoiTargets(
        labels=torch.tensor([0, 1]), weights=torch.tensor([0.5, 2.0]), boxes=_BOXES[:2]
    )
    losses = classification_losses(logits, targets)
    assert losses.tolist() == pytest.approx([0.5 * math.log(3), 2 * math.log(2)], rel=1e-4)


def _plain_regression_loss(offsets, box, target_box, weight):
    """Of one foreground RoI, number by number."""
    width, height = box[2] - box[0], box[3] - box[1]
    target_width, target_height = target_box[2] - target_box[0], target_box[3] - target_box[1]
    wanted = [
        10 * ((target_box[0] + target_box[2]) - (box[0] + box[2])) / 2 / width,
        10 * ((target_box[1] + target_box[3]) - (box[1] + box[3])) / 2 / height,
        5 * math.log(target_width / width),
        5 * math.log(target_height / height),
    ]
    total = 0.0
    for ours, theirs in zip(offsets, wanted, strict=True):
        error = abs(ours - theirs)
        total += 0.5 * error**2 if error < 1 else error - 0.5
    return weight * total


def test_the_regression_loss_equals_its_plain_definition():
    boxes = _random_boxes(12, seed=0)
    seeds = Seeds(
        boxes=_random_boxes(3, seed=1),
        labels=torch.tensor([2, 1, 2]),
        scores=torch.tensor([0.9, 0.6, 0.2]),
    )
    offsets = torch.randn(12, 3, 4, generator=torch.Generator().manual_seed(2))
    targets = assign_rois(boxes, seeds, foreground_thresh=0.2)
    overlap = box_iou(boxes, seeds.boxes)
    expected = []
    for i in range(12):
        best = int(overlap[i].argmax())
        if overlap[i, best] < 0.2:
            expected.append(0.0)
            continue
        own = offsets[i, int(seeds.labels[best])].tolist()
        box, seed_box = boxes[i].tolist(), seeds.boxes[best].tolist()
        expected.append(_plain_regression_loss(own, box, seed_box, float(seeds.scores[best])))
    assert 0 < sum(value > 0 for value in expected) < 12
    assert regression_losses(offsets, boxes, targets).tolist() == pytest.approx(expected, rel=1e-4)


def test_offsets_without_loss_move_an_roi_onto_its_seed():
    targets = assign_rois(_BOXES, _SEEDS, foreground_thresh=0.5)
    offsets = torch.zeros(5, 3, 4, requires_grad=True)
    optimizer = torch.optim.SGD([offsets], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        regression_losses(offsets, _BOXES, targets).sum().backward()
        optimizer.step()
    moved = decode_boxes(_BOXES[1], offsets[1, 1].detach(), BOX_WEIGHTS)
    torch.testing.assert_close(moved, _BOXES[0], atol=0.01, rtol=0)


def test_the_losses_of_a_branch_are_divided_by_all_rois():
    tags = torch.tensor([1.0, 1.0])
    branch = BranchOutputs(logits=torch.zeros(5, 3), offsets=torch.ones(5, 3, 4))
    select = partial(select_seeds, config=OicrConfig())
    (losses,) = refine(_SCORES, [branch], _BOXES, tags, select_seeds=select, foreground_thresh=0.5)
    assert losses.regression[4] == 0  # background
    expected = (losses.classification.sum() + losses.regression[:4].sum()) / 5
    torch.testing.assert_close(losses.mean(), expected)


def test_each_branch_learns_from_the_one_before_it_and_sends_no_gradient_there():
    mil = _SCORES.clone().requires_grad_()
    logits = [torch.zeros(5, 3, requires_grad=True) for _ in range(2)]
    losses = refine(
        mil,
        [BranchOutputs(logits=of_branch) for of_branch in logits],
        _BOXES,
        torch.tensor([1.0, 0.0]),
        select_seeds=partial(select_seeds, config=OicrConfig()),
        foreground_thresh=0.5,
    )
    torch.stack([branch.mean() for branch in losses]).sum().backward()
    assert mil.grad is None
    # Branch 1 knows the seeds of the MIL scores: RoIs 0 to 2 are class 0, the others background.
    assert (-logits[0].grad).argmax(dim=1).tolist() == [1, 1, 1, 0, 0]
    # Branch 2 sees equal scores from branch 1: every RoI is its own seed of class 0.
    assert (-logits[1].grad).argmax(dim=1).tolist() == [1, 1, 1, 1, 1]
