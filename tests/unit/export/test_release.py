"""What a candidate must show before it is published; the real detector in miniature."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from export.__main__ import export_model
from export.calibration import calibrated
from export.engines.base import EngineConfig
from export.engines.build import build_config, build_engine
from export.engines.compare import ENGINE_LIMITS
from export.judges import (
    JUDGES,
    ap50_of_engine,
    check_data,
    judge_of,
    losses,
    measured,
    with_metrics,
)
from export.mixed_precision import KeepFp32
from export.probes import Answer, answer_difference, calls_of, check_engine_answers, make_probes
from export.refit import RefitError
from export.release import (
    ReleaseRules,
    build_candidate,
    check_calibration,
    live_engines,
    release,
)
from tests.integration.pictures import BOXES, labelled_scenes
from tests.integration.tiny_engines import CLASS_NAMES, write_tiny_artifacts
from tests.unit.export.test_refit import ToyDetector, exportable
from weaksam_rt.artifacts import load_artifact, write_manifest
from weaksam_rt.config import DetectionConfig, PipelineConfig
from weaksam_rt.contracts import (
    DETECTOR,
    SAM_IMAGE_ENCODER,
    SAM_MASK_DECODER,
    VIT_CLASSIFIER,
)
from weaksam_rt.errors import ArtifactError, BackendUnavailableError, ReleaseError
from weaksam_rt.model_repository import build_model_repository
from weaksam_rt.proposals import ProposalConfig
from weaksam_rt.types import Detections

CONFIG = DetectionConfig()
DETECT = "weaksam_detect"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    return next(a for a in write_tiny_artifacts(folder) if a.model == DETECTOR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two scenes of the tiny engines' world with their true boxes, and a class they do not know."""
    return labelled_scenes(tmp_path_factory.mktemp("coco"), ("blue", "red", "violet"))


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
    judge, config = judge_of([exportable(ToyDetector(0))]), PipelineConfig()
    known = {"ap50": 0.123}
    own = with_metrics(judge, {DETECTOR: load_artifact(tmp_path)}, known, folder, config)
    assert load_artifact(tmp_path) == own[DETECTOR]
    assert own[DETECTOR].sha256 == tiny.sha256
    assert measured(judge, own, folder, config) == known
    other = replace(config, detection=replace(CONFIG, nms_thresh=0.3))
    assert measured(judge, own, folder, other) == {"ap50": pytest.approx(1.0)}
    (folder.root / "instances.json").write_text((folder.root / "instances.json").read_text() + "\n")
    assert measured(judge, own, folder, config) == {"ap50": pytest.approx(1.0)}


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
        ReleaseError, match=r"coco\d AP50 is 0\.00, the live version has 100\.00 and 1\.00 may"
    ):
        release(tmp_path / "r", [exportable(ToyDetector(0))], folder, _NoServer(), export=export)
    assert sorted(tmp_path.rglob("*")) == before


def test_probes_foretell_what_the_pipeline_answers(tiny, folder):
    (probe,) = make_probes(
        {DETECTOR: tiny}, {}, [DETECT], PipelineConfig(), [folder.records[0].path]
    )
    answer = probe.pipelines[DETECT]
    assert [CLASS_NAMES[int(label)] for label in answer.names] == list(BOXES)
    np.testing.assert_allclose(answer.boxes, list(BOXES.values()), atol=2)
    (engine,) = probe.engines
    assert engine.outputs["scores"].shape == (3,)


@pytest.fixture(scope="module")
def all_tiny(tmp_path_factory):
    return {a.model: a for a in write_tiny_artifacts(tmp_path_factory.mktemp("all"))}


SAM = (SAM_IMAGE_ENCODER, SAM_MASK_DECODER)
PIPELINES = ("weaksam_detect", "weaksam_propose", "weaksam_segment")


def test_a_sam_is_probed_through_every_pipeline_that_calls_it(all_tiny, folder):
    candidates = {model: all_tiny[model] for model in SAM}
    others = {model: a for model, a in all_tiny.items() if model not in SAM}
    config = PipelineConfig(proposals=ProposalConfig(points_per_side=4))
    (probe,) = make_probes(candidates, others, PIPELINES, config, [folder.records[0].path])
    assert [known.artifact.model for known in probe.engines] == list(SAM)
    assert probe.engines[1].inputs["image_embeddings"].shape == (1, 3, 16, 16)
    detect, propose, segment = (probe.pipelines[name] for name in PIPELINES)
    assert len(detect.mask_boxes) == len(detect.boxes) == 2
    assert propose.names == tuple(BOXES)
    assert len(propose.boxes) > 0
    assert len(segment.mask_boxes) == 1
    for name, call in calls_of(candidates).items():
        expected = probe.pipelines[name]
        assert call.difference(expected, expected) is None
        moved = replace(
            expected, boxes=expected.boxes + 40, mask_boxes=expected.mask_boxes + np.float32(40)
        )
        assert call.difference(moved, expected) is not None


