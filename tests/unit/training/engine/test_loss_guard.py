import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from training.engine.checkpoint import DivergedError, load_metadata, save_checkpoint
from training.engine.loss_guard import LossGuard, LossGuardConfig


def _run(guard, losses):
    for step, loss in enumerate(losses):
        guard.check(loss, step=step, images=[f"{step}.jpg"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_with_step_and_images(tmp_path, bad):
    guard = LossGuard(tmp_path / "checkpoint.safetensors")
    _run(guard, [1.0, 0.9])
    with pytest.raises(DivergedError, match=r"step 2: the loss is .*a\.jpg, b\.jpg.*No checkpoint"):
        guard.check(bad, step=2, images=["a.jpg", "b.jpg"])


def test_the_last_good_checkpoint_is_named_with_its_steps(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    model = nn.Linear(2, 1)
    save_checkpoint(
        path, modules={"m": model}, optimizer=torch.optim.SGD(model.parameters(), 0.1), step=40
    )
    with pytest.raises(DivergedError, match=r"checkpoint\.safetensors, after 40 steps"):
        LossGuard(path).check(math.nan, step=43, images=["a.jpg"])


def test_a_loss_that_grows_without_end_stops(tmp_path):
    guard = LossGuard(tmp_path / "c", LossGuardConfig(window=3, factor=10.0))
    with pytest.raises(DivergedError, match="diverges: its mean over the last 3 steps"):
        _run(guard, [1.0] * 5 + [2.0**n for n in range(1, 12)])


def test_one_bad_batch_and_a_loss_that_rises_a_few_times_stop_nothing(tmp_path):
    _run(LossGuard(tmp_path / "c"), [1.0] * 50 + [300.0] + [1.0] * 50)
    _run(LossGuard(tmp_path / "c"), [0.1 + 0.02 * step for step in range(200)])


def test_a_long_batch_is_named_in_part(tmp_path):
    with pytest.raises(DivergedError, match="and 4 more"):
        LossGuard(tmp_path / "c").check(math.nan, step=0, images=[f"{i}.jpg" for i in range(20)])


@given(st.lists(st.floats(0.5, 1.5), min_size=1, max_size=80))
@settings(max_examples=30, deadline=None)
def test_a_healthy_loss_is_never_stopped(tmp_path_factory, losses):
    _run(LossGuard(tmp_path_factory.getbasetemp() / "none", LossGuardConfig(window=5)), losses)


@pytest.mark.parametrize("bad", [{"window": 0}, {"factor": 1.0}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="window must be"):
        LossGuardConfig(**bad)


def test_weights_that_are_no_numbers_never_replace_a_good_checkpoint(tmp_path):
    path, model = tmp_path / "checkpoint.safetensors", nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    save_checkpoint(path, modules={"m": model}, optimizer=optimizer, step=1)
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    with pytest.raises(DivergedError, match=r"m\.weight has values that are not finite"):
        save_checkpoint(path, modules={"m": model}, optimizer=optimizer, step=2)
    assert load_metadata(path)["step"] == 1
