"""VOC and COCO in the layout in which they are distributed, some images each; and the recipes for
them from there to a trained detector.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.training.tiny_recipe import tiny_recipe
from training.convert_data import convert_coco, convert_voc
from training.data.coco import load_coco_folder
from training.data.voc import VOC_CLASSES, read_voc_annotation, read_voc_masks
from training.engine.stage import read_manifest
from training.generate_scenes import GenerateScenesConfig, generate_scenes
from training.models.sam import build_sam, compact, save_sam
from training.recipes import RECIPES
from training.run import RunConfig, run
from weaksam_rt.files import write_json

_DATA = Path(os.environ.get("WEAKSAM_DATA", "../shared/data"))
_TRUNK = _DATA / "weights" / "squeezenet1_0_imagenet.pt"
_NUM_TRAIN, _NUM_VAL = 4, 2

_OBJECT = """<object><name>{name}</name><pose>Left</pose><truncated>1</truncated>
<difficult>{difficult}</difficult><bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax>
<ymax>{3}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax>
<ymax>2</ymax></bndbox></part></object>"""
_ANNOTATION = """<annotation><folder>VOC</folder><filename>{file}</filename><size>
<width>{width}</width><height>{height}</height><depth>3</depth></size><segmented>0</segmented>
{objects}</annotation>"""


def _write_voc_xml(path, file, size, objects):
    """``objects``: (name, xmin, ymin, xmax, ymax, difficult), pixels from 1."""
    text = "".join(_OBJECT.format(*o[1:5], name=o[0], difficult=o[5]) for o in objects)
    height, width = size
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_ANNOTATION.format(file=file, width=width, height=height, objects=text))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    generate_scenes(root, GenerateScenesConfig(num_train=_NUM_TRAIN, num_val=_NUM_VAL, seed=3))
    return root


def _voc_tree(scenes, root, year, names):
    """Scenes as ``VOCdevkit/VOC<year>``; a shape is called by the VOC class of its number."""
    tree = root / "VOCdevkit" / f"VOC{year}"
    number = 0
    for split, target in (("train", "trainval"), ("val", "test")):
        listed = []
        for record in load_coco_folder(scenes / split).records:
            number += 1
            name = names.format(number)
            (tree / "JPEGImages").mkdir(parents=True, exist_ok=True)
            shutil.copy(record.path, tree / "JPEGImages" / f"{name}.jpg")
            corners = record.boxes.round().astype(int) + np.array([1, 1, 0, 0])
            objects = [
                (VOC_CLASSES[label], *box, 0)
                for label, box in zip(record.labels, corners.tolist(), strict=True)
            ]
            path = tree / "Annotations" / f"{name}.xml"
            _write_voc_xml(path, f"{name}.jpg", record.image_size, objects)
            listed.append(name)
        if year == 2012 and split == "train":
            listed.append(_add_untagged_voc(tree, names.format(99), record))
        lists = tree / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{target}.txt").write_text("\n".join(listed) + "\n")
        (lists / f"cat_{target}.txt").write_text("".join(f"{name} -1\n" for name in listed))
    return tree.parent


def _add_voc_masks(tree, names, records):
    """``SegmentationObject`` of the test split: each object's number, a border around the first."""
    (tree / "SegmentationObject").mkdir()
    (tree / "ImageSets" / "Segmentation").mkdir()
    listed = []
    for index, record in enumerate(records):
        name = names.format(_NUM_TRAIN + 1 + index)
        numbers = np.zeros(record.image_size, np.uint8)
        for number, mask in enumerate(record.masks(), start=1):
            numbers[mask] = number
        numbers[0, 0] = 255
        image = Image.fromarray(numbers, "P")
        image.putpalette(list(range(256)) * 3)
        image.save(tree / "SegmentationObject" / f"{name}.png")
        listed.append(name)
    (tree / "ImageSets" / "Segmentation" / "val.txt").write_text("\n".join(listed))


