"""The whole chain on a few tiny scenes: every stage runs, hands over, and is skipped when done."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from tests.unit.training.tiny_recipe import tiny_recipe
from training.engine.stage import read_manifest
from training.generate_scenes import GenerateScenesConfig, generate_scenes
from training.models.sam import build_sam, compact, save_sam
from training.recipes import RECIPES, scenes
from training.retrain_detector import load_detector
from training.run import RunConfig, run

_DATA = Path(os.environ.get("WEAKSAM_DATA", "../shared/data"))
_TRUNK = _DATA / "weights" / "squeezenet1_0_imagenet.pt"


def _tiny_recipe():
    return tiny_recipe(scenes(), batch_size=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    if not _TRUNK.is_file():
        pytest.skip(f"{_TRUNK} is not here; set WEAKSAM_DATA to the data sets")
    root = tmp_path_factory.mktemp("chain")
    generate_scenes(root / "data", GenerateScenesConfig(num_train=8, num_val=3, seed=3))
    torch.manual_seed(0)
    sizes = dataclasses.replace(compact(), image_size=64)
    save_sam(root / "sam.safetensors", build_sam(sizes), sizes)
    config = RunConfig(
        recipe="scenes",
        data=root / "data" / "train",
        val=root / "data" / "val",
        output=root / "run",
        sam=root / "sam.safetensors",
        trunk_weights=_TRUNK,
        rounds=2,
        supervised=True,
        measure_drop=True,
        masks=True,
    )
    return config, run(config, _tiny_recipe())


def test_every_stage_reports_its_figures(finished):
    config, report = finished
    for key in ("wsod_val", "detector", "supervised"):
        assert 0 <= report[key]["voc_ap50"] <= 1
    assert report["ap50_of_supervised"] >= 0
    assert report["detector"] == report["detectors"][1]
    assert (config.output / "summary.json").is_file()
    for stage in ("detector", "detector_2"):
        assert (config.output / stage / "detector.safetensors").is_file()


def test_what_roi_drop_leaves_out_is_compared_with_the_truth(finished):
    _, report = finished
    assert len(report["roi_drop"]) == 2
    for of_round in report["roi_drop"]:
        assert 0 <= of_round["classification"]["evaluation_only"]["wrong_share"] <= 1


def test_the_chain_ends_with_masks(finished):
    config, report = finished
    pseudo = read_manifest(config.output / "pseudo_masks")["metrics"]
    assert report["pseudo_masks"] == pseudo
    boxes = read_manifest(config.output / "pseudo_labels_2")["metrics"]["num_boxes"]
    assert pseudo["num_masks"] + pseudo["num_empty"] == boxes
    for detector in ("mask_rcnn", "supervised_masks"):
        assert 0 <= report[detector]["mask_ap50"] <= 1
        model, _ = load_detector(config.output / detector / "detector.safetensors")
        assert model.config.mask_channels == 64
    assert "mask_ap50" not in report["detector"]


def test_finished_stages_are_skipped(finished):
    config, report = finished
    before = {path: path.stat().st_mtime_ns for path in config.output.rglob("*.safetensors")}
    assert run(config, _tiny_recipe()) == report
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_folder_of_another_seed_is_not_overwritten(finished):
    config, _ = finished
    with pytest.raises(ValueError, match=r"config\.seed: 0 there, 1 now"):
        run(config, _tiny_recipe().with_seed(1))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_take_a_seed(name):
    recipe = RECIPES[name]().with_seed(7)
    assert recipe.classifier.seed == recipe.wsod.seed == recipe.detector.seed == 7
