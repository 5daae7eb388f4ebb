"""Numbers by which engines are judged: agreement with float32 and the task metric."""

import numpy as np
import pytest
from PIL import Image

from export.agreement import agreement, on_average, prompt_agreement, worst
from export.task_metrics import (
    classifier_tag_ap,
    detector_ap50,
    image_inputs,
    sam_mask_iou,
    spread,
)
from training.data.coco import CocoFolder, ImageRecord
from weaksam_rt.contracts import (
    DETECTOR,
    SAM_IMAGE_ENCODER,
    SAM_MASK_DECODER,
    DetectorParameters,
    SamParameters,
    VitClassifierParameters,
)
from weaksam_rt.preprocessing import longest_side_frame

_DETECTOR = DetectorParameters(image_size=32, num_candidates=3, class_names=("z", "b", "a"))
_SAM = SamParameters(image_size=32, embedding_size=4, embedding_dim=2)
_SIZE = (20, 40)
_BOX = np.array([8, 4, 24, 16], np.float32)


@pytest.fixture
def folder(tmp_path):
    """Three pictures, each with one object of class a that fills ``_BOX``."""
    left, top, right, bottom = (int(v) for v in _BOX)
    outline = [[left, top, right, top, right, bottom, left, bottom]]
    records = []
    for i in range(3):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", _SIZE[::-1], (i, i, i)).save(path)
        records.append(
            ImageRecord(
                image_id=i,
                path=path,
                image_size=_SIZE,
                boxes=_BOX[None],
                labels=np.zeros(1, np.int64),
                is_crowd=np.zeros(1, bool),
                segmentations=(outline,),
            )
        )
    return CocoFolder(
        root=tmp_path, class_names=("a", "b"), category_ids=(1, 2), records=tuple(records)
    )


def _detections(order=(0, 1, 2)):
    boxes = np.array([[0, 0, 10, 10], [5, 5, 20, 20], [1, 2, 30, 30]], np.float32)
    scores, labels = np.array([0.9, 0.5, 0.4], np.float32), np.array([0, 1, 1], np.int32)
    order = list(order)
    return {
        "boxes": boxes[order][None],
        "scores": scores[order][None],
        "labels": labels[order][None],
    }


def test_candidates_that_swap_places_agree_all_the_same():
    found = agreement(DETECTOR, _detections(), _detections((0, 2, 1)))
    assert found.distance == pytest.approx(0, abs=1e-6)
    assert found.max_error > 0.1


def test_a_box_of_another_class_or_place_is_lost():
    other = _detections()
    other["labels"] = other["labels"] * 0
    lost = agreement(DETECTOR, _detections(), other).distance
    assert 0.3 < lost <= 1
    moved = _detections()
    moved["boxes"] = moved["boxes"] + 100
    assert agreement(DETECTOR, _detections(), moved).distance == pytest.approx(1)


def test_a_box_without_area_agrees_with_itself():
    empty = _detections()
    empty["boxes"][..., 2:] = empty["boxes"][..., :2]
    assert agreement(DETECTOR, empty, empty).distance == pytest.approx(0, abs=1e-6)


def _with_masks(detections, order=(0, 1, 2)):
    """Each candidate has a mask of its own: one, two and no rows of four."""
    logits = np.full((3, 4, 4), -1, np.float32)
    logits[0, :1], logits[1, :2] = 1, 1
    return {**detections, "mask_logits": logits[list(order)][None]}


