import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import training.retrain_detector as stage_module
from tests.unit.training.tiny_detector import RECIPE, open_detector_stage, train_masks, with_masks
from training.data.coco import load_coco_folder
from training.data.sampling import epoch_order, repeat_factors
from training.data.views import frame_image, random_view
from training.detect import detect_folder
from training.engine.checkpoint import DivergedError, load_weights, save_weights
from training.engine.stage import open_stage, read_manifest
from training.generate_scenes import GenerateScenesConfig, generate_scenes
from training.models.detector_adapter import CandidateConfig, DetectorAdapter
from training.retrain_detector import (
    WEIGHTS_NAME,
    Batches,
    DetectorRecipe,
    RetrainDetectorConfig,
    initial_model,
    load_detector,
    load_framed_images,
    load_negatives,
    main,
    parameter_groups,
    train,
    train_step,
)
from training.retraining.faster_rcnn import FasterRcnn
from training.retraining.roi_drop import RoiDropConfig
from weaksam_rt.config import DetectionConfig
from weaksam_rt.errors import ArtifactError
from weaksam_rt.files import write_json


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    generate_scenes(root, GenerateScenesConfig(num_train=4, num_val=2))
    return root


def _start(folder, recipe=RECIPE):
    return initial_model(recipe, folder.class_names, None)


def _losses(directory):
    return [
        json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()
    ]


@contextmanager
def _killed_in_step_3(monkeypatch):
    real_step = stage_module.train_step

    def step_or_end(model, optimizer, batch, recipe, step, num_steps):
        if step == 3:
            raise KeyboardInterrupt
        return real_step(model, optimizer, batch, recipe, step, num_steps)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(stage_module, "train_step", step_or_end)
        yield


@pytest.mark.parametrize("recipe", [RECIPE, with_masks()], ids=["boxes", "masks"])
def test_a_killed_run_ends_where_the_undisturbed_one_does(scenes, tmp_path, monkeypatch, recipe):
    folder = load_coco_folder(scenes / "train")
    undisturbed = train(open_detector_stage(tmp_path / "a"), folder, recipe, _start(folder, recipe))
    with _killed_in_step_3(monkeypatch):
        train(open_detector_stage(tmp_path / "b"), folder, recipe, _start(folder, recipe))
    resumed = train(open_detector_stage(tmp_path / "b"), folder, recipe, _start(folder, recipe))
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    # Step 2 was done, lost with the process and done again.
    first, *_, last = _losses(tmp_path / "a")
    assert _losses(tmp_path / "a")[:3] + _losses(tmp_path / "a")[2:] == _losses(tmp_path / "b")
    assert first != last


@pytest.mark.parametrize("seed", [0, 1])
def test_a_process_killed_by_the_system_leaves_the_loss_curve_unchanged(scenes, tmp_path, seed):
    """SIGKILL at a random step of a real process, with masks; nothing gets a chance to clean up."""
    data, victim = scenes / "train", int(np.random.default_rng(seed).integers(1, 6))
    train_masks(data, tmp_path / "a")
    arguments = [str(data), str(tmp_path / "b"), str(victim)]
    command = [sys.executable, "-m", "tests.unit.training.tiny_detector", *arguments]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    train_masks(data, tmp_path / "b")
    stages = open_detector_stage(tmp_path / "a"), open_detector_stage(tmp_path / "b")
    undisturbed, resumed = ([entry["loss"] for entry in stage.metrics()] for stage in stages)
    assert len(undisturbed) == 6
    assert resumed == undisturbed


def test_a_loss_that_is_no_number_stops_and_names_the_images(scenes, tmp_path, monkeypatch):
    folder = load_coco_folder(scenes / "train")
    real_step = stage_module.train_step

    def _nan_in_step_3(model, optimizer, batch, recipe, step, num_steps):
        scalars = real_step(model, optimizer, batch, recipe, step, num_steps)
        return scalars | {"loss": float("nan")} if step == 3 else scalars

    monkeypatch.setattr(stage_module, "train_step", _nan_in_step_3)
    with pytest.raises(DivergedError, match="after 2 steps") as raised:
        train(open_detector_stage(tmp_path / "run"), folder, RECIPE, _start(folder))
    images = load_framed_images(folder, 64)
    for view in Batches(images, RECIPE).of_step(3):
        assert view.name in str(raised.value)


def test_masks_can_be_added_to_a_finished_detector_without_touching_its_boxes(scenes, tmp_path):
    config = RetrainDetectorConfig(
        data=scenes / "train", val=scenes / "val", output=tmp_path / "boxes", recipe=RECIPE
    )
    main(config)
    start = config.output / WEIGHTS_NAME
    masked = dataclasses.replace(
        config,
        output=tmp_path / "masks",
        start_from=start,
        recipe=with_masks(only_masks=True, learning_rate=1e-2),
    )
    main(masked)
    before, after = load_weights(start), load_weights(masked.output / WEIGHTS_NAME)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert set(after) - set(before)
    values = read_manifest(config.output)["metrics"]["val"]
    more = read_manifest(masked.output)["metrics"]["val"]
    assert {name: more[name] for name in values} == values
    assert 0 <= more["mask_ap50"] <= more["mask_ap25"] <= 1
    model, _ = load_detector(masked.output / WEIGHTS_NAME)
    assert model.config.mask_channels == 8
    losses = [entry["mask"] for entry in open_stage(
        "retrain_detector", masked.output, config=masked.recipe,
        inputs={"data": masked.data, "val": masked.val, "start_from": start},
    ).metrics()]  # fmt: skip
    assert losses[-1] < losses[0]


