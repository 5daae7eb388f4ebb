"""torchvision's detector on our trunk is a peer: the same trunk, anchors and images."""

import pytest
import torch

from benchmarks.training import OURS, SAME_TRUNK, TrainingConfig, measure, torchvision_on_our_trunk
from training.retraining.faster_rcnn import FasterRcnn, FasterRcnnConfig


def test_the_peer_shares_trunk_pyramid_and_anchors():
    ours = FasterRcnn(FasterRcnnConfig(image_size=64), num_classes=3)
    peer = torchvision_on_our_trunk(ours)
    assert peer.backbone.trunk is ours.trunk
    assert peer.rpn.anchor_generator is ours.anchor_generator
    with torch.inference_mode():
        levels = peer.backbone(torch.zeros(1, 3, 64, 64))
        (found,) = peer.eval()([torch.rand(3, 64, 64)])
    assert [tuple(level.shape[-2:]) for level in levels.values()] == [(8, 8), (4, 4), (2, 2)]
    assert set(found) == {"boxes", "labels", "scores"}


@pytest.mark.slow
def test_both_kinds_of_work_are_measured_in_turns():
    result = measure(TrainingConfig(repeats=2, inferences=1, steps=1, batch_size=1), None)
    for kind in ("inference", "training step of 1"):
        for way in (OURS, SAME_TRUNK):
            assert len(result.metric(f"{kind}: {way}").repeats) == 2
    assert len(result.notes) == 4
