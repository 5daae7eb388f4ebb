import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import training.generate_proposals as stage_module
from training.data.coco import load_coco_folder
from training.data.proposal_shards import ImagePart, ShardWatch
from training.data.results import read_proposals
from training.data.scenes import SCENE_CLASSES, SceneConfig
from training.engine.stage import read_manifest
from training.evaluation.pointing import pointing_accuracy
from training.generate_proposals import (
    GenerateProposalsConfig,
    ProposalRecipe,
    generate_proposals,
)
from training.generate_scenes import GenerateScenesConfig, generate_scenes
from training.models.sam import CompactEncoderConfig, SamConfig, build_sam, save_sam
from training.models.vit import VitConfig
from training.models.vit_adapter import save_classifier
from training.models.weaktr import WeakTr, WeakTrConfig
from training.proposal_workers import WorkerError
from training.proposer import ImageProposer
from training.torch_backend import TorchModel, proposal_models
from weaksam_rt.backends.local import LocalBackend
from weaksam_rt.config import PipelineConfig
from weaksam_rt.contracts import DetectorParameters, detector_contract
from weaksam_rt.errors import ContractError
from weaksam_rt.proposals import SOURCE_NAMES, ProposalConfig
from weaksam_rt.types import PointPrompts

_RECIPE = ProposalRecipe(
    pipeline=PipelineConfig(proposals=ProposalConfig(points_per_side=2, min_side_px=2.0))
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three scenes and two untrained toy models."""
    root = tmp_path_factory.mktemp("world")
    scene = SceneConfig(min_side=48, max_side=64)
    generate_scenes(root, GenerateScenesConfig(num_train=3, num_val=1, scene=scene))
    torch.manual_seed(0)
    vit = VitConfig(image_size=32, patch_size=8, dim=8, depth=2, num_heads=2)
    classifier = WeakTr(WeakTrConfig(vit=vit), len(SCENE_CLASSES))
    save_classifier(root / "classifier.safetensors", classifier, SCENE_CLASSES)
    config = SamConfig(image_size=64, embed_dim=32, encoder=CompactEncoderConfig(width=16))
    save_sam(root / "sam.safetensors", build_sam(config), config)
    return root


def _config(world, output, **changes):
    return GenerateProposalsConfig(
        output=output,
        data=world / "train",
        classifier=world / "classifier.safetensors",
        sam=world / "sam.safetensors",
        recipe=dataclasses.replace(_RECIPE, **changes),
        num_report_images=1,
        num_threads=torch.get_num_threads(),
    )


def _entries(output):
    return json.loads((output / stage_module.PROPOSALS_NAME).read_text())


def test_every_image_gets_proposals_and_the_manifest_says_how_good_they_are(world, tmp_path):
    generate_proposals(_config(world, tmp_path))
    folder = load_coco_folder(world / "train")
    found = read_proposals(tmp_path / stage_module.PROPOSALS_NAME, folder=folder)
    assert all(len(proposals) for proposals in found.values())
    metrics = read_manifest(tmp_path)["metrics"]
    assert 0 <= metrics["recall_0.75"] <= metrics["recall_0.5"] <= 1
    assert metrics["mean_proposals"] == np.mean([len(p) for p in found.values()])
    page = (tmp_path / stage_module.REPORT_NAME).read_text()
    assert page.count("<figure>") == 7


def test_a_killed_run_goes_on_with_the_images_that_are_not_done(world, tmp_path, monkeypatch):
    generate_proposals(_config(world, tmp_path / "whole"))
    seen = []
    real = ImageProposer.propose

    def dies_at_the_second(proposer, record):
        seen.append(record.image_id)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(proposer, record)

    monkeypatch.setattr(ImageProposer, "propose", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        generate_proposals(_config(world, tmp_path / "killed"))
    generate_proposals(_config(world, tmp_path / "killed"))
    assert seen == [0, 1, 1, 2], "the first image is not done again"
    assert _entries(tmp_path / "killed") == _entries(tmp_path / "whole")


def test_predicted_tags_never_look_at_the_true_ones(world, tmp_path):
    """The same pictures without a single annotation give the same proposals."""
    bare = tmp_path / "bare"
    (bare / "images").mkdir(parents=True)
    for path in (world / "train" / "images").iterdir():
        (bare / "images" / path.name).write_bytes(path.read_bytes())
    content = json.loads((world / "train" / "instances.json").read_text())
    (bare / "instances.json").write_text(json.dumps({**content, "annotations": []}))
    generate_proposals(_config(world, tmp_path / "a", tags="predicted"))
    unseen = dataclasses.replace(_config(world, tmp_path / "b", tags="predicted"), data=bare)
    generate_proposals(unseen)
    assert _entries(tmp_path / "a") == _entries(tmp_path / "b")


def test_a_bad_image_stops_the_run_with_its_name_or_is_listed(world, tmp_path):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for path in (world / "train" / "images").iterdir():
        content = path.read_bytes()
        is_bad = path.name == "0000001.jpg"
        (data / "images" / path.name).write_bytes(content[:300] if is_bad else content)
    (data / "instances.json").write_bytes((world / "train" / "instances.json").read_bytes())
    config = dataclasses.replace(_config(world, tmp_path / "stops"), data=data)
    with pytest.raises(ValueError, match=r"0000001\.jpg.*--skip-bad"):
        generate_proposals(config)
    generate_proposals(dataclasses.replace(config, skip_bad=True))  # what is done stays
    assert {entry["image_id"] for entry in _entries(config.output)} == {0, 2}
    assert list(json.loads((config.output / "skipped.json").read_text())) == ["0000001.jpg"]
    assert read_manifest(config.output)["metrics"]["num_skipped"] == 1


def test_images_without_tags_are_found_before_the_work_begins(world, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(world / "train" / "images")
    content = json.loads((world / "train" / "instances.json").read_text())
    tagged = [a for a in content["annotations"] if a["image_id"] != 2]
    (data / "instances.json").write_text(json.dumps({**content, "annotations": tagged}))
    config = dataclasses.replace(_config(world, tmp_path / "out"), data=data)
    with monkeypatch.context() as patch:
        patch.setattr(ImageProposer, "__init__", None)  # would be called first
        with pytest.raises(
            ValueError, match=r"1 of 3 images .* first is 0000002\.jpg; .*--skip-bad"
        ):
            generate_proposals(config)
    generate_proposals(dataclasses.replace(config, skip_bad=True))
    assert {entry["image_id"] for entry in _entries(config.output)} == {0, 1}
    assert list(json.loads((config.output / "skipped.json").read_text())) == ["0000002.jpg"]


def _prompts(points, class_ids, source, scores=None):
    num = len(points)
    return PointPrompts(
        points=np.array(points, np.float32).reshape(num, 2),
        scores=np.ones(num, np.float32) if scores is None else np.array(scores, np.float32),
        class_ids=np.array(class_ids, np.int32),
        sources=np.full(num, source, np.int32),
    )


def test_the_image_is_encoded_once_whatever_the_number_of_prompts(world, monkeypatch):
    calls = []
    real = LocalBackend.infer

    async def counted(backend, model, inputs, outputs=None):
        calls.append(model)
        return await real(backend, model, inputs, outputs)

    monkeypatch.setattr(LocalBackend, "infer", counted)
    proposer = ImageProposer(_config(world, world).proposer())
    part = proposer.propose(proposer.folder.records[0])
    assert isinstance(part, ImagePart)
    assert calls.count("sam_image_encoder") == 1
    assert calls.count("sam_mask_decoder") >= 1


@pytest.mark.parametrize("chosen", [("grid",), ("coarse",), ("fine", "cross")])
def test_only_the_chosen_prompts_are_used(world, tmp_path, chosen):
    settings = dataclasses.replace(_RECIPE.pipeline.proposals, sources=chosen)
    pipeline = dataclasses.replace(_RECIPE.pipeline, proposals=settings)
    proposer = ImageProposer(_config(world, tmp_path, pipeline=pipeline).proposer())
    part = proposer.propose(proposer.folder.records[0])
    allowed = {SOURCE_NAMES.index(name) for name in chosen}
    assert set(part.proposals.sources.tolist()) <= allowed
    assert set(part.prompts.sources.tolist()) == allowed - {0}


def test_published_maps_give_proposals_too(world, tmp_path):
    config = _config(world, tmp_path, maps="published")
    generate_proposals(config)
    assert {entry["image_id"] for entry in _entries(tmp_path)} == {0, 1, 2}


def _run(config, *, environment=()):
    """The command, in a process of its own."""
    flags = [
        "--output", config.output, "--data", config.data, "--classifier", config.classifier,
        "--sam", config.sam, "--num-report-images", 0, "--num-threads", 1,
        "--recipe.pipeline.proposals.points-per-side", 2,
        "--recipe.pipeline.proposals.min-side-px", 2,
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "training.generate_proposals", *map(str, flags), *environment],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_kill_9_at_any_image_loses_no_finished_one_and_changes_nothing(world, tmp_path):
    generate_proposals(_config(world, tmp_path / "whole"))
    output = tmp_path / "killed"
    process = _run(_config(world, output))
    watch, end = ShardWatch(output / "shards"), time.monotonic() + 240
    while watch.count() < 1 and time.monotonic() < end and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (shard,) = (output / "shards").iterdir()
    finished = shard.read_bytes()
    assert finished.count(b"\n") >= 1, "it was killed after an image"
    with shard.open("ab") as file:
        file.write(b'{"image_id":2,"tags":["tr')  # as a kill while writing would leave it
    generate_proposals(_config(world, output))
    whole_lines = finished[: finished.rfind(b"\n") + 1]
    assert shard.read_bytes().startswith(whole_lines)
    assert _entries(output) == _entries(tmp_path / "whole")


def test_shards_of_several_machines_come_together_to_the_same_result(world, tmp_path):
    generate_proposals(_config(world, tmp_path / "whole"))
    output = tmp_path / "shared"
    for shard in ("1/3", "0/3"):
        generate_proposals(dataclasses.replace(_config(world, output), shard=shard))
        assert not (output / stage_module.PROPOSALS_NAME).exists(), "not all are done"
    generate_proposals(dataclasses.replace(_config(world, output), shard="2/3"))
    assert _entries(output) == _entries(tmp_path / "whole")
    assert read_manifest(output)["metrics"] == read_manifest(tmp_path / "whole")["metrics"]


def test_several_processes_give_the_same_result(world, tmp_path):
    generate_proposals(_config(world, tmp_path / "whole"))
    output = tmp_path / "shared"
    with pytest.raises(KeyboardInterrupt), monkeypatch_context(_dies_after_one()):
        generate_proposals(_config(world, output))  # one process begins
    generate_proposals(dataclasses.replace(_config(world, output), num_workers=2))
    assert _entries(output) == _entries(tmp_path / "whole")
    assert len(list((output / "shards").iterdir())) == 3


@contextlib.contextmanager
def monkeypatch_context(propose):
    real = ImageProposer.propose
    ImageProposer.propose = propose
    try:
        yield
    finally:
        ImageProposer.propose = real


def _dies_after_one():
    real, seen = ImageProposer.propose, []

    def propose(proposer, record):
        seen.append(record)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(proposer, record)

    return propose


@pytest.mark.slow
def test_a_process_that_fails_stops_the_run_with_its_reason(world, tmp_path):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    (data / "instances.json").write_bytes((world / "train" / "instances.json").read_bytes())
    config = dataclasses.replace(_config(world, tmp_path / "out"), data=data, num_workers=2)
    with pytest.raises(WorkerError, match=r"process \d of 2 .*cannot read .*run again"):
        generate_proposals(config)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_ray_cluster_of_two_processes_gives_the_same_result(world, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # a busy machine starves its workers
    generate_proposals(_config(world, tmp_path / "whole"))
    root = str(Path(__file__).parents[3])
    paths = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=3, include_dashboard=False, runtime_env={"env_vars": paths})
    try:
        config = _config(world, tmp_path / "ray")
        generate_proposals(dataclasses.replace(config, ray="local", num_workers=2))
    finally:
        ray.shutdown()
    assert _entries(tmp_path / "ray") == _entries(tmp_path / "whole")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shard": "2/2"}, "must be below"),
        ({"shard": "two"}, "a shard is i/n"),
        ({"shard": "0/2", "num_workers": 2}, "one process"),
        ({"num_workers": 0}, "at least 1"),
    ],
)
def test_impossible_shares_are_refused(world, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(_config(world, tmp_path), **wrong)


def test_the_pointing_game_counts_the_highest_peak_of_each_true_class(world):
    folder = load_coco_folder(world / "train")
    record = folder.records[0]
    x1, y1, x2, y2 = record.boxes[0]
    inside, outside = ((x1 + x2) // 2, (y1 + y2) // 2), (-5, -5)
    tag, other = int(record.labels[0]), next(c for c in range(8) if c not in record.tags)

    def fine(points, class_ids, scores):
        prompts = {record.image_id: _prompts(points, class_ids, 2, scores)}
        return pointing_accuracy(folder, prompts)

    assert fine([inside, outside], [tag, tag], [1.0, 0.9]).fine == 1
    assert fine([inside, outside], [tag, tag], [0.9, 1.0]).fine == 0
    assert np.isnan(fine([inside], [other], [1.0]).fine), "a class that is not there"
    cross = {record.image_id: _prompts([inside, outside], [-1, -1], 3)}
    assert pointing_accuracy(folder, cross).cross == 0.5


def test_a_torch_model_checks_its_contract():
    parameters = DetectorParameters(image_size=4, num_candidates=2, class_names=("a",))

    class Detector(torch.nn.Module):
        def forward(self, image):
            num = image.shape[0]
            return torch.zeros(num, 2, 4), torch.zeros(num, 2), torch.zeros(num, 2).int()

    model = TorchModel(Detector(), detector_contract(parameters))
    image = np.zeros((3, 4, 4, 3), np.uint8)
    assert model({"image": image}, ["scores"])["scores"].shape == (3, 2)
    assert list(model({"image": image})) == ["boxes", "scores", "labels"]
    with pytest.raises(ContractError, match="UINT8"):
        model({"image": image.astype(np.float32)})
    with pytest.raises(ContractError, match="masks"):
        model({"image": image}, ["masks"])


def test_the_backend_serves_all_that_proposals_need(world):
    from training.models.sam import load_sam
    from training.models.vit_adapter import load_classifier

    trained = proposal_models(
        load_classifier(world / "classifier.safetensors"),
        load_sam(world / "sam.safetensors"),
        _RECIPE.pipeline.clustering,
    )
    side = trained.models.sam.image_size
    answer = asyncio.run(
        trained.backend.infer(
            "sam_image_encoder",
            {
                "image": np.zeros((1, side, side, 3), np.uint8),
                "valid_size": np.array([[side, side]], np.int32),
            },
        )
    )
    decoded = asyncio.run(
        trained.backend.infer(
            "sam_mask_decoder",
            {
                "image_embeddings": answer["image_embeddings"],
                "image_index": np.zeros(2, np.int32),
                "point_coords": np.zeros((2, 1, 2), np.float32),
                "point_labels": np.ones((2, 1), np.int32),
            },
        )
    )
    assert decoded["low_res_logits"].shape[:2] == (2, 4)