def test_a_detector_of_other_classes_or_sizes_is_no_start(scenes, tmp_path):
    model = FasterRcnn(RECIPE.model, 2)
    path = tmp_path / "d.safetensors"
    save_weights(path, model.state_dict(), {"class_names": ["disc", "star"]})
    with pytest.raises(ValueError, match=r"d\.safetensors knows \['disc', 'star'\]"):
        initial_model(RECIPE, ("star", "disc"), None, path)
    wider = dataclasses.replace(RECIPE.model, head_width=32)
    with pytest.raises(ArtifactError, match=r"d\.safetensors does not fit"):
        initial_model(dataclasses.replace(RECIPE, model=wider), ("disc", "star"), None, path)
    masking = with_masks()
    save_weights(path, FasterRcnn(masking.model, 2).state_dict(), {"class_names": ["disc", "star"]})
    with pytest.raises(ArtifactError, match="too many"):
        initial_model(RECIPE, ("disc", "star"), None, path)


def test_masks_are_learnt_from_boxes_with_masks_only(scenes, tmp_path):
    content = json.loads((scenes / "train" / "instances.json").read_text())
    del content["annotations"][0]["segmentation"]
    write_json(tmp_path / "some.json", content)
    folder = load_coco_folder(scenes / "train", annotations=tmp_path / "some.json")
    with pytest.raises(ValueError, match=r"\.jpg has \d boxes and \d masks"):
        train(
            open_detector_stage(tmp_path / "run"),
            folder,
            with_masks(),
            _start(folder, with_masks()),
        )
    with pytest.raises(ValueError, match="only_masks needs a mask head"):
        DetectorRecipe(only_masks=True)
    with pytest.raises(ValueError, match="--start-from"):
        RetrainDetectorConfig(
            data=scenes / "train", output=tmp_path / "x", recipe=with_masks(only_masks=True)
        )


