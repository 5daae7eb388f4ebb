"""What a candidate must show before it is published; the real detector in miniature."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from export.__main__ import export_model
from export.refit import RefitError
from export.release import (
    ReleaseRules,
    answer_difference,
    ap50_of_engine,
    build_candidate,
    make_probes,
    measured_ap50,
    release_detector,
    with_ap50,
)
from tests.integration.pictures import BOXES, scene
from tests.integration.tiny_engines import CLASS_NAMES, write_tiny_artifacts
from tests.unit.export.test_refit import ToyDetector, exportable
from training.data.coco import load_coco_folder
from weaksam_rt.artifacts import load_artifact
from weaksam_rt.config import DetectionConfig, PipelineConfig
from weaksam_rt.contracts import DETECTOR
from weaksam_rt.errors import ReleaseError
from weaksam_rt.model_repository import build_model_repository
from weaksam_rt.types import Detections

CONFIG = DetectionConfig()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    return next(a for a in write_tiny_artifacts(folder) if a.model == DETECTOR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two scenes of the tiny engines' world with their true boxes, and a class they do not know."""
    root = tmp_path_factory.mktemp("coco")
    (root / "images").mkdir()
    names = ("blue", "red", "violet")
    images, annotations = [], []
    for number in (1, 2):
        Image.fromarray(scene()).save(root / "images" / f"{number}.png")
        height, width = scene().shape[:2]
        images.append(
            {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
        )
        for name, (x1, y1, x2, y2) in BOXES.items():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": names.index(name) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(content))
    return load_coco_folder(root)


def test_classes_are_matched_by_name(tiny, folder):
    assert folder.class_names != CLASS_NAMES
    assert ap50_of_engine(tiny, folder, CONFIG) == pytest.approx(1.0)


def test_a_class_that_the_detector_does_not_know_counts_as_not_found(tiny, folder):
    blind = replace(
        tiny, parameters=replace(tiny.parameters, class_names=("red", "green", "sapphire"))
    )
    assert ap50_of_engine(blind, folder, CONFIG) == pytest.approx(0.5)


def test_a_metric_is_taken_from_the_passport_only_for_the_same_data(tiny, folder, tmp_path):
    for path in tiny.path.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    own = with_ap50(load_artifact(tmp_path), 0.123, folder, CONFIG)
    assert load_artifact(tmp_path) == own
    assert own.sha256 == tiny.sha256
    assert measured_ap50(own, folder, CONFIG) == 0.123
    assert measured_ap50(own, folder, replace(CONFIG, nms_thresh=0.3)) == pytest.approx(1.0)
    (folder.root / "instances.json").write_text((folder.root / "instances.json").read_text() + "\n")
    assert measured_ap50(own, folder, CONFIG) == pytest.approx(1.0)


class _NoServer:
    """Whoever touches it has gone too far."""

    def __getattr__(self, name):
        raise AssertionError(f"a candidate that was refused reached the server ({name})")


def test_a_candidate_that_is_worse_than_the_live_version_never_reaches_the_server(
    tiny, folder, tmp_path
):
    build_model_repository([tiny], tmp_path / "r", profile="embedded", config=PipelineConfig())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        ReleaseError, match=r"AP50 on coco\d is 0\.00, the live version has 100\.00 and 1\.00 may"
    ):
        release_detector(
            tmp_path / "r", exportable(ToyDetector(0)), folder, _NoServer(), export=export
        )
    assert sorted(tmp_path.rglob("*")) == before


def test_probes_foretell_what_the_pipeline_answers(tiny, folder):
    (probe,) = make_probes(tiny, PipelineConfig(), [folder.records[0].path])
    assert [CLASS_NAMES[label] for label in probe.detections.labels] == list(BOXES)
    np.testing.assert_allclose(probe.detections.boxes, list(BOXES.values()), atol=2)
    assert probe.candidates["scores"].shape == (3,)


def test_answers_are_equal_up_to_rounding():
    expected = Detections(
        boxes=np.array([[0, 0, 5, 5], [2, 2, 9, 9]], np.float32),
        scores=np.array([0.9, 0.8], np.float32),
        labels=np.array([0, 1]),
        image_size=(10, 10),
    )
    assert answer_difference(expected, expected) is None
    nearly = replace(expected, boxes=expected.boxes + np.float32(0.01))
    assert answer_difference(nearly, expected) is None
    moved = replace(expected, boxes=expected.boxes + np.float32(0.1))
    assert "boxes differ by 0.1" in answer_difference(moved, expected)
    doubted = replace(expected, scores=expected.scores - np.float32(0.1))
    assert "scores differ" in answer_difference(doubted, expected)
    other = replace(expected, labels=np.array([0, 2]))
    assert "labels [0, 2], expected [0, 1]" in answer_difference(other, expected)
    first = np.array([True, False])
    assert "1 detections, expected 2" in answer_difference(expected.take(first), expected)
    none = Detections.empty((10, 10))
    assert answer_difference(none, none) is None


def export(exportable, folder, half):
    return export_model(exportable, folder, half_weights=half)


def test_a_candidate_is_refitted_where_it_fits_and_exported_where_not(tmp_path, caplog):
    live = export(exportable(ToyDetector(0)), tmp_path / "live", True)
    caplog.set_level("INFO")
    refitted = build_candidate(
        exportable(ToyDetector(1)), live, tmp_path / "a", method="auto", export=export
    )
    assert refitted.method == "refit"
    assert refitted.artifact.passport.precision == "fp32/fp16 weights"
    assert refitted.artifact.passport.exporter["refit"]["from_sha256"] == live.sha256
    again = build_candidate(  # a refitted engine can be refitted
        exportable(ToyDetector(2)), refitted.artifact, tmp_path / "b", method="refit", export=export
    )
    assert again.artifact.sha256 not in (refitted.artifact.sha256, live.sha256)
    wider = exportable(ToyDetector(1, width=10))
    exported = build_candidate(wider, live, tmp_path / "c", method="auto", export=export)
    assert exported.method == "export"
    assert "no refit: conv.weight" in caplog.text
    with pytest.raises(RefitError, match="topology differs"):
        build_candidate(wider, live, tmp_path / "d", method="refit", export=export)
    larger = replace(wider, parameters=replace(wider.parameters, num_candidates=4))
    with pytest.raises(RefitError, match="num_candidates=4"):
        build_candidate(larger, live, tmp_path / "e", method="refit", export=export)


@pytest.mark.parametrize(
    "values", [{"max_loss": -0.1}, {"watch_s": -1}, {"num_probes": 0}, {"keep": 1}]
)
def test_rules_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="expected"):
        ReleaseRules(**values)
