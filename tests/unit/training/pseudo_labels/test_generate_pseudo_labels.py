import dataclasses

import numpy as np
import pytest

from training.data.coco import load_coco_folder
from training.data.results import write_detections
from training.engine.stage import read_manifest
from training.generate_pseudo_labels import (
    ANNOTATIONS_NAME,
    PseudoLabelConfig,
    PseudoLabelRecipe,
    choose,
    main,
    statistics,
)
from training.generate_scenes import GenerateScenesConfig, generate_scenes
from weaksam_rt.types import Detections


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    generate_scenes(root, GenerateScenesConfig(num_train=3, num_val=1))
    return root / "train"


def _true_and_wrong(record):
    """Every true box with a high score, and one box of an absent class with the highest."""
    absent = min(set(range(8)) - set(record.tags))
    boxes = np.concatenate([record.boxes, np.array([[0, 0, 9, 9]], np.float32)])
    scores = np.concatenate([np.linspace(0.8, 0.7, len(record.boxes)), [0.9]])
    return Detections(
        boxes=boxes.astype(np.float32),
        scores=scores.astype(np.float32),
        labels=np.concatenate([record.labels, [absent]]),
        image_size=record.image_size,
    )


def test_the_written_boxes_are_read_as_a_data_set_of_the_same_images(data, tmp_path):
    folder = load_coco_folder(data)
    found = {record.image_id: _true_and_wrong(record) for record in folder.records}
    write_detections(tmp_path / "d.json", found, folder=folder)
    config = PseudoLabelConfig(
        data=data,
        detections=tmp_path / "d.json",
        output=tmp_path / "labels",
        recipe=PseudoLabelRecipe(method="threshold", fixed_thresh=0.5),
    )
    main(config)
    again = load_coco_folder(data, annotations=tmp_path / "labels" / ANNOTATIONS_NAME)
    assert again.class_names == folder.class_names
    for truth, pseudo in zip(folder.records, again.records, strict=True):
        assert pseudo.path == truth.path
        np.testing.assert_allclose(pseudo.boxes, truth.boxes, atol=0.01)
        np.testing.assert_array_equal(pseudo.labels, truth.labels)
    metrics = read_manifest(tmp_path / "labels")["metrics"]
    assert metrics["evaluation_only"]["precision_iou50"] == 1.0
    assert metrics["evaluation_only"]["recall_iou50"] == 1.0
    assert metrics["num_boxes"] == sum(len(record.boxes) for record in folder.records)


@pytest.mark.parametrize("method", ["adaptive", "top_1", "threshold"])
def test_true_boxes_do_not_decide(data, method):
    folder = load_coco_folder(data)
    found = {record.image_id: _true_and_wrong(record) for record in folder.records}
    moved = dataclasses.replace(
        folder,
        records=tuple(dataclasses.replace(r, boxes=r.boxes + 7) for r in folder.records),
    )
    recipe = PseudoLabelRecipe(method=method)
    ours, theirs = (choose(f, found, recipe) for f in (folder, moved))
    for image_id, labels in ours.items():
        np.testing.assert_array_equal(labels.boxes, theirs[image_id].boxes)


def test_statistics_count_wrong_and_missed_boxes(data):
    folder = load_coco_folder(data)
    nothing = {record.image_id: Detections.empty(record.image_size) for record in folder.records}
    first = folder.records[0]
    wrong = dataclasses.replace(_true_and_wrong(first), masks=None).take(np.array([0, -1]))
    result = statistics(folder, nothing | {first.image_id: wrong})
    assert result["num_boxes"] == 2
    assert result["images_without_boxes"] == len(folder.records) - 1
    assert result["evaluation_only"]["precision_iou50"] == 0.5
    num_truth = sum(len(record.boxes) for record in folder.records)
    assert result["evaluation_only"]["recall_iou50"] == pytest.approx(1 / num_truth)


def test_statistics_say_which_classes_and_images_got_boxes(data):
    folder = load_coco_folder(data)
    found = {record.image_id: _true_and_wrong(record) for record in folder.records}
    first, *others = folder.records
    chosen = {record.image_id: Detections.empty(record.image_size) for record in others}
    chosen[first.image_id] = found[first.image_id].take(np.array([0]))
    result = statistics(folder, chosen)
    assert result["images_by_number_of_boxes"] == {"0": len(others), "1": 1}
    label = int(first.labels[0])
    of_class = result["by_class"][folder.class_names[label]]
    tagged = sum(label in record.tags for record in folder.records)
    height, width = first.image_size
    sides = first.boxes[0, 2:] - first.boxes[0, :2]
    assert of_class == {
        "num_boxes": 1,
        "num_tagged_images": tagged,
        "num_tagged_images_without_box": tagged - 1,
        "mean_score": pytest.approx(0.8),
        "mean_share_of_image": pytest.approx(float(sides.prod()) / (height * width), rel=1e-5),
        "evaluation_only": {
            "precision_iou50": 1.0,
            "recall_iou50": 1 / sum((r.labels == label).sum() for r in folder.records),
            "num_true_boxes": sum((r.labels == label).sum() for r in folder.records),
        },
    }


def test_without_true_boxes_nothing_is_compared(data):
    folder = load_coco_folder(data)
    bare = dataclasses.replace(
        folder,
        records=tuple(
            dataclasses.replace(
                r,
                boxes=r.boxes[:0],
                labels=r.labels[:0],
                is_crowd=r.is_crowd[:0],
                given_tags=r.tags,
            )
            for r in folder.records
        ),
    )
    found = {record.image_id: _true_and_wrong(record) for record in folder.records}
    result = statistics(bare, choose(bare, found, PseudoLabelRecipe()))
    assert result["num_boxes"] > 0
    assert result["evaluation_only"] is None
    assert {row["evaluation_only"] for row in result["by_class"].values()} == {None}
