import dataclasses

import numpy as np
import pytest
import torch

import training.train_wsod as stage_module
from training.data.coco import load_coco_folder
from training.data.results import write_proposals
from training.data.views import frame_image
from training.engine.stage import open_stage
from training.generate_scenes import GenerateScenesConfig, generate_scenes
from training.models.detector_adapter import decode_boxes
from training.models.wsod_detector import WsodDetectorConfig
from training.models.wsod_trunks import WsodTrunk
from training.train_wsod import (
    WsodRecipe,
    branch_weights,
    detect,
    load_samples,
    mirror,
    moved_boxes,
    parameter_groups,
    train,
)
from training.wsod.drop_block import DropBlockConfig
from training.wsod.mist import MistConfig
from training.wsod.refinement import BOX_WEIGHTS
from weaksam_rt.types import Proposals

_RECIPE = WsodRecipe(
    model=WsodDetectorConfig(image_size=64, head_width=16),
    epochs=2,
    images_per_step=2,
    warmup_steps=1,
    min_side_px=8.0,
)
_EVERYTHING = dataclasses.replace(
    _RECIPE,
    model=dataclasses.replace(
        _RECIPE.model,
        num_refinements=2,
        box_regression=True,
        drop_block=DropBlockConfig(enabled=True, width=4),
    ),
    method="mist",
    extra_image_sizes=(96,),
)


def _proposals(record, generator):
    height, width = record.image_size
    corners = np.sort(generator.random((12, 2, 2)), axis=1) * [width, height]
    boxes = np.concatenate([record.boxes, corners.reshape(-1, 4)]).astype(np.float32)
    boxes = np.concatenate([boxes, boxes[:2], np.array([[1, 1, 5, 40]], np.float32)])
    return Proposals(
        boxes=boxes,
        scores=np.ones(len(boxes), np.float32),
        sources=np.zeros(len(boxes), np.int32),
        image_size=record.image_size,
    )


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    generate_scenes(root, GenerateScenesConfig(num_train=4, num_val=1))
    folder = load_coco_folder(root / "train")
    generator = np.random.default_rng(0)
    found = {record.image_id: _proposals(record, generator) for record in folder.records[:3]}
    write_proposals(root / "proposals.json", found)
    return root


def _samples(scenes, recipe, store):
    torch.manual_seed(0)
    folder = load_coco_folder(scenes / "train")
    trunk = WsodTrunk(recipe.model.trunk)
    return load_samples(folder, scenes / "proposals.json", trunk, recipe, store=scenes / store)


@pytest.fixture(scope="module")
def samples(scenes):
    return _samples(scenes, _RECIPE, "plain.bin")


@pytest.fixture(scope="module")
def rich_samples(scenes):
    return _samples(scenes, _EVERYTHING, "rich.bin")


def _train(samples, directory, recipe=_RECIPE):
    stage = open_stage("train_wsod", directory, config=recipe, inputs={})
    return train(stage, samples, recipe, num_classes=len(samples[0].tags))


def test_images_without_proposals_are_left_out_and_bad_proposals_too(samples):
    assert len(samples) == 3
    for sample in samples:
        sides = sample.boxes[:, 2:] - sample.boxes[:, :2]
        assert sides.min() >= _RECIPE.min_side_px
        assert len(np.unique(sample.boxes, axis=0)) == len(sample.boxes)
        assert torch.nonzero(sample.tags).flatten().tolist() == list(sample.record.tags)


def test_training_images_without_proposals_are_an_error_that_names_them(scenes):
    folder = load_coco_folder(scenes / "train")
    with pytest.raises(ValueError, match=rf"1 of 4 images .*{folder.records[3].path.name}; make"):
        load_samples(
            folder,
            scenes / "proposals.json",
            WsodTrunk("squeezenet"),
            _RECIPE,
            store=scenes / "none.bin",
            needs_all=True,
        )


def test_the_file_holds_what_the_trunk_says_of_each_view(scenes):
    torch.manual_seed(0)
    folder, trunk = load_coco_folder(scenes / "train"), WsodTrunk("squeezenet")
    samples = load_samples(
        folder, scenes / "proposals.json", trunk, _EVERYTHING, store=scenes / "views.bin"
    )
    describer = stage_module.RoiDescriber(trunk, keep_cells=True).eval()
    describer = describer.to(memory_format=torch.channels_last)
    sample = samples[1]
    views = iter(sample.views)
    for size in (64, 96):
        framed = frame_image(
            sample.record.image(),
            sample.boxes,
            np.zeros(len(sample.boxes), np.int64),
            frame_side=size,
        )
        for seen in (framed, mirror(framed)):
            view = next(views)
            np.testing.assert_array_equal(view.boxes.numpy(), seen.boxes)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                expected = describer(stage_module._pixels(seen), view.boxes)
            for name in ("mean_inside", "max_inside", "mean_around", "cells"):
                found = getattr(view.descriptions, name)
                torch.testing.assert_close(found, getattr(expected, name), msg=name)


