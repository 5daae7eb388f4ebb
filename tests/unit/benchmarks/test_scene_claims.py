import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.label_noise import with_label_noise
from benchmarks.scene_claims import interval_95, interval_text, report, verdict
from training.data.coco import CocoFolder, ImageRecord
from weaksam_rt.boxes import box_iou


def _folder(num_images: int = 400, num_classes: int = 5) -> CocoFolder:
    generator = np.random.default_rng(0)
    records = []
    for image_id in range(num_images):
        corners = generator.uniform(0, 60, (3, 2))
        boxes = np.concatenate([corners, corners + generator.uniform(10, 30, (3, 2))], axis=1)
        records.append(
            ImageRecord(
                image_id=image_id,
                path=Path(f"{image_id}.png"),
                image_size=(100, 120),
                boxes=boxes.astype(np.float32),
                labels=generator.integers(0, num_classes, 3),
                is_crowd=np.zeros(3, bool),
                segmentations=(),
            )
        )
    names = tuple("abcdefgh"[:num_classes])
    ids = tuple(range(num_classes))
    return CocoFolder(
        root=Path("scenes"), class_names=names, category_ids=ids, records=tuple(records)
    )


def _count_wrong(truth: CocoFolder, noisy: CocoFolder) -> tuple[int, int, int]:
    """Renamed, moved and missing boxes."""
    renamed = moved = missing = 0
    for before, after in zip(truth.records, noisy.records, strict=True):
        missing += len(before.boxes) - len(after.boxes)
        overlaps = box_iou(after.boxes, before.boxes)
        for index, label in enumerate(after.labels):
            same_place = np.flatnonzero(overlaps[index] > 0.999)
            moved += len(same_place) == 0
            renamed += len(same_place) > 0 and label not in before.labels[same_place]
    return renamed, moved, missing


class TestLabelNoise:
    def test_no_noise_leaves_the_boxes_alone(self) -> None:
        truth = _folder(20)
        noisy = with_label_noise(truth, 0.0, seed=0)
        for before, after in zip(truth.records, noisy.records, strict=True):
            np.testing.assert_array_equal(before.boxes, after.boxes)
            np.testing.assert_array_equal(before.labels, after.labels)

    def test_the_share_is_met_and_its_kinds_are_equally_frequent(self) -> None:
        truth = _folder()
        kinds = _count_wrong(truth, with_label_noise(truth, 0.3, seed=1))
        assert sum(kinds) / 1200 == pytest.approx(0.3, abs=0.04)
        for count in kinds:
            assert count / sum(kinds) == pytest.approx(1 / 3, abs=0.07)

    def test_every_box_can_be_wrong(self) -> None:
        truth = _folder()
        assert sum(_count_wrong(truth, with_label_noise(truth, 1.0, seed=1))) == 1200

    def test_moved_boxes_keep_their_size_and_stay_in_the_image(self) -> None:
        noisy = with_label_noise(_folder(), 1.0, seed=2)
        for record in noisy.records:
            assert (record.boxes >= 0).all()
            assert (record.boxes[:, 2:] <= np.array([120.01, 100.01])).all()

    def test_a_higher_share_only_adds_wrong_boxes(self) -> None:
        truth = _folder(50)
        low, high = (with_label_noise(truth, share, seed=3) for share in (0.2, 0.5))
        for before, some, more in zip(truth.records, low.records, high.records, strict=True):
            right_in_more = box_iou(before.boxes, more.boxes).max(axis=1, initial=0) > 0.999
            right_in_some = box_iou(before.boxes, some.boxes).max(axis=1, initial=0) > 0.999
            assert (right_in_some | ~right_in_more).all()

    def test_tags_stay_those_of_the_true_boxes(self) -> None:
        truth = _folder(20)
        noisy = with_label_noise(truth, 1.0, seed=0)
        assert [r.tags for r in noisy.records] == [r.tags for r in truth.records]

    @pytest.mark.parametrize("share", [-0.1, 1.1])
    def test_a_share_outside_0_to_1_is_refused(self, share: float) -> None:
        with pytest.raises(ValueError, match=str(share)):
            with_label_noise(_folder(1), share, seed=0)

    def test_one_class_cannot_be_confused(self) -> None:
        with pytest.raises(ValueError, match="at least 2 classes"):
            with_label_noise(_folder(1, num_classes=1), 0.1, seed=0)


class TestIntervals:
    def test_student_interval_of_three_values(self) -> None:
        # Standard deviation 1, standard error 1 / sqrt(3), t(0.975, 2) = 4.30265.
        assert interval_95([1.0, 2.0, 3.0]) == pytest.approx(
            (2.0, 4.30265 / math.sqrt(3)), rel=1e-5
        )

    def test_one_value_has_no_interval(self) -> None:
        assert interval_95([0.5]) == (0.5, math.inf)
        assert interval_text([0.5]) == "50.0"

    @pytest.mark.parametrize(
        ("differences", "expected"),
        [
            ([0.02, 0.021, 0.019], "better"),
            ([-0.02, -0.021, -0.019], "worse"),
            ([0.02, -0.02, 0.01], "undecided"),
            ([0.02], "undecided"),
        ],
    )
    def test_a_verdict_needs_an_interval_beside_0(
        self, differences: list[float], expected: str
    ) -> None:
        assert verdict(differences) == expected


def test_the_report_pairs_seeds_and_leaves_out_unfinished_trials(tmp_path: Path) -> None:
    trials = {
        "drop_0.1_s0": 0.50, "drop_0.1_s1": 0.61, "drop_0.1_s2": 0.70,
        "no_drop_0.1_s0": 0.48, "no_drop_0.1_s1": 0.58,
    }  # fmt: skip
    for name, score in trials.items():
        folder = tmp_path / "noise" / name
        folder.mkdir(parents=True)
        manifest = {"metrics": {"voc_ap50": score}, "outputs": {}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "noise" / "no_drop_0.1_s2").mkdir()  # still running
    report(tmp_path, "command", tmp_path)
    text = (tmp_path / "scene_claims.md").read_text()
    assert "| none, 10% of the boxes wrong | 2 | 53.0" in text
    assert "| RoI drop, 10% of the boxes wrong | 3 | 60.3" in text
    assert "| +2.5 ± 6.4 | undecided |" in text
    assert "Multiple-instance" not in text
