import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO

from weaksam_rt.boxes import box_iou
from weaksam_rt.coco_output import LabelledImage, coco_dataset
from weaksam_rt.drawing import PALETTE, caption_places, draw_instances
from weaksam_rt.masks import encode_rle
from weaksam_rt.types import Detections, InstanceMasks


def _detections(with_masks=False):
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 10:20, 5:25] = True
    masks[1, 0:5, 0:5] = True
    return Detections(
        boxes=np.array([[5, 10, 25, 20], [0, 0, 5, 5]], np.float32),
        scores=np.array([0.9, 0.4], np.float32),
        labels=np.array([3, 0]),
        image_size=(40, 60),
        masks=InstanceMasks(rle_counts=encode_rle(masks), image_size=(40, 60)) if with_masks else
        None,
    )  # fmt: skip


def test_the_output_is_read_by_pycocotools(tmp_path, capsys):
    image = LabelledImage(
        file_name="a.jpg", detections=_detections(with_masks=True), label_names=("dog", "cat")
    )
    empty = LabelledImage(file_name="b.jpg", detections=Detections.empty((10, 10)), label_names=())
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(coco_dataset([image, empty])))
    coco = COCO(str(path))
    capsys.readouterr()
    assert [c["name"] for c in coco.loadCats([1, 4])] == ["cat", "dog"]
    (dog,) = coco.loadAnns(coco.getAnnIds(catIds=[4]))
    assert dog["bbox"] == [5, 10, 20, 10]
    assert dog["score"] == 0.9
    assert coco.annToMask(dog).sum() == 200
    assert coco.getAnnIds(imgIds=[2]) == []


def test_boxes_and_masks_are_drawn_in_the_color_of_their_class():
    black = np.zeros((40, 60, 3), np.uint8)
    drawn = np.asarray(draw_instances(black, _detections().boxes, ["", ""], [3, 0]))
    assert tuple(drawn[10, 15]) == PALETTE[3]
    assert drawn[15, 15].sum() == 0
    masks = _detections(with_masks=True).masks
    filled = np.asarray(draw_instances(black, _detections().boxes, ["dog 0.9", ""], [3, 0], masks))
    assert filled[15, 15].sum() > 0
    assert black.sum() == 0


def test_nothing_found_leaves_the_picture_as_it_is():
    image = np.full((8, 8, 3), 9, np.uint8)
    drawn = draw_instances(image, np.zeros((0, 4), np.float32), [], [])
    np.testing.assert_array_equal(np.asarray(drawn), image)


def test_captions_of_boxes_at_one_place_do_not_cover_each_other():
    boxes = np.array([[30, 30, 90, 80]] * 4, np.float32)
    sizes = [(50.0, 12.0)] * 4
    places = np.array(caption_places(boxes, sizes, (120, 100)))
    assert places[0].tolist() == [30, 18]
    corners = np.concatenate([places, places + sizes[0]], axis=1).astype(np.float32)
    assert (box_iou(corners, corners) - np.eye(4)).max() <= 0


@given(st.integers(0, 2**32 - 1), st.integers(0, 30))
def test_captions_stay_in_the_picture(seed, num):
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(-50, 150, (num, 4)).astype(np.float32)
    sizes = [tuple(size) for size in rng.uniform(5, 60, (num, 2)).tolist()]
    for (x, y), (width, height) in zip(caption_places(boxes, sizes, (70, 65)), sizes, strict=True):
        assert 0 <= x <= x + width <= 70 + 1e-6
        assert 0 <= y <= y + height <= 65 + 1e-6