def _add_untagged_voc(tree, name, record):
    """An image with a difficult object alone."""
    shutil.copy(record.path, tree / "JPEGImages" / f"{name}.jpg")
    path = tree / "Annotations" / f"{name}.xml"
    _write_voc_xml(path, f"{name}.jpg", record.image_size, [("cat", 1, 1, 30, 30, 1)])
    return name


def _coco_tree(scenes, root, year):
    """Scenes as ``annotations/instances_{train,val}<year>.json`` with ids that leave gaps, and a
    training image without annotations.
    """
    for split in ("train", "val"):
        content = json.loads((scenes / split / "instances.json").read_text())
        for category in content["categories"]:
            category.update(id=10 * category["id"], supercategory="shape")
        for annotation in content["annotations"]:
            annotation["category_id"] *= 10
        content["info"] = {"year": year}
        for image in content["images"]:
            image.update(license=1, coco_url="http://images.example/1.jpg")
        shutil.copytree(scenes / split / "images", root / f"{split}{year}")
        if split == "train":
            first = content["images"][0]
            content["images"].append({**first, "id": 9999, "file_name": "empty.jpg"})
            folder = root / f"{split}{year}"
            shutil.copy(folder / first["file_name"], folder / "empty.jpg")
        write_json(root / "annotations" / f"instances_{split}{year}.json", content)
    return root


def test_voc_counts_pixels_from_one_and_includes_the_last(tmp_path):
    path = tmp_path / "000001.xml"
    _write_voc_xml(path, "000001.jpg", (50, 40), [("dog", 1, 1, 40, 50, 0), ("cat", 3, 4, 3, 4, 1)])
    found = read_voc_annotation(path)
    assert found.image_size == (50, 40)
    assert found.boxes.tolist() == [[0, 0, 40, 50], [2, 3, 3, 4]]
    assert found.names == ("dog", "cat")  # and no parts of them
    assert found.is_difficult.tolist() == [False, True]


@pytest.mark.parametrize(("year", "names"), [(2007, "{:06d}"), (2012, "2008_{:06d}")])
def test_a_converted_voc_tree_has_the_objects_of_the_original(scenes, tmp_path, year, names):
    devkit = _voc_tree(scenes, tmp_path, year, names)
    convert_voc(devkit, tmp_path / "out", year=year, split="test")
    folder = load_coco_folder(tmp_path / "out")
    assert folder.class_names == VOC_CLASSES
    originals = load_coco_folder(scenes / "val").records
    for record, original in zip(folder.records, originals, strict=True):
        assert record.path.is_symlink()
        np.testing.assert_array_equal(record.boxes, original.boxes.round())
        assert record.tags == original.tags
        np.testing.assert_array_equal(record.image(), original.image())
    first = names.format(_NUM_TRAIN + 1)
    assert folder.records[0].image_id == int(first.replace("_", ""))


def test_objects_of_a_voc_tree_get_their_masks(scenes, tmp_path):
    names, originals = "2008_{:06d}", load_coco_folder(scenes / "val").records
    devkit = _voc_tree(scenes, tmp_path, 2012, names)
    _add_voc_masks(devkit / "VOC2012", names, originals)
    convert_voc(devkit, tmp_path / "out", year=2012, split="val", masks=True)
    for record, original in zip(load_coco_folder(tmp_path / "out").records, originals, strict=True):
        assert record.has_masks
        later_on_top = original.masks()
        for index in range(len(later_on_top)):
            later_on_top[index] &= ~later_on_top[index + 1 :].any(axis=0)
        later_on_top[:, 0, 0] = False
        np.testing.assert_array_equal(record.masks(), later_on_top[later_on_top.any(axis=(1, 2))])


def test_an_object_without_a_mask_is_left_out_where_masks_are_asked_for(scenes, tmp_path, caplog):
    names, originals = "2008_{:06d}", load_coco_folder(scenes / "val").records
    devkit = _voc_tree(scenes, tmp_path, 2012, names)
    _add_voc_masks(devkit / "VOC2012", names, originals)
    first = names.format(_NUM_TRAIN + 1)
    path = devkit / "VOC2012" / "SegmentationObject" / f"{first}.png"
    with Image.open(path) as image:
        numbers = np.array(image)
    numbers[numbers == 1] = 0
    image = Image.fromarray(numbers, "P")
    image.putpalette(list(range(256)) * 3)
    image.save(path)
    with caplog.at_level("WARNING"):
        convert_voc(devkit, tmp_path / "out", year=2012, split="val", masks=True)
    record = load_coco_folder(tmp_path / "out").records[0]
    np.testing.assert_array_equal(record.boxes, originals[0].boxes.round()[1:])
    assert "left out 1 objects without a mask" in caplog.text


