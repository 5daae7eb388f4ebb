import json

import numpy as np
import pytest
from PIL import Image

from training.data.bad_images import check_image, read_image, usable_images
from training.data.coco import load_coco_folder
from weaksam_rt.files import write_json


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    images = []
    for number in range(4):
        name = f"{number}.jpg"
        pixels = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
        images.append({"id": number, "file_name": name, "height": 40, "width": 60})
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    write_json(tmp_path / "instances.json", content)
    return tmp_path


def _missing(path):
    path.unlink()


def _truncated(path):
    path.write_bytes(path.read_bytes()[:-400])


def _text(path):
    path.write_text("no image")


def _of_another_size(path):
    Image.new("RGB", (61, 40)).save(path)


@pytest.mark.parametrize("spoil", [_missing, _truncated, _text, _of_another_size])
def test_a_bad_image_is_an_error_that_names_it_or_a_listed_skip(root, spoil):
    spoil(root / "images" / "2.jpg")
    folder = load_coco_folder(root)
    with pytest.raises(ValueError, match=r"images/2\.jpg.*--skip-bad"):
        usable_images(folder, skip_bad=False)
    usable = usable_images(folder, skip_bad=True)
    assert [record.path.name for record in usable.folder.records] == ["0.jpg", "1.jpg", "3.jpg"]
    assert list(usable.skipped) == [f"{root.name}/2.jpg"]
    assert str(root / "images" / "2.jpg") in usable.skipped[f"{root.name}/2.jpg"]
    if spoil is not _of_another_size:
        with pytest.raises(ValueError, match=r"cannot read .*images/2\.jpg"):
            folder.records[2].image()


@pytest.mark.parametrize("read", [check_image, read_image])
def test_an_image_of_another_size_than_described_is_named_with_both_sizes(root, read):
    content = json.loads((root / "instances.json").read_text())
    width, height = (content["images"][0][side] for side in ("width", "height"))
    content["images"][0]["height"] = height + 1
    write_json(root / "instances.json", content)
    found, said = f"{width}x{height}", f"{width}x{height + 1}"
    with pytest.raises(ValueError, match=rf"0\.jpg is {found}, .*{said}.*--skip-bad"):
        read(load_coco_folder(root).records[0])


def test_good_images_are_all_used(root):
    folder = load_coco_folder(root)
    usable = usable_images(folder, skip_bad=False)
    assert usable.folder == folder
    assert usable.skipped == {}


@pytest.mark.parametrize("size", [(40, 60), (60, 40)])
def test_a_turned_photograph_may_be_described_either_way(root, size):
    exif = Image.Exif()
    exif[274] = 6
    path = root / "images" / "0.jpg"
    Image.open(path).save(path, exif=exif)
    content = json.loads((root / "instances.json").read_text())
    content["images"][0] |= {"height": size[0], "width": size[1]}
    write_json(root / "instances.json", content)
    check_image(load_coco_folder(root).records[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": [{"id": 7, "image_id": 99, "category_id": 1}]}, "image_id 99"),
        ({"annotations": [{"id": 7, "image_id": 0, "category_id": 5}]}, "category_id 5"),
        ({"categories": []}, "has no class"),
    ],
)
def test_annotations_without_image_or_class_are_named(root, change, message):
    content = json.loads((root / "instances.json").read_text())
    write_json(root / "instances.json", content | change)
    with pytest.raises(ValueError, match=rf"instances\.json.*{message}"):
        load_coco_folder(root, ("cat",))


def test_a_tag_that_is_no_class_is_named_with_its_image(root):
    content = json.loads((root / "instances.json").read_text())
    content["images"][1]["tags"] = ["cat", "unicorn"]
    write_json(root / "instances.json", content)
    with pytest.raises(ValueError, match=r"1\.jpg has the tag 'unicorn'"):
        load_coco_folder(root)


def test_annotations_cut_off_in_the_middle_are_named(root):
    text = (root / "instances.json").read_text()
    (root / "instances.json").write_text(text[:-10])
    with pytest.raises(ValueError, match=r"instances\.json is no JSON"):
        load_coco_folder(root)
