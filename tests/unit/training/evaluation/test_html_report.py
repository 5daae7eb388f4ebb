import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from training.data.coco import load_coco_folder
from training.evaluate import write_report
from training.evaluation.examples import ImageQuality, choose_examples, image_quality
from weaksam_rt.files import write_json
from weaksam_rt.types import Detections

_CAT = "<script>alert('cat')</script>"
_BOX = [10.0, 10.0, 40.0, 40.0]


class _Tags(HTMLParser):
    """Collects the tags of a page and the addresses that it would load."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def _found(box, score, label=0, size=(60, 80)):
    return Detections(
        boxes=np.array([box], np.float32),
        scores=np.array([score], np.float32),
        labels=np.array([label], np.int64),
        image_size=size,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data & <more>")
    (root / "images").mkdir()
    images, annotations = [], []
    for image_id in range(1, 5):
        name = f"{image_id}<b>.png"
        Image.new("RGB", (80, 60), (20 * image_id, 80, 90)).save(root / "images" / name)
        images.append({"id": image_id, "file_name": name, "height": 60, "width": 80})
        annotations.append(
            {"id": image_id, "image_id": image_id, "category_id": 1, "bbox": [10, 10, 30, 30]}
        )
    categories = [{"id": 1, "name": _CAT}, {"id": 2, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(root / "instances.json", content)
    return load_coco_folder(root)


@pytest.fixture(scope="module")
def detections():
    return {
        1: _found(_BOX, 0.9),
        2: _found([50, 0, 79, 20], 0.8),
        3: _found(_BOX, 0.7, label=1),
        4: _found(_BOX, 0.6),
    }


def test_the_page_needs_no_other_file_and_runs_no_script(folder, detections, tmp_path):
    write_report(tmp_path, folder, detections)
    page = _Tags()
    page.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert len(page.addresses) == page.tags.count("img") == 4
    for address in page.addresses:
        prefix, data = address.split(",", 1)
        assert prefix == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).format == "JPEG"


def test_names_of_users_are_text(folder, detections, tmp_path):
    write_report(tmp_path, folder, detections)
    page = _Tags()
    page.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "b" not in page.tags
    assert page.text.count(_CAT) == 3  # classes, and both sides of the confusion matrix
    assert any("1<b>.png: 1 right, 0 wrong, 0 missed" in text for text in page.text)


def test_the_page_has_the_figures_of_the_report(folder, detections, tmp_path):
    report = write_report(tmp_path, folder, detections)
    assert report["errors"]["background"]["count"] == 1
    assert report["errors"]["classification"]["count"] == 1
    assert report["confusion"] == [[2, 1, 1], [0, 0, 0], [1, 0, 0]]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page)
    assert f"{100 * report['voc_ap50']:.1f}" in cells
    assert "lies on nothing" in cells
    assert "-100.0" not in page  # COCO's sign for "no objects of this size"


def test_the_best_and_the_worst_images_are_different_ones(folder, detections):
    examples = choose_examples(folder, detections, count=8, score_thresh=0.3)
    assert examples.best == (0, 3)
    assert examples.worst == (1, 2)
    few = choose_examples(folder, detections, count=1, score_thresh=0.3)
    assert (few.best, few.worst) == ((0,), (1,))


def test_unsure_detections_do_not_count(folder, detections):
    record = folder.records[0]
    quality = image_quality(record, detections[1], score_thresh=0.95)
    assert quality == ImageQuality(num_right=0, num_wrong=0, num_missed=1)
    assert quality.f1 == 0.0


def test_quality_is_the_harmonic_mean_of_precision_and_recall():
    assert ImageQuality(num_right=2, num_wrong=1, num_missed=3).f1 == pytest.approx(
        2 / (3 / 2 + 5 / 2)
    )
    assert np.isnan(ImageQuality(num_right=0, num_wrong=0, num_missed=0).f1)


def test_a_set_without_images_gives_a_page(folder, tmp_path):
    write_json(tmp_path / "instances.json", {"images": [], "annotations": [], "categories": []})
    write_report(tmp_path / "out", load_coco_folder(tmp_path), {})
    assert "0 images" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
