"""The process's limit on file sizes stands for a full disk: the system refuses the same calls."""

import resource
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from training.engine.checkpoint import load_metadata, save_checkpoint, save_weights
from weaksam_rt.files import write_json


@contextmanager
def _files_of_at_most(num_bytes):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_that_does_not_fit_names_the_file_and_leaves_the_last_one(tmp_path):
    path, model = tmp_path / "checkpoint.safetensors", nn.Linear(400, 400)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    save_checkpoint(path, modules={"m": model}, optimizer=optimizer, step=7)
    with _files_of_at_most(100_000), pytest.raises(OSError, match=r"checkpoint\.safetensors"):
        save_checkpoint(path, modules={"m": model}, optimizer=optimizer, step=8)
    assert load_metadata(path)["step"] == 7
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_json_that_does_not_fit_names_the_file_and_says_what_to_do(tmp_path):
    path = tmp_path / "instances.json"
    with _files_of_at_most(10_000), pytest.raises(OSError, match="no space left") as raised:
        write_json(path, ["x" * 100] * 1000)
    assert str(path) in str(raised.value)
    assert "run the same command again" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_what_fits_is_written(tmp_path):
    with _files_of_at_most(100_000):
        save_weights(tmp_path / "w.safetensors", {"a": torch.zeros(10)}, {})
    assert (tmp_path / "w.safetensors").is_file()
