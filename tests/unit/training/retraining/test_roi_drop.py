import pytest
import torch

from training.retraining.roi_drop import (
    RoiDropConfig,
    RoiLosses,
    drop_statistics,
    keep_all_rois,
    keep_trusted_rois,
    reduce_roi_losses,
)


def _losses():
    """Background easy and hard; foreground: easy, wrong class, wrong box, both wrong."""
    return RoiLosses(
        classification=torch.tensor([0.1, 5.0, 0.2, 6.0, 0.3, 7.0], requires_grad=True),
        regression=torch.tensor([0.0, 0.0, 0.5, 0.6, 8.0, 9.0], requires_grad=True),
        is_foreground=torch.tensor([False, False, True, True, True, True]),
    )


def test_independent_drops_each_loss_by_its_own_threshold():
    kept = keep_trusted_rois(_losses(), RoiDropConfig(mode="independent"))
    assert kept.classification.tolist() == [True, False, True, False, True, False]
    assert kept.regression.tolist() == [True, True, True, True, False, False]


def test_joint_drops_both_losses_of_foreground_where_both_are_high():
    kept = keep_trusted_rois(_losses(), RoiDropConfig(mode="joint"))
    assert kept.classification.tolist() == [True, True, True, True, True, False]
    assert kept.regression.tolist() == [True, True, True, True, True, False]


def test_a_loss_at_the_threshold_is_kept():
    losses = RoiLosses(
        classification=torch.tensor([4.0]),
        regression=torch.tensor([4.0]),
        is_foreground=torch.tensor([True]),
    )
    kept = keep_trusted_rois(losses, RoiDropConfig())
    assert kept.classification.item()
    assert kept.regression.item()


def test_dropped_rois_count_as_zero_and_the_normaliser_stays():
    losses = _losses()
    reduced = reduce_roi_losses(losses, keep_trusted_rois(losses, RoiDropConfig()))
    assert reduced.classification.item() == pytest.approx((0.1 + 0.2 + 0.3) / 6)
    assert reduced.regression.item() == pytest.approx((0.5 + 0.6) / 6)


def test_no_gradient_reaches_a_dropped_roi_and_the_others_keep_theirs():
    losses = _losses()
    reduced = reduce_roi_losses(losses, keep_trusted_rois(losses, RoiDropConfig()))
    (reduced.classification + reduced.regression).backward()
    sixth = pytest.approx(1 / 6)
    assert losses.classification.grad.tolist() == [sixth, 0, sixth, 0, sixth, 0]
    assert losses.regression.grad.tolist() == [0, 0, sixth, sixth, 0, 0]


def test_before_the_start_everything_counts():
    config = RoiDropConfig(start_fraction=0.5)
    assert [config.is_active(step, 10) for step in (0, 4, 5, 9)] == [False, False, True, True]
    assert not RoiDropConfig(enabled=False).is_active(9, 10)
    losses = _losses()
    reduced = reduce_roi_losses(losses, keep_all_rois(losses))
    assert reduced.classification.item() == pytest.approx(18.6 / 6)


def test_no_rois_give_zero_loss():
    nothing = torch.zeros(0)
    losses = RoiLosses(
        classification=nothing, regression=nothing, is_foreground=torch.zeros(0, dtype=torch.bool)
    )
    kept = keep_trusted_rois(losses, RoiDropConfig())
    reduced = reduce_roi_losses(losses, kept)
    assert (reduced.classification.item(), reduced.regression.item()) == (0.0, 0.0)
    assert set(drop_statistics(losses, kept).values()) == {0.0}


def test_the_log_says_which_share_was_dropped():
    losses = _losses()
    assert drop_statistics(losses, keep_trusted_rois(losses, RoiDropConfig())) == {
        "dropped_background": 0.5,
        "dropped_classification": 0.5,
        "dropped_regression": 0.5,
    }


@pytest.mark.parametrize("bad", [{"classification_thresh": -1.0}, {"start_fraction": 1.5}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=r"at least 0|in \[0, 1\]"):
        RoiDropConfig(**bad)
