import dataclasses
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.unit.training.evaluation.hand_made import SIZE as _SIZE
from tests.unit.training.evaluation.hand_made import detections_of as _detections
from tests.unit.training.evaluation.hand_made import folder_of as _folder
from tests.unit.training.evaluation.hand_made import record as _record
from training.evaluate import evaluate, markdown, summary
from training.evaluation.coco_ap import METRICS, coco_ap, coco_results, coco_truth
from training.evaluation.corloc import corloc
from training.evaluation.examples import choose_examples
from training.evaluation.html_report import html_page
from training.evaluation.recall import greedy_matches, proposal_recall
from training.evaluation.voc_ap import ap_11_point, ap_all_point, voc_ap
from weaksam_rt.masks import encode_rle
from weaksam_rt.types import InstanceMasks, Proposals

_A, _B, _ELSEWHERE = [0, 0, 20, 20], [50, 50, 90, 90], [60, 0, 80, 20]


def test_average_precision_of_a_hand_made_curve():
    recall, precision = np.array([0.5, 0.5, 1.0]), np.array([1.0, 0.5, 2 / 3])
    assert ap_all_point(recall, precision) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert ap_11_point(recall, precision) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_a_second_detection_of_the_same_object_is_wrong():
    folder = _folder(_record([_A, _B], [0, 0]))
    twice = _detections([_A, _A, _B], [0.9, 0.8, 0.7], [0, 0, 0])
    found = voc_ap(folder, {1: twice}).by_class[0]
    assert found.ap_all_point == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found.num_truth == 2


def test_a_detection_on_a_crowd_is_neither_right_nor_wrong():
    folder = _folder(_record([_A, _B], [0, 0], [True, False]))
    found = voc_ap(folder, {1: _detections([_A, _B], [0.9, 0.8], [0, 0])}).by_class[0]
    assert (found.ap_all_point, found.num_truth) == (1.0, 1)


def test_a_class_without_objects_does_not_enter_the_mean():
    folder = _folder(_record([_A], [0]))
    found = voc_ap(folder, {1: _detections([_A, _B], [0.9, 0.8], [0, 1])})
    assert np.isnan(found.by_class[1].ap_all_point)
    assert found.mean_all_point == 1.0


def test_nothing_found_scores_zero_and_nothing_to_find_is_undefined():
    folder = _folder(_record([_A], [0]), _record([], [], image_id=2))
    assert voc_ap(folder, {}).mean_all_point == 0.0
    assert np.isnan(voc_ap(_folder(), {}).mean_all_point)


def test_corloc_looks_at_the_best_box_of_each_present_class_only():
    folder = _folder(
        _record([_A, _B], [0, 1]), _record([_A], [0], image_id=2), _record([_A], [0], image_id=3)
    )
    found = {
        1: _detections([_A, _ELSEWHERE, _B], [0.9, 0.8, 0.7], [0, 1, 1]),
        2: _detections([_ELSEWHERE, _A], [0.9, 0.8], [1, 0]),
    }
    result = corloc(folder, found)
    assert result.by_class == (pytest.approx(2 / 3), 0.0)
    assert result.mean == pytest.approx(1 / 3)


def test_a_proposal_serves_one_object_only():
    iou = np.array([[0.9, 0.4], [0.8, 0.0], [0.3, 0.35]], np.float32)
    assert greedy_matches(iou).tolist() == pytest.approx([0.9, 0.0, 0.35])


def test_images_without_proposals_lower_the_recall():
    folder = _folder(_record([_A], [0]), _record([_B], [1], image_id=2))
    boxes = np.array([_A, _ELSEWHERE], np.float32)
    proposals = Proposals(
        boxes=boxes, scores=np.ones(2, np.float32), sources=np.zeros(2, np.int32), image_size=_SIZE
    )
    result = proposal_recall(folder, {1: proposals})
    assert result.recall == {0.5: 0.5, 0.6: 0.5, 0.75: 0.5, 0.9: 0.5}
    assert (result.num_truth, result.mean_proposals) == (2, 1.0)


