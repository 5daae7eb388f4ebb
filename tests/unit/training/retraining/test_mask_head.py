import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection.roi_heads import maskrcnn_loss

from tests.unit.training.retraining.toy import TOY
from training.retrain_detector import total_loss
from training.retraining.drop_truth import RoiTruth, drop_counts, drop_report
from training.retraining.faster_rcnn import FasterRcnn
from training.retraining.mask_head import MASK_SIZE, mask_losses, mask_targets
from training.retraining.roi_drop import (
    KeptRois,
    RoiDropConfig,
    RoiLosses,
    keep_all_rois,
    keep_trusted_rois,
    reduce_roi_losses,
)

_TOY = dataclasses.replace(TOY, mask_channels=8)


def _toy_batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 64, 64, generator=generator) * 255
    boxes = [torch.tensor([[4.0, 4.0, 30.0, 40.0]]), torch.tensor([[20.0, 10.0, 60.0, 60.0]])]
    masks = [torch.zeros(1, 64, 64, dtype=torch.bool) for _ in range(2)]
    masks[0][0, 4:40, 4:17] = True
    masks[1][0, 10:35, 20:60] = True
    return images, boxes, [torch.tensor([0]), torch.tensor([1])], masks


def test_the_mean_loss_is_torchvisions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, MASK_SIZE, MASK_SIZE, generator=generator)
    rois = [torch.tensor([[2.0, 3, 30, 40], [0, 0, 64, 64]]), torch.tensor([[10.0, 8, 20, 50]])]
    masks = [torch.rand(2, 64, 64, generator=generator) > 0.5, torch.ones(1, 64, 64) > 0]
    labels = [torch.tensor([1, 4]), torch.tensor([2])]
    matches = [torch.tensor([1, 0]), torch.tensor([0])]
    by_object = [torch.tensor([4, 1]), torch.tensor([2])]
    theirs = maskrcnn_loss(logits, rois, [m.float() for m in masks], by_object, matches)
    targets = mask_targets([m.float() for m in masks], rois, matches)
    ours = mask_losses(logits, torch.cat(labels), targets)
    torch.testing.assert_close(ours.mean(), theirs)