@pytest.mark.parametrize(
    ("pixels", "mode", "message"),
    [
        (np.full((5, 4), 3, np.uint8), "P", r"has an object 3, its annotation has 2"),
        (np.zeros((4, 4), np.uint8), "P", r"4x4 pixels, expected mode P of 5x4"),
        (np.zeros((5, 4), np.uint8), "L", r"mode L of 5x4"),
        (None, None, "is no VOC segmentation"),
    ],
)
def test_masks_that_are_not_of_the_annotation_are_refused(tmp_path, pixels, mode, message):
    path = tmp_path / "mask.png"
    if pixels is None:
        path.write_bytes(b"no picture")
    else:
        image = Image.fromarray(pixels, mode)
        if mode == "P":
            image.putpalette(list(range(256)) * 3)
        image.save(path)
    with pytest.raises(ValueError, match=message):
        read_voc_masks(path, (5, 4), 2)


def test_difficult_objects_give_no_tag_and_need_not_be_found(tmp_path, scenes):
    devkit = _voc_tree(scenes, tmp_path, 2007, "{:06d}")
    path = devkit / "VOC2007" / "Annotations" / "000001.xml"
    objects = [("dog", 1, 1, 30, 30, 0), ("cat", 5, 5, 20, 20, 1)]
    _write_voc_xml(path, "000001.jpg", (100, 100), objects)
    convert_voc(devkit, tmp_path / "out")
    record = load_coco_folder(tmp_path / "out").records[0]
    assert [VOC_CLASSES[tag] for tag in record.tags] == ["dog"]
    assert record.is_crowd.tolist() == [False, True]


def test_a_converted_coco_split_keeps_ids_and_masks(scenes, tmp_path):
    root = _coco_tree(scenes, tmp_path / "coco", 2017)
    convert_coco(root, tmp_path / "out", split="val2017")
    folder = load_coco_folder(tmp_path / "out")
    assert folder.category_ids == tuple(range(10, 90, 10))
    for record, original in zip(folder.records, load_coco_folder(scenes / "val").records,
                                strict=True):  # fmt: skip
        np.testing.assert_array_equal(record.boxes, original.boxes)
        np.testing.assert_array_equal(record.masks(), original.masks())
        np.testing.assert_array_equal(record.image(), original.image())


def test_objects_without_area_are_left_out(scenes, tmp_path):
    root = _coco_tree(scenes, tmp_path / "coco", 2014)
    path = root / "annotations" / "instances_train2014.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][2] = 0
    write_json(path, content)
    convert_coco(root, tmp_path / "out", split="train2014")
    kept = json.loads((tmp_path / "out" / "instances.json").read_text())["annotations"]
    assert [a["id"] for a in kept] == [a["id"] for a in content["annotations"][1:]]


