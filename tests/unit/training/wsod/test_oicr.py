import pytest
import torch

from training.wsod.oicr import OicrConfig, select_seeds

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
_BOTH = torch.tensor([1.0, 1.0])


def test_seeds_are_all_nearly_best_rois_without_overlap():
    seeds = select_seeds(_SCORES, _BOXES, _BOTH, OicrConfig())
    assert seeds.labels.tolist() == [1, 1, 2]
    torch.testing.assert_close(seeds.boxes, _BOXES[[0, 2, 3]])
    assert seeds.scores.tolist() == pytest.approx([0.50, 0.46, 0.30])


def test_the_paper_of_oicr_takes_the_best_roi_of_each_class_only():
    seeds = select_seeds(_SCORES, _BOXES, _BOTH, OicrConfig(seeds="best"))
    torch.testing.assert_close(seeds.boxes, _BOXES[[0, 3]])
    assert seeds.labels.tolist() == [1, 2]


def test_absent_classes_have_no_seeds():
    seeds = select_seeds(_SCORES, _BOXES, torch.tensor([0.0, 1.0]), OicrConfig())
    assert seeds.labels.tolist() == [2]
    assert len(select_seeds(_SCORES, _BOXES, torch.zeros(2), OicrConfig()).boxes) == 0


def test_suppression_knows_no_classes():
    scores = torch.tensor([[0.5, 0.1], [0.1, 0.4]])
    seeds = select_seeds(scores, _BOXES[:2], _BOTH, OicrConfig())
    assert seeds.labels.tolist() == [1]


@pytest.mark.parametrize("mode", ["best", "near_best"])
def test_no_rois_give_no_seeds(mode):
    seeds = select_seeds(torch.zeros(0, 2), torch.zeros(0, 4), _BOTH, OicrConfig(seeds=mode))
    assert (seeds.boxes.shape, seeds.labels.shape) == ((0, 4), (0,))


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="shares in"):
        OicrConfig(seed_share=1.2)
