import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from tests.unit.training import distributed_classifier, distributed_wsod
from training import train_wsod
from training.data.coco import load_coco_folder
from training.data.results import write_proposals
from training.data.scenes import SceneConfig
from training.distributed import Process, training_process
from training.engine.checkpoint import load_weights
from training.engine.stage import MANIFEST_NAME
from training.generate_scenes import GenerateScenesConfig, generate_scenes
from training.train_classifier import WEIGHTS_NAME, train_classifier
from weaksam_rt.types import Proposals

_ROOT = Path(__file__).parents[3]


_CLASSIFIER = str(_ROOT / "tests/unit/training/distributed_classifier.py")
_WSOD = str(_ROOT / "tests/unit/training/distributed_wsod.py")


def _start(*command, **variables):
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, cwd=_ROOT,
    )  # fmt: skip


def _two_processes(script, *arguments):
    """Codes of processes that are started as torchrun would, without what it does when one dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        _start(
            script, *arguments,
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for process in processes:
        process.communicate(timeout=120)
    return [process.returncode for process in processes]


def _losses(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_two_processes_that_die_and_start_again_learn_what_one_learns(tmp_path):
    """The same global batches: the same curve and weights, up to the order of sums."""
    scene = SceneConfig(min_side=48, max_side=64)
    generate_scenes(tmp_path, GenerateScenesConfig(num_train=9, num_val=3, scene=scene))
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    train_classifier(distributed_classifier.config(tmp_path, alone))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    finished = _start(*torchrun, "--max-restarts", 1, _CLASSIFIER, tmp_path, shared)
    _, errors = finished.communicate(timeout=240)
    assert finished.returncode == 0, errors[-2000:]
    assert "going on after epoch 1" in errors
    assert [line["step"] for line in _losses(shared)] == [1, 2, 3], "one process logs"
    for one, two in zip(_losses(alone), _losses(shared), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    weights = load_weights(alone / WEIGHTS_NAME)
    for name, value in load_weights(shared / WEIGHTS_NAME).items():
        torch.testing.assert_close(value, weights[name], atol=1e-4, rtol=1e-3, msg=name)
    files = {path.name for path in shared.iterdir()}
    assert files == {path.name for path in alone.iterdir()}
    assert MANIFEST_NAME in files


@pytest.mark.slow
def test_two_processes_train_the_multiple_instance_detector_as_one_does(tmp_path):
    """Dropout and hidden cells included: they depend on the image's place in the step."""
    generate_scenes(tmp_path, GenerateScenesConfig(num_train=4, num_val=1))
    folder = load_coco_folder(tmp_path / "train")
    generator = np.random.default_rng(0)
    proposals = {r.image_id: _random_proposals(r, generator) for r in folder.records}
    write_proposals(tmp_path / "proposals.json", proposals)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    train_wsod.main(distributed_wsod.config(tmp_path, alone))
    assert all(_two_processes(_WSOD, tmp_path, shared, 3))
    assert not any(_two_processes(_WSOD, tmp_path, shared, -1))
    assert [line["step"] for line in _losses(shared)] == [0, 1, 2, 2, 3, 4, 5]
    of_step = {line["step"]: line for line in _losses(shared)}
    for line in _losses(alone):
        assert of_step[line["step"]] == pytest.approx(line, rel=1e-4)
    weights = load_weights(alone / train_wsod.WEIGHTS_NAME)
    for name, value in load_weights(shared / train_wsod.WEIGHTS_NAME).items():
        torch.testing.assert_close(value, weights[name], atol=1e-4, rtol=1e-3, msg=name)
    assert {p.name for p in shared.iterdir()} == {p.name for p in alone.iterdir()}


def _random_proposals(record, generator):
    height, width = record.image_size
    corners = np.sort(generator.random((12, 2, 2)), axis=1) * [width, height]
    boxes = np.concatenate([record.boxes, corners.reshape(-1, 4)]).astype(np.float32)
    return Proposals(
        boxes=boxes,
        scores=np.ones(len(boxes), np.float32),
        sources=np.zeros(len(boxes), np.int32),
        image_size=record.image_size,
    )


def test_a_process_by_itself_has_all_rows_and_changes_nothing():
    with training_process("cpu") as process:
        assert process.is_main
        assert process.rows(7) == slice(0, 7)
        assert process.mean({"a": 2.0}) == {"a": 2.0}
        model = torch.nn.Linear(2, 2)
        assert process.in_step(model) is model


def test_rows_cover_the_batch_and_must_be_equal_shares():
    parts = [Process(rank=r, num_processes=3).rows(12) for r in range(3)]
    assert [row for part in parts for row in range(12)[part]] == list(range(12))
    with pytest.raises(ValueError, match="13 images a step cannot be shared equally by 3"):
        Process(num_processes=3).rows(13)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_not_replaced_silently():
    with pytest.raises(ValueError, match="torch sees no GPU"), training_process("cuda"):
        pass


@pytest.mark.gpu
def test_a_gpu_learns_what_the_cpu_learns(tmp_path):
    from dataclasses import replace

    scene = SceneConfig(min_side=48, max_side=64)
    generate_scenes(tmp_path, GenerateScenesConfig(num_train=9, num_val=3, scene=scene))
    for device in ("cpu", "cuda"):
        config = distributed_classifier.config(tmp_path, tmp_path / device)
        train_classifier(replace(config, device=device))
    for one, two in zip(_losses(tmp_path / "cpu"), _losses(tmp_path / "cuda"), strict=True):
        assert two == pytest.approx(one, rel=1e-2)