def test_what_is_missing_is_named(scenes, tmp_path):
    devkit = _voc_tree(scenes, tmp_path, 2007, "{:06d}")
    with pytest.raises(ValueError, match=r"val\.txt is missing.*'test', 'trainval'"):
        convert_voc(devkit, tmp_path / "out", split="val")
    with pytest.raises(ValueError, match="no list of images"):
        convert_voc(devkit, tmp_path / "out", split="cat_test")
    (devkit / "VOC2007" / "JPEGImages" / "000002.jpg").unlink()
    with pytest.raises(ValueError, match=r"000002\.jpg is missing"):
        convert_voc(devkit, tmp_path / "out")
    (devkit / "VOC2007" / "Annotations" / "000001.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"000001\.xml is no VOC annotation"):
        convert_voc(devkit, tmp_path / "out")
    root = _coco_tree(scenes, tmp_path / "coco", 2017)
    gone = next((root / "val2017").iterdir())
    gone.unlink()
    with pytest.raises(ValueError, match=f"{gone.name} is missing"):
        convert_coco(root, tmp_path / "out", split="val2017")
    with pytest.raises(ValueError, match=r"instances_val2014\.json is no COCO"):
        convert_coco(root, tmp_path / "out", split="val2014")


def test_a_class_that_voc_has_not_is_refused(scenes, tmp_path):
    devkit = _voc_tree(scenes, tmp_path, 2007, "{:06d}")
    path = devkit / "VOC2007" / "Annotations" / "000001.xml"
    _write_voc_xml(path, "000001.jpg", (100, 100), [("unicorn", 1, 1, 30, 30, 0)])
    with pytest.raises(ValueError, match="000001 has an object of the class 'unicorn'"):
        convert_voc(devkit, tmp_path / "out")


def _converted(name, scenes, root):
    """The training and the validation folder of a recipe, converted from its true layout."""
    year = 2000 + int(name[-2:])
    train, val = root / "data_train", root / "data_val"
    if name.startswith("voc"):
        devkit = _voc_tree(scenes, root, year, "{:06d}" if year == 2007 else "2008_{:06d}")
        convert_voc(devkit, train, year=year)
        convert_voc(devkit, val, year=year, split="test")
    else:
        tree = _coco_tree(scenes, root / "coco", year)
        convert_coco(tree, train, split=f"train{year}")
        convert_coco(tree, val, split=f"val{year}")
    return train, val


_SLOW = pytest.mark.slow  # the other year of each set takes the same way


@pytest.mark.parametrize(
    "name",
    ["voc07", pytest.param("voc12", marks=_SLOW), pytest.param("coco14", marks=_SLOW), "coco17"],
)
def test_the_recipe_runs_from_the_true_layout_to_a_detector(name, scenes, tmp_path):
    if not _TRUNK.is_file():
        pytest.skip(f"{_TRUNK} is not here; set WEAKSAM_DATA to the data sets")
    train, val = _converted(name, scenes, tmp_path)
    torch.manual_seed(0)
    sizes = dataclasses.replace(compact(), image_size=64)
    save_sam(tmp_path / "sam.safetensors", build_sam(sizes), sizes)
    config = RunConfig(
        recipe=name,
        data=train,
        val=val,
        output=tmp_path / "run",
        sam=tmp_path / "sam.safetensors",
        trunk_weights=_TRUNK,
        val_proposals=False,  # an untrained classifier sees every class, which takes minutes
    )
    recipe = tiny_recipe(RECIPES[name]())
    if name != "voc07":  # the others have images without tags, and their commands say so
        with pytest.raises(ValueError, match=r"1 of 5 images of .* have no tags"):
            run(config, recipe)
        config = dataclasses.replace(config, skip_bad=True)
    assert config.skip_bad == ("--skip-bad" in RECIPES[name].__doc__)
    report = run(config, recipe)
    assert report["proposals_train"]["num_skipped"] == (name != "voc07")
    skipped = read_manifest(tmp_path / "run" / "wsod")["metrics"]["skipped"]
    assert len(skipped) == (name != "voc07")
    assert 0 <= report["detector"]["voc_ap50"] <= 1
    assert (tmp_path / "run" / "detector" / "report.html").is_file()
    assert (tmp_path / "run" / "wsod" / "detections" / "report.html").is_file()


@pytest.mark.parametrize(
    ("name", "thresholds"),
    [("voc07", (4.0, 4.0)), ("voc12", (4.0, 4.0)), ("coco14", (5.0, 4.0)), ("coco17", (5.0, 4.0))],
)
def test_the_published_recipes_follow_the_paper(name, thresholds):
    recipe = RECIPES[name]()
    drop = recipe.detector.roi_drop
    assert drop.mode == "independent"
    assert (drop.classification_thresh, drop.regression_thresh) == thresholds
    assert recipe.wsod.method == "mist"
    assert recipe.wsod.model.box_regression
    assert recipe.proposals.pipeline.proposals.points_per_side == 32
