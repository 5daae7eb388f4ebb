import json

import pytest
from PIL import Image

from training.data.coco import load_coco_folder
from training.merge_data import merge_data
from training.tag_file import read_tag_file, write_tagged_folder


@pytest.fixture
def tagged(tmp_path):
    for name, size in (("a.png", (20, 10)), ("b.png", (12, 30))):
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "tags.csv").write_text("file,tags\na.png,dog;bicycle\nb.png, cat ;dog;dog\n")
    return tmp_path


def test_tags_alone_make_a_data_set(tagged):
    write_tagged_folder(tagged, tagged / "tags.csv", tagged / "set")
    folder = load_coco_folder(tagged / "set")
    assert folder.class_names == ("bicycle", "cat", "dog")
    assert [record.tags for record in folder.records] == [(0, 2), (1, 2)]
    assert [record.image_size for record in folder.records] == [(10, 20), (30, 12)]
    assert folder.records[1].image().shape == (30, 12, 3)
    assert len(folder.records[0].boxes) == 0


def test_a_validation_set_takes_the_classes_of_the_training_set(tagged):
    write_tagged_folder(
        tagged, tagged / "tags.csv", tagged / "set", classes=("dog", "zebra", "cat", "bicycle")
    )
    assert load_coco_folder(tagged / "set").records[0].tags == (0, 3)
    with pytest.raises(ValueError, match="the tag 'bicycle'"):
        write_tagged_folder(tagged, tagged / "tags.csv", tagged / "other", classes=("dog", "cat"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tags no image"),
        ("a.png\n", ":1: expected file,tag;tag"),
        ("a.png,\n", ":1: expected file,tag;tag"),
        ("a.png,dog\na.png,cat\n", ":2: a.png was tagged before"),
    ],
)
def test_a_bad_tag_file_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "tags.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_tag_file(tmp_path / "tags.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("c.png", None, "not in the folder"), ("c.png", b"x", "no image")],
)
def test_a_missing_or_broken_image_is_named(tagged, name, content, message):
    (tagged / "tags.csv").write_text(f"{name},dog\n")
    if content is not None:
        (tagged / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        write_tagged_folder(tagged, tagged / "tags.csv", tagged / "set")


def _coco_folder(root, names, annotations):
    (root / "images").mkdir(parents=True)
    images = sorted({a["image_id"] for a in annotations})
    for i in images:
        Image.new("RGB", (16, 16)).save(root / "images" / f"{i}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 16, "width": 16} for i in images],
        "annotations": [{"id": k, "bbox": [1, 2, 3, 4], **a} for k, a in enumerate(annotations)],
        "categories": [{"id": i, "name": name} for i, name in names.items()],
    }
    (root / "instances.json").write_text(json.dumps(content))
    return root


def test_joined_folders_share_classes_by_name(tmp_path):
    first = _coco_folder(
        tmp_path / "a",
        {3: "dog", 4: "car"},
        [{"image_id": 1, "category_id": 3}, {"image_id": 2, "category_id": 4}],
    )
    second = _coco_folder(
        tmp_path / "b",
        {1: "cat", 2: "dog"},
        [{"image_id": 1, "category_id": 2}, {"image_id": 7, "category_id": 1}],
    )
    merge_data((first, second), tmp_path / "out", classes=("cat", "dog"))
    folder = load_coco_folder(tmp_path / "out")
    assert {r.path.name: r.tags for r in folder.records} == {
        "0_1.png": (1,), "1_1.png": (1,), "1_7.png": (0,),
    }  # fmt: skip
    assert folder.records[0].boxes.tolist() == [[1, 2, 4, 6]]
    assert folder.records[0].image().shape == (16, 16, 3)
    merge_data((first, second), tmp_path / "less", classes=("dog",), exclude=(second,))
    assert load_coco_folder(tmp_path / "less").records == ()
    merge_data((first, second), tmp_path / "rest", classes=("dog",), negatives=True)
    rest = load_coco_folder(tmp_path / "rest")
    assert {r.path.name: r.tags for r in rest.records} == {"0_2.png": (), "1_7.png": ()}
    with pytest.raises(ValueError, match="no folder has the class 'zebra'"):
        merge_data((first,), tmp_path / "none", classes=("zebra",))


def test_tagged_files_that_are_no_images_can_be_left_out_and_listed(tagged):
    (tagged / "b.png").write_text("no image")
    with (tagged / "tags.csv").open("a") as file:
        file.write("lost.png,dog\n")
    with pytest.raises(ValueError, match=r"b\.png is no image"):
        write_tagged_folder(tagged, tagged / "tags.csv", tagged / "set")
    write_tagged_folder(tagged, tagged / "tags.csv", tagged / "set", skip_bad=True)
    names = [record.path.name for record in load_coco_folder(tagged / "set").records]
    assert names == ["a.png"]
    skipped = json.loads((tagged / "set" / "skipped.json").read_text())
    assert list(skipped) == ["b.png", "lost.png"]
    assert "not in the folder" in skipped["lost.png"]