@pytest.mark.parametrize("recipe", [_RECIPE, _EVERYTHING], ids=["oicr", "everything"])
def test_a_killed_run_ends_where_the_undisturbed_one_does(
    recipe, samples, rich_samples, tmp_path, monkeypatch
):
    chosen = samples if recipe is _RECIPE else rich_samples
    undisturbed = _train(chosen, tmp_path / "a", recipe)
    real_step, steps = stage_module.train_step, []

    def _killed_in_step_3(*arguments, **rest):
        steps.append(0)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real_step(*arguments, **rest)

    monkeypatch.setattr(stage_module, "train_step", _killed_in_step_3)
    with pytest.raises(KeyboardInterrupt):
        _train(chosen, tmp_path / "b", recipe)
    monkeypatch.undo()
    resumed = _train(chosen, tmp_path / "b", recipe)
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_detections_are_proposals_suppressed_by_class(samples, tmp_path):
    head = _train(samples, tmp_path)
    found = detect(head, samples[0], _RECIPE)
    assert 0 < len(found) <= _RECIPE.max_detections
    proposals = {tuple(box) for box in samples[0].boxes.tolist()}
    assert {tuple(box) for box in found.boxes.tolist()} <= proposals
    assert (np.diff(found.scores) <= 0).all()


def test_with_regression_boxes_move_and_stay_inside_the_image(rich_samples, tmp_path):
    head = _train(rich_samples, tmp_path, _EVERYTHING)
    found = detect(head, rich_samples[0], _EVERYTHING)
    proposals = {tuple(box) for box in rich_samples[0].boxes.tolist()}
    assert not {tuple(box) for box in found.boxes.tolist()} & proposals
    height, width = rich_samples[0].record.image_size
    assert found.boxes.min() >= 0
    assert found.boxes[:, [0, 2]].max() <= width
    assert found.boxes[:, [1, 3]].max() <= height


def test_scores_are_the_mean_over_sizes_and_orientations(rich_samples):
    recipe = dataclasses.replace(
        _EVERYTHING, nms_thresh=1.0, max_detections=10_000, model=_RECIPE.model
    )
    torch.manual_seed(0)
    head = stage_module.WsodHead(_RECIPE.model, 8).eval()
    sample = rich_samples[0]
    assert [view.is_mirrored for view in sample.views] == [False, True, False, True]
    with torch.inference_mode():
        passes = [head(view.descriptions).scores() for view in sample.views]
    expected = sum(passes) / len(passes)
    found = detect(head, sample, recipe)
    assert found.scores.tolist() == pytest.approx(
        expected.flatten().sort(descending=True).values.tolist(), rel=1e-5
    )


def test_offsets_of_a_mirrored_view_are_mirrored_back():
    boxes = np.array([[10, 10, 30, 50], [40, 5, 60, 25]], np.float32)
    offsets = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    width = 100.0
    flipped = torch.from_numpy(boxes)[:, [2, 1, 0, 3]] * torch.tensor([-1.0, 1, -1, 1])
    flipped = flipped + torch.tensor([width, 0, width, 0])
    there = decode_boxes(flipped[:, None], offsets, BOX_WEIGHTS)
    back = torch.stack(
        [width - there[..., 2], there[..., 1], width - there[..., 0], there[..., 3]], dim=-1
    )
    torch.testing.assert_close(moved_boxes(boxes, offsets, is_mirrored=True), back)


def test_the_hiding_network_has_its_own_rate_and_the_first_branch_of_mist_its_weight():
    head = stage_module.WsodHead(_EVERYTHING.model, 3)
    detector, hiding = parameter_groups(head, _EVERYTHING)
    assert (detector["peak_lr"], hiding["peak_lr"]) == (1e-3, 1e-4)
    counted = len(detector["params"]) + len(hiding["params"])
    assert counted == len(list(head.parameters()))
    assert branch_weights(_EVERYTHING) == [3.0, 1.0]
    half = dataclasses.replace(_EVERYTHING, mist=MistConfig(first_branch_weight=0.5))
    assert branch_weights(half) == [0.5, 1.0]
    assert branch_weights(_RECIPE) == [1.0, 1.0, 1.0]


def test_a_size_that_does_not_fit_the_trunk_is_refused():
    with pytest.raises(ValueError, match="multiple of 16"):
        WsodRecipe(extra_image_sizes=(100,))


def test_mirroring_moves_boxes_with_the_pixels():
    image = np.zeros((20, 40, 3), np.uint8)
    image[5:15, 2:12] = 255
    framed = frame_image(
        image, np.array([[2, 5, 12, 15]], np.float32), np.array([0]), frame_side=64
    )
    mirrored = mirror(framed)
    columns = np.flatnonzero(mirrored.pixels[:32].max(axis=(0, 2)) > 127)
    np.testing.assert_allclose(mirrored.boxes[0, [0, 2]], [columns[0], columns[-1] + 1], atol=1)
    twice = mirror(mirrored)
    np.testing.assert_array_equal(twice.pixels, framed.pixels)
    np.testing.assert_allclose(twice.boxes, framed.boxes, rtol=1e-5)


def test_without_a_tagged_image_there_is_nothing_to_learn(tmp_path):
    stage = open_stage("train_wsod", tmp_path, config=_RECIPE, inputs={})
    with pytest.raises(ValueError, match="no image has both"):
        train(stage, [], _RECIPE, num_classes=2)
