import pytest
import torch
from torch import nn

from training.engine.checkpoint import (
    load_checkpoint,
    load_metadata,
    load_weights,
    save_checkpoint,
    save_weights,
)
from weaksam_rt.errors import ArtifactError


def _train(model, optimizer, num_steps):
    losses = []
    for _ in range(num_steps):
        loss = model(torch.randn(4, 3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _new():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def test_a_resumed_run_repeats_the_undisturbed_run(tmp_path):
    model, optimizer = _new()
    undisturbed = _train(model, optimizer, 6)
    model, optimizer = _new()
    _train(model, optimizer, 3)
    save_checkpoint(
        tmp_path / "c.safetensors", modules={"model": model}, optimizer=optimizer, step=3
    )
    model, optimizer = _new()
    torch.manual_seed(99)
    step, _ = load_checkpoint(
        tmp_path / "c.safetensors", modules={"model": model}, optimizer=optimizer
    )
    assert step == 3
    assert _train(model, optimizer, 3) == undisturbed[3:]


def test_a_checkpoint_written_with_a_gpu_is_read_without_one(tmp_path):
    model, optimizer = _new()
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, modules={"model": model}, optimizer=optimizer, step=2)
    state_of_gpu = {"rng.cuda": torch.zeros(16, dtype=torch.uint8)}
    save_weights(path, load_weights(path) | state_of_gpu, load_metadata(path))
    if torch.cuda.is_initialized():
        pytest.skip("this process uses a GPU")
    assert load_checkpoint(path, modules={"model": model}, optimizer=optimizer)[0] == 2


def test_a_truncated_checkpoint_is_refused_by_name(tmp_path):
    model, optimizer = _new()
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, modules={"model": model}, optimizer=optimizer, step=0)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"c\.safetensors"):
        load_weights(path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model, optimizer = _new()
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, modules={"model": model}, optimizer=optimizer, step=0)
    other = nn.Linear(5, 2)
    with pytest.raises(ArtifactError, match="does not fit"):
        load_checkpoint(
            path, modules={"model": other}, optimizer=torch.optim.AdamW(other.parameters())
        )


def test_a_channels_last_model_with_a_fused_optimiser_resumes_exactly(tmp_path):
    def _new_convolution():
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def _steps(model, optimizer, seeds):
        for seed in seeds:
            images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()

    undisturbed, optimizer = _new_convolution()
    _steps(undisturbed, optimizer, range(6))
    model, optimizer = _new_convolution()
    _steps(model, optimizer, range(3))
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, modules={"model": model}, optimizer=optimizer, step=3)
    model, optimizer = _new_convolution()
    load_checkpoint(path, modules={"model": model}, optimizer=optimizer)
    _steps(model, optimizer, range(3, 6))
    assert torch.equal(model.weight, undisturbed.weight)