def test_masks_alone_learn_nothing_from_images_of_background(scenes):
    images = load_negatives(load_coco_folder(scenes / "val"), 64)
    recipe = with_masks(only_masks=True)
    model = initial_model(recipe, ("disc", "star"), None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=1e-2)
    scalars = train_step(model, optimizer, images, recipe, 0, 10)
    assert scalars["mask"] == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_images_are_left_out_of_training_and_evaluation_and_listed(scenes, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(scenes / split, tmp_path / split)
        bad = load_coco_folder(tmp_path / split).records[0].path
        bad.write_bytes(bad.read_bytes()[:200])
        bad.rename(bad.with_name(f"{split}.jpg"))
        text = (tmp_path / split / "instances.json").read_text()
        (tmp_path / split / "instances.json").write_text(text.replace(bad.name, f"{split}.jpg"))
    config = RetrainDetectorConfig(
        data=tmp_path / "train", val=tmp_path / "val", output=tmp_path / "run",
        recipe=dataclasses.replace(RECIPE, epochs=1),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"cannot read .*train\.jpg"):
        main(config)
    main(dataclasses.replace(config, skip_bad=True))
    assert set(read_manifest(config.output)["metrics"]["skipped"]) == {
        "train/train.jpg", "val/val.jpg",
    }  # fmt: skip


def test_the_command_trains_evaluates_and_is_skipped_when_done(scenes, tmp_path):
    config = RetrainDetectorConfig(
        data=scenes / "train", val=scenes / "val", output=tmp_path / "run", recipe=RECIPE
    )
    main(config)
    assert 0 <= read_manifest(tmp_path / "run")["metrics"]["val"]["voc_ap50"] <= 1
    model, class_names = load_detector(tmp_path / "run" / WEIGHTS_NAME)
    assert model.config == RECIPE.model
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
        recipe=dataclasses.replace(RECIPE, roi_drop=drop),
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
    batches = Batches(images, RECIPE)
    first, other, again = (batches.of_step(step) for step in (1, 3, 1))
    np.testing.assert_array_equal(first[0].pixels, again[0].pixels)
    assert any((a.pixels != b.pixels).any() for a, b in zip(first, other, strict=True))


def test_every_image_is_seen_once_an_epoch(scenes):
    images = load_framed_images(load_coco_folder(scenes / "train"), 64)
    batches = Batches(images, RECIPE)
    assert batches.per_epoch == 2
    assert sum(len(batches.of_step(step)) for step in range(2)) == len(images)


def test_batches_are_those_of_factors_and_orders_made_anew_at_every_step(scenes):
    images = load_framed_images(load_coco_folder(scenes / "train"), 64)
    images += load_negatives(load_coco_folder(scenes / "val"), 64)
    recipe = dataclasses.replace(RECIPE, repeat_thresh=0.9, batch_size=4, seed=3)
    batches = Batches(images, recipe)
    for step in range(4):
        epoch, position = divmod(step, 2)
        classes = [set(image.labels.tolist()) for image in images]
        factors = repeat_factors(classes, recipe.repeat_thresh)
        order = epoch_order(factors, np.random.default_rng((recipe.seed, epoch)))
        generator = np.random.default_rng((recipe.seed, epoch, position))
        expected = [
            random_view(images[index], recipe.view, generator)
            for index in order[4 * position : 4 * position + 4]
        ]
        for got, want in zip(batches.of_step(step), expected, strict=True):
            assert got.name == want.name
            np.testing.assert_array_equal(got.pixels, want.pixels)
            np.testing.assert_array_equal(got.boxes, want.boxes)


def test_images_kept_in_a_file_are_those_kept_in_memory(scenes, tmp_path, monkeypatch):
    folder, store = load_coco_folder(scenes / "train"), tmp_path / "images.npy"
    expected = load_framed_images(folder, 64, folder, with_masks=True)
    for _ in range(2):
        found = load_framed_images(folder, 64, folder, with_masks=True, store=store)
        for got, want, record in zip(found, expected, folder.records, strict=True):
            framed = frame_image(
                record.image(),
                record.boxes,
                record.labels,
                frame_side=64,
                masks=record.masks(),
                name=record.path.name,
            )
            assert got.valid_size == want.valid_size == framed.valid_size
            assert got.name == want.name == framed.name
            assert got.masks == want.masks == framed.masks
            for name in ("pixels", "boxes", "labels"):
                np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
                np.testing.assert_array_equal(getattr(got, name), getattr(framed, name))
            np.testing.assert_array_equal(got.truth.boxes, want.boxes)
        monkeypatch.setattr(stage_module, "read_image", None)  # a whole file is not made again


def test_the_cpu_by_name_is_the_default(scenes, tmp_path):
    config = RetrainDetectorConfig(data=scenes / "train", output=tmp_path / "a", recipe=RECIPE)
    main(config)
    main(dataclasses.replace(config, device="cpu", output=tmp_path / "b"))
    one, other = (load_weights(tmp_path / name / WEIGHTS_NAME) for name in "ab")
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.gpu
def test_a_run_begun_on_a_gpu_resumes_there_as_if_undisturbed_and_ends_on_the_cpu(
    scenes, tmp_path, monkeypatch
):
    folder, gpu = load_coco_folder(scenes / "train"), torch.device("cuda")
    train(open_detector_stage(tmp_path / "a"), folder, RECIPE, _start(folder), device=gpu)
    with _killed_in_step_3(monkeypatch):
        train(open_detector_stage(tmp_path / "b"), folder, RECIPE, _start(folder), device=gpu)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    train(open_detector_stage(tmp_path / "b"), folder, RECIPE, _start(folder), device=gpu)
    # Sums on a GPU have no fixed order; other RoIs would give other losses.
    assert _losses(tmp_path / "b")[-2:] == pytest.approx(_losses(tmp_path / "a")[-2:], rel=0.02)
    moved = train(open_detector_stage(tmp_path / "c"), folder, RECIPE, _start(folder))
    assert all(value.device.type == "cpu" for value in moved.state_dict().values())


def test_the_file_of_images_goes_when_training_ends(scenes, tmp_path):
    folder = load_coco_folder(scenes / "train")
    stage = open_detector_stage(tmp_path / "run")
    train(stage, folder, RECIPE, _start(folder), load_coco_folder(scenes / "val"))
    assert not list(stage.directory.glob("*.npy"))


def test_images_of_background_are_learnt_from_without_boxes(scenes, tmp_path):
    folder, other = load_coco_folder(scenes / "train"), load_coco_folder(scenes / "val")
    assert all(len(image.boxes) == 0 for image in load_negatives(other, 64))
    plain = train(open_detector_stage(tmp_path / "a"), folder, RECIPE, _start(folder))
    with_background = train(
        open_detector_stage(tmp_path / "b"), folder, RECIPE, _start(folder), other
    )
    assert not torch.equal(plain.box_head.classes.bias, with_background.box_head.classes.bias)


def test_silence_is_learnt_from_images_of_background_alone(scenes):
    images = load_negatives(load_coco_folder(scenes / "val"), 64)
    torch.manual_seed(0)
    model = FasterRcnn(RECIPE.model, 3)
    optimizer = torch.optim.AdamW(parameter_groups(model, RECIPE), lr=1e-3)
    losses = [
        train_step(model, optimizer, images, RECIPE, step, 40)["classification"]
        for step in range(30)
    ]
    assert losses[-1] < 0.5 * losses[0]


def test_detections_lie_in_the_frame_of_each_image(scenes):
    folder = load_coco_folder(scenes / "val")
    model = FasterRcnn(RECIPE.model, len(folder.class_names)).eval()
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
    model = FasterRcnn(RECIPE.model, 2)
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
        train(open_detector_stage(tmp_path), folder, RECIPE, _start(folder))