class _Server:
    """Answers for engines with arrays of the test's own."""

    def __init__(self, change):
        self._change = change

    def infer(self, contract, version, inputs):
        return self._change[contract.name]


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("logits", lambda a: a + 0.1, "logits that differ by 0.02 from the same engine here"),
        ("coarse_maps", lambda a: a * np.nan, "coarse_maps that are not finite"),
        ("cross_maps", lambda a: a[:1], "cross_maps of shape [1, 3, 4, 4], expected [2, 3, 4, 4]"),
    ],
)
def test_an_engine_that_answers_otherwise_on_the_server_is_noticed(
    all_tiny, folder, name, change, complaint
):
    classifier = {VIT_CLASSIFIER: all_tiny[VIT_CLASSIFIER]}
    probes = make_probes(classifier, {}, (), PipelineConfig(), [folder.records[0].path])
    outputs = dict(probes[0].engines[0].outputs)
    check_engine_answers(_Server({VIT_CLASSIFIER: outputs}), probes, 2)
    outputs[name] = change(outputs[name])
    with pytest.raises(ReleaseError) as refused:
        check_engine_answers(_Server({VIT_CLASSIFIER: outputs}), probes, 2)
    assert complaint in str(refused.value)


def test_proposals_are_compared_without_their_order_and_with_their_tags():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 100, (40, 2, 2)), axis=1).astype(np.float32)
    corners[:, 1] += 10
    expected = Answer(boxes=corners.reshape(-1, 4), scores=np.ones(40, np.float32), names=("red",))
    difference = calls_of(())["weaksam_propose"].difference
    assert difference(replace(expected, boxes=expected.boxes[::-1]), expected) is None
    assert difference(replace(expected, boxes=expected.boxes[1:]), expected) is None
    assert "of the proposals are those" in difference(
        replace(expected, boxes=expected.boxes[:30]), expected
    )
    assert "tags ['blue']" in difference(replace(expected, names=("blue",)), expected)
    nothing = replace(expected, boxes=np.zeros((0, 4), np.float32))
    assert "0 proposals, expected 40" in difference(nothing, expected)
    assert difference(nothing, nothing) is None


def test_every_metric_counts_and_no_number_is_a_loss():
    live = {"mask_iou_point": 0.7, "mask_iou_box": 0.8}
    assert losses({"mask_iou_point": 0.695, "mask_iou_box": 0.9}, live, 0.01) == []
    (lost,) = losses({"mask_iou_point": 0.9, "mask_iou_box": 0.7}, live, 0.01)
    assert lost == "mask IoU (box) is 70.00, the live version has 80.00 and 1.00 may be lost"
    assert len(losses(dict.fromkeys(live, float("nan")), live, 1.0)) == 2


def test_a_classifier_is_measured_by_its_tags(all_tiny, folder):
    judges = {judge.models: judge for judge in JUDGES}
    tags = judges[VIT_CLASSIFIER,].measure(all_tiny, folder, PipelineConfig())
    assert tags == {"tag_ap": pytest.approx(1.0)}


@pytest.mark.parametrize(
    ("models", "record", "truth"),
    [
        ((DETECTOR,), {"given_tags": (0,), "boxes": np.zeros((0, 4), np.float32)}, "true boxes"),
        ((DETECTOR,), {"boxes": np.zeros((0, 4), np.float32)}, "true boxes"),
        ((VIT_CLASSIFIER,), {"given_tags": ()}, "tags"),
        ((SAM_IMAGE_ENCODER, SAM_MASK_DECODER), {"segmentations": ()}, "true masks"),
    ],
)
def test_data_that_nothing_can_be_judged_by_are_refused(folder, models, record, truth):
    judge = next(judge for judge in JUDGES if judge.models == models)
    nothing = replace(folder, records=tuple(replace(r, **record) for r in folder.records))
    with pytest.raises(ValueError, match=f"no image of .* has {truth}, so .* cannot be judged"):
        check_data(judge, nothing)
    one_left = replace(nothing, records=(*nothing.records, folder.records[0]))
    if truth != "true masks":  # these scenes have none
        check_data(judge, one_left)


