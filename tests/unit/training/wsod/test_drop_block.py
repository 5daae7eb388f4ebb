import pytest
import torch

from training.wsod.drop_block import (
    ConcreteDropBlock,
    DropBlockConfig,
    keep_outside_blocks,
    relaxed_bernoulli,
    reverse_gradient,
)


def _plain_keep(dropped, block_cells):
    """Cell by cell: hidden where any dropped cell is within half a block."""
    reach = block_cells // 2
    keep = torch.ones_like(dropped)
    for roi, row, column in torch.nonzero(dropped).tolist():
        rows = slice(max(0, row - reach), row + reach + 1)
        keep[roi, rows, max(0, column - reach) : column + reach + 1] = 0
    for roi in range(len(keep)):
        if not keep[roi].any():
            keep[roi] = 1
    return keep


@pytest.mark.parametrize("block_cells", [1, 3, 5])
def test_blocks_equal_their_plain_definition(block_cells):
    generator = torch.Generator().manual_seed(0)
    dropped = (torch.rand(40, 5, 5, generator=generator) < 0.1).float()
    keep = keep_outside_blocks(dropped, block_cells=block_cells)
    torch.testing.assert_close(keep, _plain_keep(dropped, block_cells))


def test_an_roi_is_never_hidden_as_a_whole():
    dropped = torch.zeros(2, 5, 5)
    dropped[0, 1::3, 1::3] = 1
    dropped[0, 2, 2] = 1
    dropped[1, 0, 0] = 1
    keep = keep_outside_blocks(dropped, block_cells=3)
    assert keep.sum(dim=(1, 2)).tolist() == [25, 21]


def test_draws_are_one_as_often_as_their_probability_says():
    generator = torch.Generator().manual_seed(0)
    probability = torch.full((20_000,), 0.3)
    draws = relaxed_bernoulli(
        probability, torch.rand(20_000, generator=generator), temperature=0.01
    )
    assert set(draws.tolist()) == {0.0, 1.0}
    assert draws.mean().item() == pytest.approx(0.3, abs=0.01)


def test_gradients_flow_as_if_the_draw_were_the_relaxed_one():
    probability = torch.tensor([0.2, 0.7], requires_grad=True)
    noise = torch.tensor([0.75, 0.4])
    relaxed_bernoulli(probability, noise, temperature=0.5).sum().backward()
    again = probability.detach().clone().requires_grad_()
    ((torch.logit(again) + torch.logit(noise)) / 0.5).sigmoid().sum().backward()
    torch.testing.assert_close(probability.grad, again.grad)
    assert bool((probability.grad > 0).all())


def test_the_gradient_is_turned_round_and_the_value_stays():
    x = torch.tensor([0.1, 1.0], requires_grad=True)
    y = reverse_gradient(x, 0.01)
    assert torch.equal(y, x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([-0.01, -0.01]))


def _block(**settings):
    torch.manual_seed(0)
    return ConcreteDropBlock(8, DropBlockConfig(enabled=True, width=4, **settings))


def test_at_most_about_the_share_is_hidden():
    block = _block()
    torch.nn.init.constant_(block.leave.bias, 50.0)  # as much as it may
    keep = block(torch.rand(2000, 5, 5, 8, generator=torch.Generator().manual_seed(1)))
    hidden = 1 - keep.mean().item()
    assert 0.15 < hidden <= 0.3


def test_it_learns_to_hide_what_the_detector_leans_on():
    block = _block(temperature=1.0, reversal=1.0)
    cells = torch.zeros(64, 5, 5, 8)
    cells[:, :, :, 1] = 1.0
    cells[:, 2, 2, 0] = 5.0  # all evidence is in the middle
    optimizer = torch.optim.Adam(block.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        evidence = (block(cells) * cells[..., 0]).sum(dim=(1, 2)).mean()
        (-evidence).backward()  # the detector's loss falls with the evidence
        optimizer.step()
    seen = torch.stack([block(cells).detach() for _ in range(40)]).mean(dim=(0, 1))
    assert seen[2, 2] < seen[0, 0] - 0.1


@pytest.mark.parametrize("bad", [{"max_share": 1.0}, {"block_cells": 2}, {"temperature": 0.0}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=r"in \(0, 1\)|positive"):
        DropBlockConfig(**bad)
