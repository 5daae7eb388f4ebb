import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torchvision.models.detection.roi_heads import fastrcnn_loss

from tests.unit.training.retraining.toy import TOY
from training.retrain_detector import DetectorRecipe, parameter_groups, rate_factor, total_loss
from training.retraining.faster_rcnn import (
    FasterRcnn,
    FasterRcnnConfig,
    pool_sampled_rois,
    roi_losses,
)
from training.retraining.roi_drop import RoiDropConfig, keep_all_rois, reduce_roi_losses


def _toy_model(num_classes=2):
    torch.manual_seed(0)
    return FasterRcnn(TOY, num_classes)


def _toy_batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 64, 64, generator=generator) * 255
    boxes = [torch.tensor([[4.0, 4.0, 30.0, 40.0]]), torch.tensor([[20.0, 10.0, 60.0, 60.0]])]
    return images, boxes, [torch.tensor([0]), torch.tensor([1])]


def test_gradient_reaches_every_parameter():
    model = _toy_model()
    losses = model.training_losses(*_toy_batch())
    total, _ = total_loss(losses, RoiDropConfig(enabled=False), 0, 1)
    total.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_an_image_without_boxes_is_all_background():
    images, boxes, labels = _toy_batch()
    boxes[1], labels[1] = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    losses = _toy_model().training_losses(images, boxes, labels)
    assert torch.isfinite(losses.objectness + losses.rpn_box + losses.rois.classification.sum())
    assert not losses.rois.is_foreground[-8:].any()


def test_without_drop_the_classification_loss_is_torchvisions():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 3, generator=generator)
    offsets = torch.randn(6, 12, generator=generator)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    targets = torch.randn(6, 4, generator=generator)
    losses = roi_losses(logits, offsets, labels, targets)
    ours = reduce_roi_losses(losses, keep_all_rois(losses))
    theirs, _ = fastrcnn_loss(logits, offsets, [labels], [targets])
    torch.testing.assert_close(ours.classification, theirs)


def test_the_regression_loss_is_the_absolute_error_of_the_own_class_over_all_rois():
    offsets = torch.arange(24.0).reshape(2, 12)
    targets = torch.zeros(2, 4)
    losses = roi_losses(torch.zeros(2, 3), offsets, torch.tensor([0, 2]), targets)
    assert losses.regression.tolist() == [0.0, 20.0 + 21 + 22 + 23]
    reduced = reduce_roi_losses(losses, keep_all_rois(losses))
    assert reduced.regression.item() == pytest.approx(86 / 2)


def test_anchors_come_level_by_level_with_the_configured_sizes():
    levels = _toy_model().anchors()
    assert [len(level) for level in levels] == [8 * 8 * 3, 4 * 4 * 3, 2 * 2 * 3]
    for level, size in zip(levels, (12, 24, 44), strict=True):
        sides = level[:, 2:] - level[:, :2]
        np.testing.assert_allclose(sides.prod(dim=1).sqrt().numpy(), size, rtol=0.1)


@pytest.mark.parametrize("bad", [{"image_size": 100}, {"anchor_sizes": ((8,), (16,))}])
def test_sizes_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match=r"multiple|levels"):
        FasterRcnnConfig(**bad)


def test_the_trunk_learns_slower_and_biases_do_not_decay():
    model = _toy_model()
    recipe = DetectorRecipe(model=TOY, learning_rate=1.0, trunk_rate=0.1, weight_decay=0.5)
    groups = parameter_groups(model, recipe)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    by_id = {id(p): g for g in groups for p in g["params"]}
    assert by_id[id(model.trunk.conv1.weight)]["peak_lr"] == pytest.approx(0.1)
    assert by_id[id(model.trunk.conv1.bias)]["weight_decay"] == 0.0
    assert by_id[id(model.box_head.classes.weight)]["peak_lr"] == 1.0
    assert by_id[id(model.box_head.classes.weight)]["weight_decay"] == 0.5


def test_the_rate_warms_up_and_falls_to_zero():
    factors = [rate_factor(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert factors[-1] < 0.001


def test_two_images_can_be_learnt_by_heart():
    torch.manual_seed(0)
    model = FasterRcnn(dataclasses.replace(TOY, rois_per_image=8, foreground_share=0.5), 2)
    _, boxes, labels = _toy_batch()
    images = torch.zeros(2, 3, 64, 64)
    images[0, 0, 4:40, 4:30] = 255.0
    images[1, 2, 10:60, 20:60] = 255.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(55):
        losses = model.training_losses(images, boxes, labels)
        total, _ = total_loss(losses, RoiDropConfig(enabled=False), 0, 1)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    features = model.eval().features(images)
    logits, _ = model.box_head(pool_sampled_rois(features, boxes))
    assert logits.argmax(dim=1).tolist() == [1, 2]