def _random_case(seed):
    rng = np.random.default_rng(seed)
    records, found = [], {}
    for image_id in range(1, 9):
        corners = rng.uniform(0, 60, (rng.integers(1, 5), 2))
        boxes = np.concatenate([corners, corners + rng.uniform(10, 40, corners.shape)], axis=1)
        labels = rng.integers(0, 2, len(boxes))
        records.append(_record(boxes, labels, rng.random(len(boxes)) < 0.1, image_id))
        noisy = np.repeat(boxes, 2, axis=0)
        noisy = (noisy + rng.normal(0, 2, noisy.shape)).astype(np.float32)
        scores = rng.permutation(len(noisy)) / len(noisy) + rng.uniform(0, 1e-3)
        found[image_id] = _detections(noisy, scores, np.repeat(labels, 2))
    return _folder(*records), found


def _assert_same_stats(summary, stats):
    """pycocotools says -1 where there are no objects of a size."""
    expected = np.where(stats[:6] < 0, np.nan, stats[:6])
    np.testing.assert_allclose([summary[m] for m in METRICS], expected, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_coco_ap_equals_pycocotools(seed):
    folder, found = _random_case(seed)
    api = COCO()
    api.dataset = coco_truth(folder)
    api.createIndex()
    reference = COCOeval(api, api.loadRes(coco_results(found)), "bbox")
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    ours = coco_ap(folder, found)
    assert 0.1 < ours.summary["AP"] < 1
    _assert_same_stats(ours.summary, reference.stats)
    # [threshold, recall, class, area, limit]: all areas, 100 boxes
    by_class = reference.eval["precision"][:, :, :, 0, 2].mean(axis=(0, 1))
    np.testing.assert_allclose(ours.by_class, by_class, atol=1e-6)
    assert np.mean(ours.by_class) == pytest.approx(ours.summary["AP"])


def test_without_detections_coco_ap_is_zero():
    folder, _ = _random_case(0)
    nothing = coco_ap(folder, {})
    assert nothing.summary == dict.fromkeys(METRICS, 0.0)
    assert nothing.by_class == (0.0, 0.0)


def test_a_class_without_objects_has_no_coco_ap():
    folder = _folder(_record([_A], [0]))
    for found in ({}, {1: _detections([_A, _B], [0.9, 0.8], [0, 1])}):
        by_class = coco_ap(folder, found).by_class
        assert by_class[0] == (1.0 if found else 0.0)
        assert np.isnan(by_class[1])


def test_the_report_has_json_values_only_and_a_table_row_per_class():
    folder = _folder(_record([_A], [0]))
    report = evaluate(folder, {1: _detections([_A], [0.9], [0])})
    assert report["voc_ap50"] == 1.0
    assert report["by_class"]["dog"]["ap_all_point"] is None
    page = markdown(report, title="T")
    assert "| cat | 100.0 | 100.0 | 100.0 | 100.0 | 1 | 1 |" in page
    assert "| dog | - | - | - | - | 0 | 0 |" in page


def _tagged(image_id, *tags):
    return dataclasses.replace(_record([], [], image_id=image_id), given_tags=tags)


def test_without_known_boxes_nothing_is_measured_and_the_pages_say_so():
    folder = _folder(_tagged(1, 0), _tagged(2, 0, 1))
    found = {1: _detections([_A, _B], [0.9, 0.8], [0, 1])}
    report = evaluate(folder, found)
    assert set(summary(report).values()) == {None}
    assert set(report["coco"].values()) == {None}
    assert (report["errors"], report["confusion"]) == ({}, None)
    assert report["by_class"]["cat"]["num_detections"] == 1
    json.dumps(report, allow_nan=False)
    pages = (
        markdown(report, title="T"),
        html_page(report, title="T", class_names=folder.class_names, best=[], worst=[]),
    )
    for page in pages:
        assert "tags and no boxes" in page
        assert "-100" not in page
    examples = choose_examples(folder, found, count=2, score_thresh=0.3)
    assert (examples.best, examples.worst) == ((), ())


def test_images_with_tags_alone_count_nowhere_beside_others_with_boxes():
    boxed, found = _folder(_record([_A], [0])), _detections([_A, _B], [0.9, 0.95], [0, 0])
    mixed = _folder(_record([_A], [0]), _tagged(2, 0))
    alone, both = evaluate(boxed, {1: found}), evaluate(mixed, {1: found, 2: found})
    assert (both["num_images"], both["num_images_without_boxes"]) == (2, 1)
    for key in ("voc_ap50", "corloc", "coco", "by_class", "errors", "confusion"):
        assert both[key] == alone[key]
    assert "1 images have tags and no boxes" in markdown(both, title="T")


def _masked(found, rng=None):
    """Detections with the ellipses of their boxes as masks, some pixels missing."""
    masks = _ellipses(found.boxes)
    if rng is not None:
        masks &= rng.random(masks.shape) > 0.1
    instances = InstanceMasks(rle_counts=encode_rle(masks), image_size=_SIZE)
    return dataclasses.replace(found, masks=instances)


def _ellipses(boxes):
    ys, xs = np.mgrid[: _SIZE[0], : _SIZE[1]] + 0.5
    centres, radii = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    x = (xs - centres[:, 0, None, None]) / radii[:, 0, None, None]
    y = (ys - centres[:, 1, None, None]) / radii[:, 1, None, None]
    return x**2 + y**2 <= 1


def _with_true_masks(folder):
    return dataclasses.replace(
        folder,
        records=tuple(
            dataclasses.replace(
                record,
                segmentations=tuple(
                    {"size": list(_SIZE), "counts": counts}
                    for counts in encode_rle(_ellipses(record.boxes))
                ),
            )
            for record in folder.records
        ),
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_coco_ap_of_masks_equals_pycocotools(seed):
    folder, found = _random_case(seed)
    folder, rng = _with_true_masks(folder), np.random.default_rng(seed)
    found = {image_id: _masked(of_image, rng) for image_id, of_image in found.items()}
    api = COCO()
    api.dataset = coco_truth(folder, shape="mask")
    api.createIndex()
    reference = COCOeval(api, api.loadRes(coco_results(found, shape="mask")), "segm")
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    ours = coco_ap(folder, found, shape="mask")
    assert 0.05 < ours.summary["AP"] < 1
    assert ours.summary["AP"] != coco_ap(folder, found).summary["AP"]
    _assert_same_stats(ours.summary, reference.stats)


def test_masks_are_right_by_their_own_overlap_whatever_their_boxes():
    folder = _with_true_masks(_folder(_record([_A, _B], [0, 0])))
    half = _ellipses(np.array([_A, _B], np.float32))
    half[1, 70:] = False  # half of the second object
    found = dataclasses.replace(
        _detections([_ELSEWHERE, _B], [0.9, 0.8], [0, 0]),
        masks=InstanceMasks(rle_counts=encode_rle(half), image_size=_SIZE),
    )
    assert voc_ap(folder, {1: found}).by_class[0].ap_all_point == pytest.approx(0.25)
    by_thresh = [
        voc_ap(folder, {1: found}, iou_thresh=t, shape="mask").by_class[0].ap_all_point
        for t in (0.25, 0.49, 0.7)
    ]
    assert by_thresh == pytest.approx([1.0, 1.0, 0.5])


def test_a_mask_of_another_class_is_not_compared():
    folder = _with_true_masks(_folder(_record([_A], [0])))
    found = _masked(_detections([_A], [0.9], [1]))
    assert voc_ap(folder, {1: found}, shape="mask").by_class[0].ap_all_point == 0.0


def test_masks_cannot_be_compared_without_masks():
    folder, found = _random_case(0)
    with pytest.raises(ValueError, match="masks"):
        voc_ap(_with_true_masks(folder), found, shape="mask")
    masked = {image_id: _masked(of_image) for image_id, of_image in found.items()}
    with pytest.raises(ValueError, match="masks"):
        coco_ap(folder, masked, shape="mask")


def test_the_report_has_masks_where_both_sides_have_them():
    folder, found = _random_case(0)
    masked = {image_id: _masked(of_image) for image_id, of_image in found.items()}
    assert "masks" not in evaluate(folder, masked)
    assert "masks" not in evaluate(_with_true_masks(folder), found)
    report = evaluate(_with_true_masks(folder), masked)
    assert list(report["masks"]["voc"]) == ["AP25", "AP50", "AP70", "AP75"]
    values = list(report["masks"]["voc"].values())
    assert values == sorted(values, reverse=True)
    assert summary(report)["mask_ap50"] == report["masks"]["voc"]["AP50"]
    assert "mask_ap50" not in summary(evaluate(folder, found))
    page = markdown(report, title="T")
    assert "| class, by masks | AP25 | AP50 | AP70 | AP75 | COCO AP |" in page
    assert "Masks</h2>" in html_page(
        report, title="T", class_names=("cat", "dog"), best=[], worst=[]
    )
