import numpy as np
import pytest
import torch

import training.train_wsod as stage_module
from training.data.coco import load_coco_folder
from training.data.results import write_proposals
from training.data.views import frame_image
from training.engine.stage import open_stage
from training.generate_scenes import GenerateScenesConfig, generate_scenes
from training.models.squeezenet import SqueezeNetFeatures
from training.models.wsod_detector import WsodDetectorConfig
from training.train_wsod import WsodRecipe, detect, load_samples, mirror, train
from weaksam_rt.types import Proposals

_RECIPE = WsodRecipe(
    model=WsodDetectorConfig(image_size=64, head_width=16),
    epochs=2,
    images_per_step=2,
    warmup_steps=1,
    min_side_px=8.0,
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
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    generate_scenes(root, GenerateScenesConfig(num_train=4, num_val=1))
    folder = load_coco_folder(root / "train")
    generator = np.random.default_rng(0)
    found = {record.image_id: _proposals(record, generator) for record in folder.records[:3]}
    write_proposals(root / "proposals.json", found)
    torch.manual_seed(0)
    return load_samples(folder, root / "proposals.json", SqueezeNetFeatures(), _RECIPE)


def _train(samples, directory):
    stage = open_stage("train_wsod", directory, config=_RECIPE, inputs={})
    return train(stage, samples, _RECIPE, num_classes=len(samples[0].tags))


def test_images_without_proposals_are_left_out_and_bad_proposals_too(samples):
    assert len(samples) == 3
    for sample in samples:
        sides = sample.boxes[:, 2:] - sample.boxes[:, :2]
        assert sides.min() >= _RECIPE.min_side_px
        assert len(np.unique(sample.boxes, axis=0)) == len(sample.boxes)
        assert torch.nonzero(sample.tags).flatten().tolist() == list(sample.record.tags)


def test_a_killed_run_ends_where_the_undisturbed_one_does(samples, tmp_path, monkeypatch):
    undisturbed = _train(samples, tmp_path / "a")
    real_step, steps = stage_module.train_step, []

    def _killed_in_step_3(*arguments):
        steps.append(0)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real_step(*arguments)

    monkeypatch.setattr(stage_module, "train_step", _killed_in_step_3)
    with pytest.raises(KeyboardInterrupt):
        _train(samples, tmp_path / "b")
    monkeypatch.undo()
    resumed = _train(samples, tmp_path / "b")
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_detections_are_proposals_suppressed_by_class(samples, tmp_path):
    head = _train(samples, tmp_path)
    found = detect(head, samples[0], _RECIPE)
    assert 0 < len(found) <= _RECIPE.max_detections
    proposals = {tuple(box) for box in samples[0].boxes.tolist()}
    assert {tuple(box) for box in found.boxes.tolist()} <= proposals
    assert (np.diff(found.scores) <= 0).all()


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
