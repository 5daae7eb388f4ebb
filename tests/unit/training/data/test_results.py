import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from training.data.coco import CocoFolder, ImageRecord
from training.data.results import (
    read_detections,
    read_proposals,
    write_detections,
    write_proposals,
)
from weaksam_rt.errors import ArtifactError
from weaksam_rt.masks import decode_rle, encode_rle
from weaksam_rt.types import Detections, InstanceMasks, PromptSource, Proposals

_SIZE = (30, 40)


def _record(image_id):
    return ImageRecord(
        image_id=image_id,
        path=Path("x.jpg"),
        image_size=_SIZE,
        boxes=np.zeros((0, 4), np.float32),
        labels=np.zeros(0, np.int64),
        is_crowd=np.zeros(0, bool),
        segmentations=(),
    )


_FOLDER = CocoFolder(
    root=Path("data"),
    class_names=("disc", "star"),
    category_ids=(17, 44),
    records=(_record(5), _record(9)),
)


def _detections(boxes, scores, labels):
    return Detections(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.array(scores, np.float32),
        labels=np.array(labels, np.int64),
        image_size=_SIZE,
    )


def test_detections_come_back_best_first_and_images_without_any_are_empty(tmp_path):
    found = _detections([[0, 0, 10, 10], [1.5, 2, 30, 20]], [0.25, 0.75], [0, 1])
    write_detections(tmp_path / "d.json", {5: found}, folder=_FOLDER)
    again = read_detections(tmp_path / "d.json", folder=_FOLDER)
    assert set(again) == {5, 9}
    np.testing.assert_allclose(again[5].boxes, found.boxes[::-1], atol=1e-3)
    assert again[5].scores.tolist() == [0.75, 0.25]
    assert again[5].labels.tolist() == [1, 0]
    assert len(again[9]) == 0


def test_labels_are_written_as_the_sets_category_ids(tmp_path):
    write_detections(tmp_path / "d.json", {5: _detections([0, 0, 1, 1], [1], [1])}, folder=_FOLDER)
    assert '"category_id": 44' in (tmp_path / "d.json").read_text()


def test_proposals_keep_their_order_and_sources(tmp_path):
    proposals = Proposals(
        boxes=np.array([[0, 0, 4, 4], [1, 1, 9, 9]], np.float32),
        scores=np.array([0.1, 0.9], np.float32),
        sources=np.array([PromptSource.GRID, PromptSource.CROSS], np.int32),
        image_size=_SIZE,
    )
    write_proposals(tmp_path / "p.json", {9: proposals})
    again = read_proposals(tmp_path / "p.json", folder=_FOLDER)
    np.testing.assert_array_equal(again[9].boxes, proposals.boxes)
    np.testing.assert_array_equal(again[9].sources, proposals.sources)
    np.testing.assert_allclose(again[9].scores, proposals.scores, atol=1e-6)
    assert len(again[5]) == 0


def _two_images(tmp_path):
    boxes = np.array([[0, 0, 4, 4], [1, 1, 9, 9]], np.float32)
    of = {
        image_id: Proposals(
            boxes=boxes[:num],
            scores=np.ones(num, np.float32),
            sources=np.ones(num, np.int32),
            image_size=_SIZE,
        )
        for image_id, num in ((5, 2), (9, 1))
    }
    write_proposals(tmp_path / "p.json", iter(of.items()))
    return (tmp_path / "p.json").read_text()


def test_each_line_holds_the_proposals_of_one_image(tmp_path):
    lines = _two_images(tmp_path).splitlines()
    assert [line.count("image_id") for line in lines] == [2, 1]


@pytest.mark.parametrize("layout", [None, 2], ids=["one line", "many lines"])
def test_proposals_are_read_from_any_layout_of_the_array(tmp_path, layout):
    content = json.loads(_two_images(tmp_path))
    assert len(content) == 3
    (tmp_path / "q.json").write_text(json.dumps(content, indent=layout))
    ours = read_proposals(tmp_path / "p.json", folder=_FOLDER)
    other = read_proposals(tmp_path / "q.json", folder=_FOLDER)
    for image_id, num in ((5, 2), (9, 1)):
        assert len(ours[image_id]) == num
        np.testing.assert_array_equal(other[image_id].boxes, ours[image_id].boxes)
    write_proposals(tmp_path / "empty.json", {})
    assert all(
        len(p) == 0 for p in read_proposals(tmp_path / "empty.json", folder=_FOLDER).values()
    )


@pytest.mark.parametrize(
    "content",
    [
        '[{"image_id": 6, "bbox": [0, 0, 1, 1], "score": 1}]',
        '[{"image_id": 5, "bbox": [0, 0, 1, 1], "score": 1},\n{"image_id": 5, "bb',
        '[{"image_id": 5, "bbox": [0, 0, 1], "score": 1}]',
        "[{",
        '{"images": []}',
        "",
    ],
)
def test_damaged_proposals_are_refused(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"p\.json (has 1 images|is not a COCO results file)"):
        read_proposals(tmp_path / "p.json", folder=_FOLDER)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"image_id": 6, "category_id": 17, "bbox": [0, 0, 1, 1], "score": 1}]', "id 6"),
        ('[{"image_id": 5, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}]', r"\[3\]"),
        ("[{", "not a COCO results file"),
        ('{"images": []}', "not a COCO results file"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_reason(tmp_path, content, message):
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(ArtifactError, match=message):
        read_detections(tmp_path / "d.json", folder=_FOLDER)


def test_masks_are_written_and_read_back(tmp_path):
    found = _detections([[0, 0, 10, 10], [1.5, 2, 30, 20]], [0.25, 0.75], [0, 1])
    bits = np.random.default_rng(0).random((2, *_SIZE)) > 0.5
    masks = InstanceMasks(rle_counts=encode_rle(bits), image_size=_SIZE)
    path = tmp_path / "d.json"
    write_detections(path, {5: dataclasses.replace(found, masks=masks)}, folder=_FOLDER)
    again = read_detections(path, folder=_FOLDER)
    np.testing.assert_array_equal(decode_rle(again[5].masks.rle_counts, _SIZE), bits[::-1])
    assert len(again[9].masks) == 0
    entries = json.loads(path.read_text())
    del entries[0]["segmentation"]
    path.write_text(json.dumps(entries))
    with pytest.raises(ArtifactError, match="without a mask"):
        read_detections(path, folder=_FOLDER)
