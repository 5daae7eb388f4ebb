"""The whole chain on a few tiny scenes: every stage runs, hands over, and is skipped when done."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
import tyro

from tests.unit.training.tiny_recipe import tiny_recipe
from training.data.coco import load_coco_folder
from training.data.results import read_detections
from training.engine.stage import read_manifest
from training.evaluate import evaluate, summary
from training.generate_scenes import GenerateScenesConfig, generate_scenes
from training.models.sam import build_sam, compact, save_sam
from training.recipes import RECIPES, scenes
from training.retrain_detector import load_detector
from training.run import RunConfig, main, run
from training.tag_file import write_tagged_folder
from training.train_wsod import DETECTIONS_NAME, VAL_DETECTIONS_NAME

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


def test_scores_of_the_first_detector_are_those_of_its_files(finished):
    config, report = finished
    for key, data, name in (
        ("wsod_train", config.data, DETECTIONS_NAME),
        ("wsod_val", config.val, VAL_DETECTIONS_NAME),
    ):
        folder = load_coco_folder(data)
        found = read_detections(config.output / "wsod" / name, folder=folder)
        assert report[key] == pytest.approx(summary(evaluate(folder, found)), abs=1e-3)


def test_a_device_that_is_not_there_is_refused_in_one_line_before_the_first_stage(
    finished, tmp_path
):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = dataclasses.replace(finished[0], device="cuda", output=tmp_path / "run")
    with pytest.raises(ValueError, match="device cuda: torch sees no GPU"):
        run(config, _tiny_recipe())
    with pytest.raises(SystemExit, match=r"^device cuda: torch sees no GPU[^\n]*$"):
        main(config)
    assert not config.output.exists()


def test_the_chosen_device_changes_nothing_in_finished_stages(finished):
    config, report = finished
    assert run(dataclasses.replace(config, device="cpu"), _tiny_recipe()) == report


def test_the_recipe_is_the_first_word_of_the_command(capsys):
    paths = ["--data", "d", "--val", "v", "--output", "o", "--sam", "s", "--trunk-weights", "t"]
    for name in RECIPES:
        assert tyro.cli(tyro.conf.OmitArgPrefixes[RunConfig], args=[name, *paths]).recipe == name
    with pytest.raises(SystemExit):
        tyro.cli(tyro.conf.OmitArgPrefixes[RunConfig], args=["voc99", *paths])
    assert "invalid choice 'voc99'" in capsys.readouterr().err


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


def _tagged(source, output, num_images):
    """The first images of ``source`` by their tags alone, as ``training.tag_file`` makes it."""
    folder = load_coco_folder(source)
    lines = [
        f"{record.path.name},{';'.join(folder.class_names[tag] for tag in record.tags)}"
        for record in folder.records[:num_images]
    ]
    output.with_suffix(".csv").write_text("\n".join(lines))
    write_tagged_folder(
        source / "images", output.with_suffix(".csv"), output, classes=folder.class_names
    )
    return output


def test_a_chain_on_tags_alone_invents_no_figure(finished, tmp_path):
    boxed, _ = finished
    config = dataclasses.replace(
        boxed,
        data=_tagged(boxed.data, tmp_path / "train", 3),
        val=_tagged(boxed.val, tmp_path / "val", 1),
        output=tmp_path / "run",
        classifier=boxed.output / "classifier",
        rounds=1,
        supervised=False,
        measure_drop=False,
        masks=False,
    )
    run(config, _tiny_recipe())
    report = json.loads((config.output / "summary.json").read_text(), parse_constant=pytest.fail)
    for part in ("wsod_train", "wsod_val", "detector"):
        assert set(report[part].values()) == {None}
    for part in ("proposals_train", "proposals_val"):
        assert report[part]["recall_0.5"] is report[part]["pointing_fine"] is None
        assert report[part]["mean_proposals"] > 0
    assert report["pseudo_labels"][0]["evaluation_only"] is None
    for path in config.output.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)
    for page in (*config.output.rglob("evaluation.md"), *config.output.rglob("detector/*.html")):
        assert "tags and no boxes" in page.read_text()
    for option in ("supervised", "measure_drop"):
        with pytest.raises(ValueError, match="needs the true boxes"):
            run(dataclasses.replace(config, **{option: True}), _tiny_recipe())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_take_a_seed(name):
    recipe = RECIPES[name]().with_seed(7)
    assert recipe.classifier.seed == recipe.wsod.seed == recipe.detector.seed == 7