def test_half_a_sam_and_mixtures_are_not_released():
    toy = exportable(ToyDetector(0))
    half = replace(toy, model=SAM_IMAGE_ENCODER)
    for wrong in ([half], [toy, half], []):
        with pytest.raises(ReleaseError, match="sam_image_encoder with sam_mask_decoder"):
            judge_of(wrong)


@no_gpu
def test_an_engine_that_cannot_be_tried_here_is_refused_before_anything_is_built(tiny, tmp_path):
    config = EngineConfig(compute_capabilities=("8.9",))
    plan = build_engine(tiny, tmp_path / "engine", engine="tensorrt-rtx", config=config)
    build_model_repository([plan], tmp_path / "r", profile="embedded", config=PipelineConfig())
    with pytest.raises(BackendUnavailableError, match=r"engine for tensorrt-rtx.* machine that se"):
        live_engines(tmp_path / "r", [DETECTOR])
    with pytest.raises(ArtifactError, match="serves no vit_classifier"):
        live_engines(tmp_path / "r", [VIT_CLASSIFIER])


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


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_an_engine_of_lower_precision_gets_a_successor_like_it(folder, tmp_path, precision):
    old = export(exportable(ToyDetector(0)), tmp_path / "old", False)
    keep = KeepFp32(op_types=frozenset({"Gemm"}))
    graph = calibrated(old, "int8", keep, folder) if precision == "int8" else None
    live = build_engine(
        old,
        tmp_path / "live",
        engine="onnxruntime",
        config=EngineConfig(precision=precision, keep_fp32=keep),
        graph=graph,
    )
    new = exportable(ToyDetector(1))

    with pytest.raises(RefitError, match="without --refittable for onnxruntime"):
        build_candidate(
            new, live, tmp_path / "a", method="refit", export=export, calibration=folder
        )
    candidate = build_candidate(
        new, live, tmp_path / "b", method="auto", export=export, calibration=folder
    )

    assert candidate.method == "build"
    built = load_artifact(tmp_path / "b")
    assert build_config(built) == build_config(live)
    taken_from = {"data": folder.root.name, "num_images": 2} if precision == "int8" else None
    assert built.passport.exporter.get("calibration") == taken_from
    assert built.passport.parity["all outputs"]["distance"] < ENGINE_LIMITS[precision]
    again = build_candidate(
        exportable(ToyDetector(2)), built, tmp_path / "c", method="auto", export=export,
        calibration=folder,
    )  # fmt: skip
    assert again.artifact.sha256 not in (built.sha256, live.sha256)


def _quantised(artifact, folder):
    """The same file, said to be int8."""
    folder.mkdir()
    (folder / artifact.path.name).write_bytes(artifact.path.read_bytes())
    return write_manifest(
        folder / artifact.path.name, model=artifact.model, engine=artifact.engine,
        parameters=artifact.parameters, provenance={"precision": "int8"},
    )  # fmt: skip


def test_a_quantised_engine_is_not_calibrated_on_what_it_is_judged_on(tiny, folder, tmp_path):
    int8 = _quantised(tiny, tmp_path / "int8")
    build_model_repository([int8], tmp_path / "r", profile="embedded", config=PipelineConfig())
    (tmp_path / "other").mkdir()
    other = labelled_scenes(tmp_path / "other", ("blue", "red"))

    def never(*arguments):
        raise AssertionError("something was built")

    for calibration, reason in ((None, "none was given"), (folder, "judged on; give --cal")):
        with pytest.raises(ValueError, match=rf"live detector is quantised.*{reason}"):
            release(
                tmp_path / "r", [exportable(ToyDetector(0))], folder, _NoServer(), export=never,
                calibration=calibration,
            )  # fmt: skip
    check_calibration({DETECTOR: int8}, folder, other)
    check_calibration({DETECTOR: tiny}, folder, None)


@pytest.mark.parametrize(
    "values", [{"max_loss": -0.1}, {"watch_s": -1}, {"num_probes": 0}, {"keep": 1}]
)
def test_rules_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="expected"):
        ReleaseRules(**values)
