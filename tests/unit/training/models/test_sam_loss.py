import pytest
import torch

from training.models.sam_decoder import MaskPrediction
from training.models.sam_loss import (
    SamLossConfig,
    dice_loss,
    distillation_loss,
    focal_loss,
    hard_iou,
    sam_loss,
)

CONFIG = SamLossConfig(other_token=0.0, losing_masks=0.0)


def square(size: int) -> torch.Tensor:
    target = torch.zeros(1, 8, 8)
    target[:, :size, :size] = 1
    return target


def prediction_of(*targets: torch.Tensor, iou: float = 1.0) -> MaskPrediction:
    """Confident masks of the given shapes, one per token."""
    logits = torch.stack([40 * target - 20 for target in targets], dim=1)
    return MaskPrediction(logits, torch.full((1, len(targets)), iou))


def test_focal_loss_of_certain_answers_is_known() -> None:
    logits = torch.tensor([0.0, 2.0]).reshape(1, 1, 1, 2)
    target = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
    p = torch.sigmoid(torch.tensor(2.0))
    expected = (0.25 * 0.5**2 * torch.log(torch.tensor(2.0)) - 0.75 * p**2 * torch.log(1 - p)) / 2

    torch.testing.assert_close(focal_loss(logits, target), expected.reshape(1, 1))


def test_a_right_mask_costs_nothing_and_a_wrong_one_much() -> None:
    (right,) = dice_loss(prediction_of(square(4)).low_res_logits, square(4)[:, None])
    (wrong,) = dice_loss(prediction_of(1 - square(4)).low_res_logits, square(4)[:, None])

    assert right == pytest.approx(0, abs=1e-6)
    assert wrong > 0.9


def test_a_point_counts_the_best_of_the_three_masks() -> None:
    empty = square(0)
    prediction = prediction_of(empty, empty, square(4), empty)
    iou = prediction._replace(iou_predictions=torch.tensor([[0.0, 0.0, 1.0, 0.0]]))

    loss = sam_loss(iou, square(4), torch.tensor([True]), CONFIG)

    assert loss.total == pytest.approx(0, abs=1e-5)
    assert loss.best_iou == 1


def test_a_box_counts_the_single_mask() -> None:
    empty = square(0)
    prediction = prediction_of(empty, square(4), square(4), square(4))

    loss = sam_loss(prediction, square(4), torch.tensor([False]), CONFIG)

    assert loss.masks > 0.9
    assert loss.best_iou == 0


def test_every_mask_gets_a_gradient_whatever_the_prompt() -> None:
    for is_ambiguous in (True, False):
        logits = torch.zeros(1, 4, 8, 8, requires_grad=True)
        prediction = MaskPrediction(logits, torch.zeros(1, 4))
        loss = sam_loss(prediction, square(3), torch.tensor([is_ambiguous]), SamLossConfig())
        loss.total.backward()
        assert logits.grad is not None
        assert (logits.grad.abs().amax(dim=(0, 2, 3)) > 0).all()


def test_predicted_iou_is_compared_with_the_true_one() -> None:
    prediction = prediction_of(*[square(4)] * 4, iou=0.5)

    loss = sam_loss(prediction, square(4), torch.tensor([True]), CONFIG)

    assert loss.iou_error == pytest.approx(0.25)


def test_iou_of_two_empty_masks_is_zero() -> None:
    assert hard_iou(prediction_of(square(0)).low_res_logits, square(0)[:, None]) == 0


def test_a_student_equal_to_its_teacher_costs_less_than_another() -> None:
    teacher = prediction_of(*[square(4)] * 4)
    other = prediction_of(*[square(7)] * 4)

    same, different = (distillation_loss(p, teacher, CONFIG) for p in (teacher, other))

    assert same == pytest.approx(0, abs=1e-5)
    assert different > 0.1


def test_a_teacher_may_have_masks_of_another_size() -> None:
    teacher = MaskPrediction(torch.randn(1, 4, 16, 16), torch.zeros(1, 4))
    student = MaskPrediction(torch.randn(1, 4, 8, 8), torch.zeros(1, 4))

    assert torch.isfinite(distillation_loss(student, teacher, CONFIG))