def test_a_target_is_the_part_of_the_mask_inside_the_roi():
    mask = torch.zeros(1, 64, 64)
    mask[0, :, :20] = 1
    (target,) = mask_targets([mask], [torch.tensor([[10.0, 5.0, 30.0, 45.0]])], [torch.tensor([0])])
    assert target[:, : MASK_SIZE // 2 - 1].min() == 1
    assert target[:, MASK_SIZE // 2 + 1 :].max() == 0


def test_gradient_reaches_every_parameter_of_the_mask_head():
    torch.manual_seed(0)
    model = FasterRcnn(_TOY, 2)
    losses = model.training_losses(*_toy_batch())
    assert (losses.rois.mask > 0).tolist() == losses.rois.is_foreground.tolist()
    total, scalars = total_loss(losses, RoiDropConfig(enabled=False), 0, 1)
    total.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert scalars["mask"] > 0


def test_without_objects_masks_cost_nothing():
    torch.manual_seed(0)
    images, *_ = _toy_batch()
    nothing = [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2
    losses = FasterRcnn(_TOY, 2).training_losses(
        images, *nothing, [torch.zeros(0, 64, 64, dtype=torch.bool)] * 2
    )
    assert losses.rois.mask.shape == losses.rois.classification.shape
    assert not losses.rois.mask.any()
    assert reduce_roi_losses(losses.rois, keep_all_rois(losses.rois)).mask == 0


def test_a_mask_head_asks_for_masks():
    images, boxes, labels, _ = _toy_batch()
    with pytest.raises(ValueError, match="give the masks"):
        FasterRcnn(_TOY, 2).training_losses(images, boxes, labels)
    with pytest.raises(ValueError, match="mask_channels"):
        dataclasses.replace(_TOY, mask_channels=0)


def test_without_a_mask_head_the_model_is_the_one_that_it_was():
    """Weights of detectors trained before there were masks load as they are."""
    names = FasterRcnn(dataclasses.replace(_TOY, mask_channels=None), 2).state_dict().keys()
    more = FasterRcnn(_TOY, 2).state_dict().keys() - names
    assert more
    assert all(name.startswith("mask_head.") for name in more)


def _losses(classification, regression, mask):
    regression, mask = torch.tensor(regression), torch.tensor(mask)
    return RoiLosses(
        classification=torch.tensor(classification),
        regression=regression,
        is_foreground=mask > 0,
        mask=mask,
    )


def test_a_mask_is_dropped_with_its_class_or_its_box_and_the_divisor_stays():
    losses = _losses([9.0, 0.1, 0.1, 0.1], [0.1, 9.0, 0.1, 0.0], [0.5, 0.6, 0.7, 0.0])
    kept = keep_trusted_rois(losses, RoiDropConfig())
    assert kept.mask.tolist() == [False, False, True, True]
    assert reduce_roi_losses(losses, kept).mask.item() == pytest.approx(0.7 / 3)
    everything = reduce_roi_losses(losses, keep_all_rois(losses))
    assert everything.mask.item() == pytest.approx((0.5 + 0.6 + 0.7) / 3)


def test_in_joint_mode_a_mask_is_dropped_with_its_roi():
    losses = _losses([9.0, 9.0, 9.0], [9.0, 0.1, 0.0], [0.5, 0.6, 0.0])
    kept = keep_trusted_rois(losses, RoiDropConfig(mode="joint"))
    assert kept.mask.tolist() == [False, True, True]


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_dropping_never_raises_the_loss_and_order_does_not_matter(data):
    size = data.draw(st.integers(0, 8))
    rows = data.draw(
        st.lists(st.tuples(*[st.floats(0, 8, width=32)] * 3), min_size=size, max_size=size)
    )
    values = np.array(rows, np.float32).reshape(-1, 3)
    order = np.array(data.draw(st.permutations(range(size))), np.int64)

    def _mask_loss(values, config):
        losses = RoiLosses(
            classification=torch.from_numpy(values[:, 0].copy()),
            regression=torch.from_numpy(values[:, 1].copy()),
            is_foreground=torch.from_numpy(values[:, 2] > 0),
            mask=torch.from_numpy(values[:, 2].copy()),
        )
        kept = keep_all_rois(losses) if config is None else keep_trusted_rois(losses, config)
        return reduce_roi_losses(losses, kept).mask.item()

    dropped = _mask_loss(values, RoiDropConfig())
    assert dropped <= _mask_loss(values, None) + 1e-5
    assert dropped == pytest.approx(_mask_loss(values[order], RoiDropConfig()), abs=1e-5)


def test_dropped_masks_are_counted_and_compared_with_the_truth():
    losses = _losses([9.0, 0.1, 0.1], [0.1, 0.1, 0.1], [0.5, 0.5, 0.0])
    kept = KeptRois(
        classification=torch.tensor([False, True, True]), regression=torch.tensor([True] * 3)
    )
    truth = RoiTruth(
        label_is_wrong=torch.tensor([True, False, False]),
        box_is_wrong=torch.tensor([True, True, False]),
    )
    report = drop_report([drop_counts(losses, kept, truth)])
    assert report["mask"] == {
        "num_rois": 2,
        "num_dropped": 1,
        "evaluation_only": {"precision": 1.0, "recall": 0.5, "wrong_share": 1.0},
    }
    boxes_only = dataclasses.replace(losses, mask=None)
    assert "mask" not in drop_report([drop_counts(boxes_only, kept, truth)])


def test_masks_of_two_images_can_be_learnt_by_heart():
    torch.manual_seed(0)
    model = FasterRcnn(dataclasses.replace(_TOY, rois_per_image=8, foreground_share=0.5), 2)
    _, boxes, labels, masks = _toy_batch()
    images = torch.zeros(2, 3, 64, 64)
    images[0, 0][masks[0][0]] = 255.0
    images[1, 2][masks[1][0]] = 255.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = None
    for _ in range(80):
        losses = model.training_losses(images, boxes, labels, masks)
        total, scalars = total_loss(losses, RoiDropConfig(enabled=False), 0, 1)
        first = scalars["mask"] if first is None else first
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert scalars["mask"] < 0.5 * first
