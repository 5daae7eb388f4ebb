"""The stage on a few generated scenes with a tiny untrained SAM: its masks are poor, its files
are not.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

import training.generate_pseudo_masks as stage_module
from training.data.coco import load_coco_folder
from training.engine.stage import read_manifest
from training.generate_pseudo_masks import (
    ANNOTATIONS_NAME,
    PseudoMaskConfig,
    PseudoMaskRecipe,
    annotations_with_masks,
    generate_pseudo_masks,
    statistics,
)
from training.generate_scenes import GenerateScenesConfig, generate_scenes
from training.models.sam import build_sam, compact, save_sam
from training.pseudo_labels.masks import BoxMasks
from weaksam_rt.errors import ArtifactError
from weaksam_rt.files import write_json
from weaksam_rt.masks import decode_rle, encode_rle, mask_to_box
from weaksam_rt.types import InstanceMasks


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    generate_scenes(root / "scenes", GenerateScenesConfig(num_train=4, num_val=1, seed=2))
    content = json.loads((root / "scenes" / "train" / "instances.json").read_text())
    last = content["images"][-1]["id"]
    content["annotations"] = [
        {k: v for k, v in {**a, "score": 0.5}.items() if k != "segmentation"}
        for a in content["annotations"]
        if a["image_id"] != last
    ]
    write_json(root / "boxes.json", content)
    torch.manual_seed(0)
    sizes = dataclasses.replace(compact(), image_size=64)
    save_sam(root / "sam.safetensors", build_sam(sizes), sizes)
    return root


def _config(world, output, **more):
    return PseudoMaskConfig(
        data=world / "scenes" / "train",
        annotations=world / "boxes.json",
        sam=world / "sam.safetensors",
        output=output,
        num_threads=1,
        **more,
    )


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    config = _config(world, tmp_path_factory.mktemp("run") / "masks")
    generate_pseudo_masks(config)
    return config


def test_every_box_keeps_its_place_and_gets_a_mask(world, finished):
    boxes = load_coco_folder(finished.data, annotations=finished.annotations)
    masks = load_coco_folder(finished.data, annotations=finished.output / ANNOTATIONS_NAME)
    metrics = read_manifest(finished.output)["metrics"]
    assert metrics["num_masks"] + metrics["num_empty"] == sum(len(r.boxes) for r in boxes.records)
    assert metrics["num_masks"] > 0
    assert metrics["skipped"] == {}
    for before, after in zip(boxes.records, masks.records, strict=True):
        assert after.path == before.path
        known = {tuple(box) for box in before.boxes.tolist()}
        assert {tuple(box) for box in after.boxes.tolist()} <= known
        assert after.masks().shape == (len(after.boxes), *after.image_size)
    annotation = json.loads((finished.output / ANNOTATIONS_NAME).read_text())["annotations"][0]
    assert annotation["score"] == 0.5
    assert (finished.output / "pictures.jpg").is_file()


def test_an_image_without_boxes_needs_no_mask(finished):
    masks = load_coco_folder(finished.data, annotations=finished.output / ANNOTATIONS_NAME)
    assert len(masks.records[-1].boxes) == 0


def test_a_killed_run_goes_on_with_the_images_that_are_not_done(
    world, finished, tmp_path, monkeypatch
):
    real, asked = stage_module._mask_image, []

    async def _counted(pipeline, record, recipe):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(record.image_id)
        return await real(pipeline, record, recipe)

    monkeypatch.setattr(stage_module, "_mask_image", _counted)
    config = _config(world, tmp_path / "masks")
    with pytest.raises(KeyboardInterrupt):
        generate_pseudo_masks(config)
    monkeypatch.undo()
    parts = {p.name: p.stat().st_mtime_ns for p in (config.output / "parts").iterdir()}
    assert len(parts) == 2
    generate_pseudo_masks(config)
    for name, written in parts.items():
        assert (config.output / "parts" / name).stat().st_mtime_ns == written
    text = (config.output / ANNOTATIONS_NAME).read_text()
    assert text == (finished.output / ANNOTATIONS_NAME).read_text()


def test_the_number_of_prompts_a_call_does_not_decide_the_masks(world, finished, tmp_path):
    recipe = PseudoMaskRecipe(max_prompts_per_call=1)
    config = _config(world, tmp_path / "masks", recipe=recipe)
    generate_pseudo_masks(config)
    one, many = (
        load_coco_folder(c.data, annotations=c.output / ANNOTATIONS_NAME)
        for c in (config, finished)
    )
    for a, b in zip(one.records, many.records, strict=True):
        assert np.count_nonzero(a.masks() != b.masks()) <= 1e-3 * a.masks().size


def test_a_damaged_part_is_named(world, tmp_path):
    config = _config(world, tmp_path / "masks")
    (config.output / "parts").mkdir(parents=True)
    (config.output / "parts" / "0.json").write_text('{"counts": [')
    with pytest.raises(ArtifactError, match=r"parts/0\.json is damaged"):
        generate_pseudo_masks(config)


def test_a_damaged_image_stops_the_stage_or_is_left_out_with_its_boxes(world, tmp_path):
    data = tmp_path / "train"
    shutil.copytree(world / "scenes" / "train", data)
    bad = load_coco_folder(data).records[1]
    bad.path.write_bytes(bad.path.read_bytes()[:200])
    config = dataclasses.replace(_config(world, tmp_path / "masks"), data=data)
    with pytest.raises(ValueError, match=rf"cannot read .*{bad.path.name}.*--skip-bad"):
        generate_pseudo_masks(config)
    generate_pseudo_masks(dataclasses.replace(config, skip_bad=True))
    assert list(read_manifest(config.output)["metrics"]["skipped"]) == [f"train/{bad.path.name}"]
    masks = load_coco_folder(data, annotations=config.output / ANNOTATIONS_NAME)
    assert bad.image_id not in {record.image_id for record in masks.records}


def test_an_empty_mask_takes_its_annotation_with_it():
    inside = np.zeros((1, 8, 8), bool)
    inside[0, 2:4, 2:4] = True
    both = np.concatenate([np.zeros_like(inside), inside])
    found = BoxMasks(
        masks=InstanceMasks(rle_counts=encode_rle(both), image_size=(8, 8)),
        predicted_iou=np.array([0.1, 0.8], np.float32),
        mask_boxes=mask_to_box(both),
    )
    content = {
        "images": [{"id": 4}, {"id": 5}],
        "categories": [],
        "annotations": [
            {"id": 1, "image_id": 4},
            {"id": 2, "image_id": 5},
            {"id": 3, "image_id": 4},
        ],
    }
    written = annotations_with_masks(content, {4: found})
    assert [a["id"] for a in written["annotations"]] == [3]
    assert [image["id"] for image in written["images"]] == [4]
    counts = written["annotations"][0]["segmentation"]["counts"].encode()
    np.testing.assert_array_equal(decode_rle([counts], (8, 8)), inside)


def test_true_masks_measure_perfect_ones_as_perfect(world):
    folder = load_coco_folder(world / "scenes" / "train")
    found = {
        record.image_id: BoxMasks(
            masks=InstanceMasks(rle_counts=record.rle_counts(), image_size=record.image_size),
            predicted_iou=np.ones(len(record.boxes), np.float32),
            mask_boxes=mask_to_box(record.masks()),
        )
        for record in folder.records
    }
    result = statistics(folder, found, folder)
    assert result["evaluation_only"]["mean_iou"] == 1.0
    assert result["evaluation_only"]["num_matched"] == sum(len(r.boxes) for r in folder.records)
    assert 0.3 < result["evaluation_only"]["mean_iou_of_filled_boxes"] < 0.9
    assert result["mean_inside"] == pytest.approx(1.0, abs=0.02)
    present = {folder.class_names[t] for record in folder.records for t in record.tags}
    for name, row in result["by_class"].items():
        assert (row["num_masks"] > 0) == (name in present)


def test_without_true_masks_nothing_is_compared(world, finished):
    boxes = load_coco_folder(finished.data, annotations=finished.annotations)
    masks = load_coco_folder(finished.data, annotations=finished.output / ANNOTATIONS_NAME)
    found = {
        record.image_id: BoxMasks(
            masks=InstanceMasks(rle_counts=record.rle_counts(), image_size=record.image_size),
            predicted_iou=np.ones(len(record.boxes), np.float32),
            mask_boxes=mask_to_box(record.masks()),
        )
        for record in masks.records
    }
    assert statistics(masks, found, boxes)["evaluation_only"] is None