def test_masks_are_compared_with_those_of_the_partners():
    expected = _with_masks(_detections())
    swapped = _with_masks(_detections((0, 2, 1)), (0, 2, 1))
    assert agreement(DETECTOR, expected, swapped).distance == pytest.approx(0, abs=1e-6)
    rounded = {**expected, "mask_logits": expected["mask_logits"] * 0.9}
    assert agreement(DETECTOR, expected, rounded).distance == pytest.approx(0, abs=1e-6)
    inverted = {**expected, "mask_logits": -expected["mask_logits"]}
    assert agreement(DETECTOR, expected, inverted).distance == pytest.approx(1)
    elsewhere = {**inverted, "boxes": inverted["boxes"] + 100}
    assert agreement(DETECTOR, expected, elsewhere).distance == pytest.approx(1)
    displaced = _with_masks(_detections(), (1, 1, 2))  # a mask of two rows for one
    assert agreement(DETECTOR, expected, displaced).distance == pytest.approx(1 / 6, abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_agrees(bad):
    found = agreement("sam", {"y": np.ones(3, np.float32)}, {"y": np.array([1, bad, 1])})
    assert (found.finite, found.cosine, found.distance) == (False, -1.0, np.inf)


def test_equal_answers_are_at_no_distance_and_zeros_at_the_whole():
    one = {"y": np.array([1.0, -2.0])}
    same, zero = agreement("sam", one, one), agreement("sam", one, {"y": np.zeros(2)})
    assert (same.distance, same.cosine, same.max_error) == (0.0, pytest.approx(1.0), 0.0)
    assert (zero.distance, zero.cosine) == (1.0, 0.0)
    both = worst([same, zero])
    assert (both.distance, both.cosine, both.max_error) == (1.0, 0.0, 1.0)
    both = on_average([same, zero])
    assert (both.distance, both.cosine, both.max_error) == (0.5, 0.0, 1.0)


def test_ap50_counts_only_classes_that_the_folder_has(folder):
    inside = longest_side_frame(_SIZE, 32).to_model(_BOX)

    def oracle(inputs, outputs):
        assert inputs["image"].shape == (1, 32, 32, 3)
        boxes = np.stack([inside, inside + 8, inside])[None]
        # "z" is unknown to the folder, "b" is known and not there, "a" is right.
        return {
            "boxes": boxes,
            "scores": np.array([[0.9, 0.6, 0.5]], np.float32),
            "labels": np.array([[0, 1, 2]], np.int32),
        }

    def blind(inputs, outputs):
        answer = oracle(inputs, outputs)
        return {**answer, "labels": answer["labels"] * 0}

    assert detector_ap50(oracle, _DETECTOR, folder)["AP50"] == pytest.approx(1)
    assert detector_ap50(blind, _DETECTOR, folder)["AP50"] == 0


def test_mask_iou_is_one_for_the_true_masks(folder):
    frame = longest_side_frame(_SIZE, 32)
    left, top, right, bottom = (frame.to_model(_BOX) / 2).round().astype(int)

    def encoder(inputs, outputs):
        assert set(inputs) == {"image", "valid_size"}
        return {"image_embeddings": np.zeros((1, 2, 4, 4), np.float32)}

    def decoder(inputs, outputs):
        assert inputs["point_labels"].tolist() == [[1, -1], [2, 3]]
        logits = np.full((2, 4, 16, 16), -5, np.float32)
        logits[0, 0, top:bottom, left:right] = 5  # the point finds it, the box nothing
        return {"low_res_logits": logits, "iou_predictions": np.ones((2, 4), np.float32)}

    found = sam_mask_iou(encoder, decoder, _SAM, folder)
    assert found["mask IoU (point)"] > 0.8
    assert found["mask IoU (box)"] == 0


def test_inputs_of_image_models_are_a_batch_of_one(folder):
    record = folder.records[0]
    assert image_inputs(DETECTOR, _DETECTOR, record)["image"].shape == (1, 32, 32, 3)
    encoder = image_inputs(SAM_IMAGE_ENCODER, _SAM, record)
    assert encoder["valid_size"].tolist() == [[16, 32]]
    with pytest.raises(ValueError, match="does not read images"):
        image_inputs(SAM_MASK_DECODER, _SAM, record)


def test_spread_keeps_the_ends(folder):
    assert [r.image_id for r in spread(folder, 2).records] == [0, 2]
    assert spread(folder, 9) is folder


_CLASSIFIER = VitClassifierParameters(
    image_size=32, map_size=6, num_cross_maps=1, class_names=("b", "z", "a")
)


def test_tags_are_ranked_by_name_and_an_unknown_class_counts_as_missed(folder):
    """Three pictures of class a; the classifier says it of the brightest."""

    def run(inputs, outputs=None):
        assert outputs == ["logits"]
        surest = float(inputs["image"].max())
        return {"logits": np.array([[9.0, 9.0, surest]], np.float32)}

    assert classifier_tag_ap(run, _CLASSIFIER, folder) == {"tag AP": 1.0}
    blind = VitClassifierParameters(
        image_size=32, map_size=6, num_cross_maps=1, class_names=("b", "z", "c")
    )
    assert classifier_tag_ap(run, blind, folder) == {"tag AP": 0.0}
    nothing = CocoFolder(
        root=folder.root, class_names=("c",), category_ids=(3,),
        records=tuple(_without_tags(record) for record in folder.records),
    )  # fmt: skip
    with pytest.raises(ValueError, match="has a tag"):
        classifier_tag_ap(run, _CLASSIFIER, nothing)


def _without_tags(record):
    return ImageRecord(
        image_id=record.image_id, path=record.path, image_size=record.image_size,
        boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, np.int64),
        is_crowd=np.zeros(0, bool), segmentations=(),
    )  # fmt: skip


def _maps(peaks, logits=(1.0, -3.0)):
    """An answer of the classifier with one peak of its first class in each map."""
    maps = np.zeros((1, 2, 6, 6), np.float32)
    for row, column in peaks:
        maps[0, 0, row, column] = 1
    return {
        "logits": np.array([logits], np.float32),
        "coarse_maps": maps,
        "fine_maps": maps,
        "cross_maps": maps[:, None],
    }


def test_prompts_that_both_answers_give_are_common():
    one = _maps([(1, 1)])
    assert prompt_agreement(one, one) == 1.0
    assert prompt_agreement(one, _maps([(4, 4)])) == 0.0
    assert 0 < prompt_agreement(one, _maps([(1, 1), (4, 4)])) < 1
    unseen = _maps([(1, 1)], logits=(-3.0, -3.0))
    assert prompt_agreement(one, unseen) == 0.0
    assert prompt_agreement(unseen, unseen) == 1.0
