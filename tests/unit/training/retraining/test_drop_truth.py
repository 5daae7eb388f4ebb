import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from training.data.views import TrueBoxes
from training.retraining.drop_truth import RoiTruth, drop_counts, drop_report, judge_rois
from training.retraining.faster_rcnn import SampledRois
from training.retraining.roi_drop import KeptRois, RoiLosses

_OBJECT, _ELSEWHERE = [0.0, 0.0, 20.0, 20.0], [40.0, 40.0, 60.0, 60.0]
_CAT, _DOG = 0, 1


def _truth(boxes, labels):
    return TrueBoxes(
        boxes=np.array(boxes, np.float32).reshape(-1, 4), labels=np.array(labels, np.int64)
    )


def _sampled(boxes, labels, matched):
    return SampledRois(
        boxes=(torch.tensor(boxes),), labels=torch.tensor(labels), matched=torch.tensor(matched)
    )


@pytest.mark.parametrize(
    ("box", "label", "matched", "expected"),
    [
        (_OBJECT, _CAT + 1, _OBJECT, (False, False)),
        (_OBJECT, _DOG + 1, _OBJECT, (True, True)),  # a pseudo box of the wrong class
        (_OBJECT, 0, _OBJECT, (True, False)),  # a missed object taught as background
        (_ELSEWHERE, _CAT + 1, _ELSEWHERE, (True, True)),  # a pseudo box on nothing
        (_ELSEWHERE, 0, _OBJECT, (False, False)),
        ([0.0, 0.0, 20.0, 11.0], _CAT + 1, [0.0, 0.0, 20.0, 6.0], (False, True)),  # box too small
    ],
)
def test_wrong_is_what_the_true_boxes_contradict(box, label, matched, expected):
    truth = judge_rois(_sampled([box], [label], [matched]), [_truth([_OBJECT], [_CAT])])
    assert (truth.label_is_wrong.item(), truth.box_is_wrong.item()) == expected


def test_without_true_boxes_every_foreground_roi_is_wrong():
    sampled = _sampled([_OBJECT, _ELSEWHERE], [_CAT + 1, 0], [_OBJECT, _OBJECT])
    truth = judge_rois(sampled, [_truth([], [])])
    assert truth.label_is_wrong.tolist() == truth.box_is_wrong.tolist() == [True, False]


def _plain_judgement(roi, label, matched, truth):
    best, best_iou = 0, 0.5
    on_object = False
    for box, true_label in zip(truth.boxes, truth.labels, strict=True):
        overlap = float(box_iou(roi[None], torch.from_numpy(box)[None]))
        if overlap >= best_iou and (best == 0 or overlap > best_iou):
            best, best_iou = int(true_label) + 1, overlap
        if true_label + 1 == label:
            on_object |= bool(box_iou(matched[None], torch.from_numpy(box)[None]) >= 0.5)
    return label != best, label > 0 and not on_object


def test_many_rois_of_several_images_equal_the_plain_definition():
    generator = torch.Generator().manual_seed(0)

    def _boxes(count):
        corners = torch.rand(count, 2, generator=generator) * 20
        return torch.cat(
            [corners, corners + 10 + 20 * torch.rand(count, 2, generator=generator)], 1
        )

    counts = (7, 0, 12)
    boxes, matched = tuple(_boxes(count) for count in counts), _boxes(sum(counts))
    labels = torch.randint(0, 3, (sum(counts),), generator=generator)
    truth = [_truth(_boxes(m).numpy(), [i % 2 for i in range(m)]) for m in (3, 2, 4)]
    found = judge_rois(SampledRois(boxes=boxes, labels=labels, matched=matched), truth)
    of_roi = [image for image, count in zip(truth, counts, strict=True) for _ in range(count)]
    expected = [
        _plain_judgement(*parts)
        for parts in zip(torch.cat(boxes), labels.tolist(), matched, of_roi, strict=True)
    ]
    assert found.label_is_wrong.tolist() == [wrong for wrong, _ in expected]
    assert found.box_is_wrong.tolist() == [wrong for _, wrong in expected]


def _step():
    """Background kept and dropped; foreground: kept, class dropped, both dropped."""
    losses = RoiLosses(
        classification=torch.zeros(5),
        regression=torch.zeros(5),
        is_foreground=torch.tensor([False, False, True, True, True]),
    )
    kept = KeptRois(
        classification=torch.tensor([True, False, True, False, False]),
        regression=torch.tensor([True, False, True, True, False]),
    )
    truth = RoiTruth(
        label_is_wrong=torch.tensor([True, False, False, True, True]),
        box_is_wrong=torch.tensor([False, False, True, False, True]),
    )
    return losses, kept, truth


def test_a_run_reports_the_precision_and_recall_of_dropping():
    losses, kept, truth = _step()
    steps = [{"step": 0, "loss": 1.0}, drop_counts(losses, kept, truth)] * 2
    assert drop_report(steps) == {
        "num_steps": 2,
        "classification": {
            "num_rois": 10,
            "num_dropped": 6,
            "evaluation_only": {
                "precision": pytest.approx(2 / 3),
                "recall": pytest.approx(2 / 3),
                "wrong_share": pytest.approx(3 / 5),
            },
        },
        "regression": {
            "num_rois": 6,
            "num_dropped": 2,
            "evaluation_only": {
                "precision": 1.0,
                "recall": 0.5,
                "wrong_share": pytest.approx(2 / 3),
            },
        },
    }


def test_without_truth_only_counts_are_reported():
    losses, kept, _ = _step()
    report = drop_report([drop_counts(losses, kept, None)])
    assert report["classification"] == {"num_rois": 5, "num_dropped": 3, "evaluation_only": None}


def test_dropping_that_never_began_has_no_report_and_nothing_dropped_no_precision():
    assert drop_report([{"step": 0}]) is None
    losses, _, truth = _step()
    everything = torch.ones(5, dtype=torch.bool)
    kept = KeptRois(classification=everything, regression=everything)
    comparison = drop_report([drop_counts(losses, kept, truth)])["regression"]["evaluation_only"]
    assert comparison == {"precision": None, "recall": 0.0, "wrong_share": pytest.approx(2 / 3)}
