import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from training.wsod.mist import MistConfig, is_separate, select_seeds

_DOGS = torch.tensor(
    [
        [0.0, 0.0, 10.0, 10.0],  # a dog
        [0.0, 0.0, 10.0, 9.0],  # the same dog
        [50.0, 50.0, 60.0, 60.0],  # another dog
        [80.0, 0.0, 90.0, 10.0],  # a cat
    ]
)
_SCORES = torch.tensor([[0.5, 0.0], [0.4, 0.0], [0.3, 0.1], [0.0, 0.6]])
_BOTH = torch.tensor([1.0, 1.0])


def _plain_seeds(scores, boxes, tags, config):
    """(roi, class, score) triples by the words of the algorithm, one RoI at a time."""
    seeds = []
    for label, is_present in enumerate(tags.tolist()):
        if not is_present:
            continue
        count = int(config.top_share * len(boxes)) if len(boxes) >= 10 else 0
        ranked = sorted(range(len(boxes)), key=lambda i: (-float(scores[i, label]), i))
        ranked = ranked[: max(1, count)]
        for position, roi in enumerate(ranked):
            better = ranked[:position]
            overlaps = [float(box_iou(boxes[[roi]], boxes[[j]])) for j in better]
            if all(overlap < config.separation_thresh for overlap in overlaps):
                seeds.append((roi, label, float(scores[roi, label])))
    return seeds


def test_several_separate_boxes_of_a_class_are_seeds():
    seeds = select_seeds(_SCORES, _DOGS, torch.tensor([1.0, 0.0]), MistConfig(top_share=0.75))
    torch.testing.assert_close(seeds.boxes, _DOGS[[0, 2]])
    assert seeds.labels.tolist() == [1, 1]
    assert seeds.scores.tolist() == pytest.approx([0.5, 0.3])


def test_seeds_of_all_classes_come_best_first():
    seeds = select_seeds(_SCORES, _DOGS, _BOTH, MistConfig(top_share=0.75))
    assert seeds.labels.tolist() == [2, 1, 1, 2, 2]
    assert seeds.scores.tolist() == pytest.approx([0.6, 0.5, 0.3, 0.1, 0.0])


def test_few_rois_have_one_candidate_for_each_class():
    seeds = select_seeds(_SCORES, _DOGS, _BOTH, MistConfig())
    assert seeds.labels.tolist() == [2, 1]


def test_a_box_beside_a_better_one_that_is_no_seed_is_none_either():
    boxes = torch.tensor([[0.0, 0, 10, 10], [3.0, 0, 13, 10], [9.0, 0, 19, 10]])
    overlap = box_iou(boxes, boxes)
    assert overlap[0, 2] < 0.2 < overlap[1, 2]
    assert is_separate(boxes, 0.2).tolist() == [True, False, False]


def test_absent_classes_and_no_rois_give_no_seeds():
    assert len(select_seeds(_SCORES, _DOGS, torch.zeros(2), MistConfig()).boxes) == 0
    nothing = select_seeds(torch.zeros(0, 2), torch.zeros(0, 4), _BOTH, MistConfig())
    assert (nothing.boxes.shape, nothing.labels.shape) == ((0, 4), (0,))


@given(
    num_rois=st.integers(1, 40),
    seed=st.integers(0, 10_000),
    top_share=st.sampled_from([0.05, 0.15, 0.5, 1.0]),
    thresh=st.sampled_from([0.1, 0.2, 0.6]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_seeds_equal_the_plain_definition(num_rois, seed, top_share, thresh):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(num_rois, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + 5 + 30 * torch.rand(num_rois, 2, generator=generator)], 1)
    scores = torch.randint(0, 12, (num_rois, 3), generator=generator) / 12  # with ties
    tags = (torch.rand(3, generator=generator) < 0.6).float()
    config = MistConfig(top_share=top_share, separation_thresh=thresh)
    if num_rois < 10 and top_share > 0.15:
        config = MistConfig(separation_thresh=thresh)
    seeds = select_seeds(scores, boxes, tags, config)
    expected = sorted(_plain_seeds(scores, boxes, tags, config), key=lambda s: (-s[2], s[1], s[0]))
    found = zip(seeds.boxes.tolist(), seeds.labels.tolist(), seeds.scores.tolist(), strict=True)
    assert sorted(found) == sorted(
        (boxes[roi].tolist(), label + 1, score) for roi, label, score in expected
    )
    assert seeds.scores.tolist() == sorted(seeds.scores.tolist(), reverse=True)


@pytest.mark.parametrize(
    "bad", [{"top_share": 0.0}, {"separation_thresh": 1.5}, {"first_branch_weight": 0.0}]
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=r"in \(0, 1\]|positive weight"):
        MistConfig(**bad)
