from pathlib import Path

import numpy as np
import pytest

from training.data.coco import CocoFolder, ImageRecord
from training.evaluation.sam_quality import (
    PromptedIou,
    SamQualityConfig,
    disc,
    evaluate_folder,
    filled_box,
    mask_iou,
    median_radius,
    report,
)
from training.models.sam import CompactEncoderConfig, SamConfig, build_sam


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CocoFolder:
    """Two images with a square of 20 and a rectangle of 10x5 pixels."""
    records = []
    for i, (w, h) in enumerate([(20, 20), (10, 5)]):
        corners = [8, 6, 8 + w, 6, 8 + w, 6 + h, 8, 6 + h]
        records.append(
            ImageRecord(
                image_id=i,
                path=tmp_path / f"{i}.png",
                image_size=(40, 50),
                boxes=np.array([[8, 6, 8 + w, 6 + h]], dtype=np.float32),
                labels=np.zeros(1, dtype=np.int64),
                is_crowd=np.zeros(1, dtype=bool),
                segmentations=([corners],),
            )
        )
    pixels = np.full((40, 50, 3), 128, dtype=np.uint8)
    monkeypatch.setattr(ImageRecord, "image", lambda _: pixels)
    return CocoFolder(
        root=tmp_path, class_names=("thing",), category_ids=(1,), records=tuple(records)
    )


def test_every_object_is_measured_once_per_prompt(folder: CocoFolder, tmp_path: Path) -> None:
    sam = build_sam(
        SamConfig(
            encoder=CompactEncoderConfig(width=16),
            image_size=64,
            embed_dim=32,
            num_heads=2,
            mlp_dim=48,
        )
    )
    config = SamQualityConfig(weights=tmp_path, data=())

    found = evaluate_folder(sam, folder, 0.1, config)

    assert set(found) == {"point", "box"}
    for iou in found.values():
        assert len(iou.best) == 2
        assert (iou.chosen <= iou.best).all()
    assert found["box"].baseline.tolist() == [1, 1]  # the objects are their boxes


def test_the_disc_has_the_median_area_of_the_training_objects(folder: CocoFolder) -> None:
    radii = [np.sqrt(area / np.pi) / 50 for area in (400, 50)]

    assert median_radius(folder) == pytest.approx(np.mean(radii), rel=0.05)


def test_a_disc_is_cut_at_the_border() -> None:
    inside = disc((10, 20), np.array([0, 5], dtype=np.float32), 3.0)

    assert inside[5, :4].all()
    assert not inside[5, 4:].any()
    assert inside[2, 0]
    assert not inside[2, 1]


def test_a_box_fills_the_pixels_between_its_borders() -> None:
    assert filled_box((6, 8), np.array([1, 2, 4, 3], dtype=np.float32)).sum() == 3


def test_iou_of_known_masks() -> None:
    left, right = np.zeros((2, 4, 4), dtype=bool)
    left[:, :3], right[:, 1:] = True, True

    assert mask_iou(np.stack([left, right, ~left]), left).tolist() == [1, 0.5, 0]
    assert mask_iou(np.zeros((4, 4), dtype=bool), np.zeros((4, 4), dtype=bool)) == 0


def test_the_report_says_how_it_was_made() -> None:
    half = np.array([0.25, 0.75])
    iou = PromptedIou(single=half, chosen=half, best=half, baseline=half)

    text = report({"set/val": {"point": iou}}, command="python -m x", facts={"commit": "abc"})

    assert "`python -m x`" in text
    assert "- commit: abc" in text
    assert "| set/val | 2 | point | 50.0 | 50.0 | 50.0 | 50.0 |" in text
