"""torchvision's detector on our trunk is a peer: the same trunk, anchors and images."""

import pytest
import torch
from torchvision.models.detection import FasterRCNN, MaskRCNN

from benchmarks.training import (
    LOSS,
    MASKS,
    OURS,
    SAME_TRUNK,
    SAME_TRUNK_MASKS,
    WITH_DROP,
    WITHOUT_DROP,
    TrainingConfig,
    count_flops,
    measure,
    torchvision_on_our_trunk,
)
from training.retraining.faster_rcnn import FasterRcnn, FasterRcnnConfig


@pytest.mark.parametrize(("mask_channels", "kind"), [(None, FasterRCNN), (8, MaskRCNN)])
def test_the_peer_shares_trunk_pyramid_and_anchors(mask_channels, kind):
    config = FasterRcnnConfig(image_size=64, mask_channels=mask_channels)
    ours = FasterRcnn(config, num_classes=3)
    peer = torchvision_on_our_trunk(ours)
    assert type(peer) is kind
    assert peer.backbone.trunk is ours.trunk
    assert peer.rpn.anchor_generator is ours.anchor_generator
    assert peer.roi_heads.fg_bg_sampler.batch_size_per_image == config.rois_per_image
    with torch.inference_mode():
        levels = peer.backbone(torch.zeros(1, 3, 64, 64))
        (found,) = peer.eval()([torch.rand(3, 64, 64)])
    assert [tuple(level.shape[-2:]) for level in levels.values()] == [(8, 8), (4, 4), (2, 2)]
    assert {"boxes", "labels", "scores"} <= set(found)


def test_work_is_counted_with_its_backward_pass():
    layer, rows = torch.nn.Linear(8, 4), torch.rand(5, 8)
    forward = 2 * 5 * 8 * 4
    assert count_flops(lambda: layer(rows)) == forward
    assert count_flops(lambda: layer(rows).sum().backward()) == 2 * forward  # rows need none


@pytest.mark.slow
def test_every_kind_of_work_is_measured_in_turns():
    result = measure(TrainingConfig(repeats=2, inferences=1, steps=1, batch_size=1), None)
    kinds = {
        "inference": (OURS, SAME_TRUNK),
        "training step of 1": (WITH_DROP, WITHOUT_DROP, SAME_TRUNK, MASKS, SAME_TRUNK_MASKS),
        LOSS: (WITH_DROP, WITHOUT_DROP),
    }
    for kind, ways in kinds.items():
        for way in ways:
            metric = result.metric(f"{kind}: {way}")
            assert len(metric.repeats) == 2
            assert (metric.floor is None) == (kind == LOSS)
    assert len(result.notes) >= 7
