import dataclasses
import json

import numpy as np
import pytest
import torch

import training.retrain_detector as stage_module
from training.data.coco import load_coco_folder
from training.detect import detect_folder
from training.engine.checkpoint import load_weights, save_weights
from training.engine.stage import open_stage, read_manifest
from training.generate_scenes import GenerateScenesConfig, generate_scenes
from training.models.detector_adapter import CandidateConfig, DetectorAdapter
from training.retrain_detector import (
    WEIGHTS_NAME,
    DetectorRecipe,
    RetrainDetectorConfig,
    batch_of_step,
    initial_model,
    load_detector,
    load_framed_images,
    load_negatives,
    main,
    parameter_groups,
    train,
    train_step,
)
from training.retraining.faster_rcnn import FasterRcnn, FasterRcnnConfig
from training.retraining.roi_drop import RoiDropConfig
from weaksam_rt.config import DetectionConfig
from weaksam_rt.errors import ArtifactError
from weaksam_rt.files import write_json

_RECIPE = DetectorRecipe(
    model=FasterRcnnConfig(
        image_size=64,
        neck_channels=16,
        roi_channels=16,
        head_width=16,
        anchor_sizes=((12,), (24,), (44,)),
        rois_per_image=8,
        proposals_per_image=30,
    ),
    epochs=2,
    batch_size=2,
    warmup_steps=1,
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    generate_scenes(root, GenerateScenesConfig(num_train=4, num_val=2))
    return root


def _open(directory):
    return open_stage("retrain_detector", directory, config=_RECIPE, inputs={})


def _start(folder, recipe=_RECIPE):
    return initial_model(recipe, folder.class_names, None)


def test_a_killed_run_ends_where_the_undisturbed_one_does(scenes, tmp_path, monkeypatch):
    folder = load_coco_folder(scenes / "train")
    undisturbed = train(_open(tmp_path / "a"), folder, _RECIPE, _start(folder))
    real_step = stage_module.train_step

    def _killed_in_step_3(model, optimizer, batch, recipe, step, num_steps):
        if step == 3:
            raise KeyboardInterrupt
        return real_step(model, optimizer, batch, recipe, step, num_steps)

    monkeypatch.setattr(stage_module, "train_step", _killed_in_step_3)
    with pytest.raises(KeyboardInterrupt):
        train(_open(tmp_path / "b"), folder, _RECIPE, _start(folder))
    monkeypatch.undo()
    resumed = train(_open(tmp_path / "b"), folder, _RECIPE, _start(folder))
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_the_command_trains_evaluates_and_is_skipped_when_done(scenes, tmp_path):
    config = RetrainDetectorConfig(
        data=scenes / "train", val=scenes / "val", output=tmp_path / "run", recipe=_RECIPE
    )
    main(config)
    assert 0 <= read_manifest(tmp_path / "run")["metrics"]["val"]["voc_ap50"] <= 1
    model, class_names = load_detector(tmp_path / "run" / WEIGHTS_NAME)
    assert model.config == _RECIPE.model
    assert class_names == load_coco_folder(scenes / "train").class_names
    written = (tmp_path / "run" / WEIGHTS_NAME).stat().st_mtime_ns
    main(config)
    assert (tmp_path / "run" / WEIGHTS_NAME).stat().st_mtime_ns == written


def test_true_boxes_measure_the_drop_and_change_no_weight(scenes, tmp_path):
    """Pseudo boxes of the wrong class are trained on; the true boxes are known."""
    pseudo = json.loads((scenes / "train" / "instances.json").read_text())
    for annotation in pseudo["annotations"][::2]:
        annotation["category_id"] = annotation["category_id"] % len(pseudo["categories"]) + 1
    write_json(tmp_path / "pseudo.json", pseudo)
    drop = RoiDropConfig(start_fraction=0.5, classification_thresh=0.0, regression_thresh=0.0)
    config = RetrainDetectorConfig(
        data=scenes / "train",
        annotations=tmp_path / "pseudo.json",
        output=tmp_path / "blind",
        recipe=dataclasses.replace(_RECIPE, roi_drop=drop),
    )
    main(config)
    measured = dataclasses.replace(
        config, output=tmp_path / "measured", truth=scenes / "train" / "instances.json"
    )
    main(measured)
    blind, seeing = (load_weights(c.output / WEIGHTS_NAME) for c in (config, measured))
    assert all(torch.equal(blind[name], seeing[name]) for name in blind)
    assert read_manifest(config.output)["metrics"]["roi_drop"]["classification"] == {
        "num_rois": 32,  # two steps of two images with eight RoIs
        "num_dropped": 32,  # every loss is above 0
        "evaluation_only": None,
    }
    report = read_manifest(measured.output)["metrics"]["roi_drop"]["classification"]
    comparison = report["evaluation_only"]
    assert comparison["recall"] == 1.0
    assert 0 < comparison["precision"] < 1
    assert comparison["precision"] == comparison["wrong_share"]  # everything was dropped


def test_true_boxes_of_other_images_are_refused(scenes):
    folder = load_coco_folder(scenes / "train")
    fewer = dataclasses.replace(folder, records=folder.records[1:])
    with pytest.raises(ValueError, match="true boxes lack"):
        load_framed_images(folder, 64, fewer)


def test_views_depend_on_seed_and_step_only(scenes):
    images = load_framed_images(load_coco_folder(scenes / "train"), 64)
    first, again, other = (batch_of_step(images, _RECIPE, step) for step in (1, 1, 3))
    np.testing.assert_array_equal(first[0].pixels, again[0].pixels)
    assert any((a.pixels != b.pixels).any() for a, b in zip(first, other, strict=True))


def test_every_image_is_seen_once_an_epoch(scenes):
    images = load_framed_images(load_coco_folder(scenes / "train"), 64)
    assert sum(len(batch_of_step(images, _RECIPE, step)) for step in range(2)) == len(images)


def test_images_of_background_are_learnt_from_without_boxes(scenes, tmp_path):
    folder, other = load_coco_folder(scenes / "train"), load_coco_folder(scenes / "val")
    assert all(len(image.boxes) == 0 for image in load_negatives(other, 64))
    plain = train(_open(tmp_path / "a"), folder, _RECIPE, _start(folder))
    with_background = train(_open(tmp_path / "b"), folder, _RECIPE, _start(folder), other)
    assert not torch.equal(plain.box_head.classes.bias, with_background.box_head.classes.bias)


def test_silence_is_learnt_from_images_of_background_alone(scenes):
    images = load_negatives(load_coco_folder(scenes / "val"), 64)
    torch.manual_seed(0)
    model = FasterRcnn(_RECIPE.model, 3)
    optimizer = torch.optim.AdamW(parameter_groups(model, _RECIPE), lr=1e-3)
    losses = [
        train_step(model, optimizer, images, _RECIPE, step, 40)["classification"]
        for step in range(30)
    ]
    assert losses[-1] < 0.5 * losses[0]


def test_detections_lie_in_the_frame_of_each_image(scenes):
    folder = load_coco_folder(scenes / "val")
    model = FasterRcnn(_RECIPE.model, len(folder.class_names)).eval()
    adapter = DetectorAdapter(model, CandidateConfig(num_rois=10, num_candidates=10)).eval()
    found = detect_folder(
        adapter,
        folder,
        image_size=64,
        config=DetectionConfig(score_thresh=0.0, nms_thresh=0.5, max_detections=5),
    )
    for record in folder.records:
        boxes = found[record.image_id].boxes
        height, width = record.image_size
        assert 0 < len(boxes) <= 5
        assert (boxes >= 0).all()
        assert (boxes <= [width, height, width, height]).all()
        assert boxes.max() > 64


def test_weights_of_another_size_are_refused_by_name(tmp_path):
    model = FasterRcnn(_RECIPE.model, 2)
    sizes = {"anchor_sizes": [[12], [24], [44]], "aspect_ratios": [0.5, 1.0, 2.0]}
    save_weights(
        tmp_path / "d.safetensors",
        model.state_dict(),
        {"model": sizes, "class_names": ["disc", "star"]},
    )
    with pytest.raises(ArtifactError, match=r"d\.safetensors does not fit"):
        load_detector(tmp_path / "d.safetensors")


def test_a_data_set_without_boxes_is_refused(scenes, tmp_path):
    folder = load_coco_folder(scenes / "train", classes=())
    with pytest.raises(ValueError, match="no image has a box"):
        train(_open(tmp_path), folder, _RECIPE, _start(folder))
