import dataclasses

import pytest
import torch

from training.models.wsod_detector import (
    RoiDescriber,
    RoiDescriptions,
    WsodDetectorConfig,
    WsodHead,
    describe_kept_cells,
    describe_rois,
    enlarge,
)
from training.models.wsod_trunks import WsodTrunk
from training.train_wsod import WsodRecipe, branch_losses
from training.wsod.drop_block import DropBlockConfig
from training.wsod.mil_head import image_loss

_TOY = WsodDetectorConfig(image_size=64, head_width=16)
_EVERYTHING = dataclasses.replace(
    _TOY, num_refinements=2, box_regression=True, drop_block=DropBlockConfig(enabled=True, width=4)
)


def _descriptions(num_rois, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(num_rois, 1024, generator=generator) for _ in range(3)]
    cells = torch.rand(num_rois, 5, 5, 1024, generator=generator)
    return RoiDescriptions(
        mean_inside=parts[0], max_inside=parts[1], mean_around=parts[2], cells=cells
    )


def test_an_enlarged_box_has_the_box_in_its_inner_five_sevenths():
    assert enlarge(torch.tensor([[10.0, 20.0, 15.0, 30.0]])).tolist() == [[9.0, 18.0, 16.0, 32.0]]


def test_descriptions_tell_inside_from_around():
    features = torch.zeros(1, 2, 4, 4)
    features[0, 0] = 1.0  # channel 0 everywhere outside, channel 1 in the middle
    features[0, :, 1:3, 1:3] = torch.tensor([0.0, 1.0])[:, None, None]
    boxes = torch.tensor([[24.0, 24.0, 40.0, 40.0], [0.0, 0.0, 64.0, 64.0]])
    rois = describe_rois(features, boxes, stride=16)
    is_middle = [
        [part[i, 1] > part[i, 0] for i in (0, 1)] for part in (rois.mean_inside, rois.mean_around)
    ]
    assert is_middle == [[True, False], [True, False]]
    tiny = describe_rois(features, torch.tensor([[16.0, 16.0, 48.0, 48.0]]), stride=16)
    assert tiny.mean_inside[0, 1] > tiny.mean_around[0, 1]


def test_a_description_does_not_depend_on_the_contrast():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(1, 32, 4, 4, generator=generator)
    boxes = torch.tensor([[8.0, 8.0, 40.0, 56.0]])
    first = describe_rois(features, boxes, stride=16).mean_inside.float()
    second = describe_rois(100 * features, boxes, stride=16).mean_inside.float()
    torch.testing.assert_close(first, second, atol=0.05, rtol=0.05)


def test_both_maps_of_the_trunk_are_described():
    torch.manual_seed(0)
    describer = RoiDescriber(WsodTrunk("squeezenet")).eval()
    rois = describer(torch.rand(1, 3, 64, 64) * 255, torch.tensor([[8.0, 8.0, 40.0, 56.0]]))
    assert rois.mean_inside.shape == rois.max_inside.shape == rois.mean_around.shape == (1, 1024)


def test_what_is_kept_is_described_and_all_of_it_as_without_hiding():
    torch.manual_seed(0)
    describer = RoiDescriber(WsodTrunk("squeezenet"), keep_cells=True).eval()
    boxes = torch.tensor([[8.0, 8.0, 40.0, 56.0], [2.0, 20.0, 60.0, 44.0]])
    rois = describer(torch.rand(1, 3, 64, 64) * 255, boxes)
    everything = describe_kept_cells(rois, torch.ones(2, 5, 5), map_channels=(512, 512))
    for name in ("mean_inside", "max_inside", "mean_around"):
        torch.testing.assert_close(
            getattr(everything, name).float(), getattr(rois, name).float(), atol=0.05, rtol=0.02
        )
    keep = torch.ones(2, 5, 5)
    keep[:, :2] = 0
    partly = describe_kept_cells(rois, keep, map_channels=(512, 512))
    mean = rois.cells.float()[:, 2:].mean(dim=(1, 2))
    by_map = [torch.nn.functional.layer_norm(part, (512,)) for part in mean.split(512, dim=1)]
    torch.testing.assert_close(partly.mean_inside, torch.cat(by_map, dim=1), atol=1e-3, rtol=1e-3)


def test_cells_are_kept_on_demand_only():
    features = torch.rand(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[8.0, 8.0, 40.0, 56.0]])
    assert describe_rois(features, boxes, stride=16).cells is None
    assert describe_rois(features, boxes, stride=16, keep_cells=True).cells.shape == (1, 5, 5, 8)


def test_hiding_needs_cells_while_training_and_is_off_at_test_time():
    torch.manual_seed(0)
    head = WsodHead(_EVERYTHING, num_classes=3)
    blind = dataclasses.replace(_descriptions(6), cells=None)
    with pytest.raises(ValueError, match="DropBlock needs the cells"):
        head.train()(blind)
    outputs, again = head.eval()(_descriptions(6)), head(blind)
    torch.testing.assert_close(outputs.mil_scores, again.mil_scores)


@pytest.mark.parametrize("method", ["oicr", "mist"])
@pytest.mark.parametrize("config", [_TOY, _EVERYTHING])
def test_the_trunk_is_frozen_and_every_other_parameter_learns(config, method):
    describer = RoiDescriber(WsodTrunk("squeezenet"))
    assert not any(parameter.requires_grad for parameter in describer.parameters())
    # Hot draws, because at the published temperature few cells get a gradient.
    soft = dataclasses.replace(config.drop_block, temperature=1.0)
    config = dataclasses.replace(config, dropout=0.0, drop_block=soft)
    torch.manual_seed(0)
    head = WsodHead(config, num_classes=3).train()
    tags, boxes = torch.tensor([1.0, 1.0, 1.0]), torch.rand(24, 4).sort(dim=1).values * 60
    outputs = head(_descriptions(24))
    recipe = WsodRecipe(model=config, method=method)
    branches = branch_losses(outputs, boxes, tags, recipe)
    loss = image_loss(outputs.mil_scores, tags) + sum(branch.mean() for branch in branches)
    loss.backward()
    without = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    # The same bias for every RoI does not change the softmax over RoIs, and cancels besides.
    assert without == ["mil.detection.bias"]


def test_boxes_are_moved_by_the_mean_of_the_branches():
    torch.manual_seed(0)
    outputs = WsodHead(_EVERYTHING, num_classes=3).eval()(_descriptions(4))
    assert [branch.offsets.shape for branch in outputs.branches()] == [(4, 4, 4)] * 2
    expected = sum(outputs.refinement_offsets)[:, 1:] / 2
    torch.testing.assert_close(outputs.offsets(), expected)
    plain = WsodHead(_TOY, num_classes=3).eval()(_descriptions(4))
    assert plain.offsets() is None
    assert [branch.offsets for branch in plain.branches()] == [None] * 3


def test_scores_are_the_mean_of_the_branches_without_background():
    torch.manual_seed(0)
    outputs = WsodHead(_TOY, num_classes=3).eval()(_descriptions(4))
    scores = outputs.scores()
    assert scores.shape == (4, 3)
    expected = sum(logits.softmax(dim=1)[:, 1:] for logits in outputs.refinement_logits) / 3
    torch.testing.assert_close(scores, expected)
