"""Which engine is served in which profile and how; every refusal is one line before anything is
written.
"""

import pytest

from tests.unit.weaksam_rt.repositories import PARAMETERS, artifact, build, write_artifacts
from weaksam_rt.artifacts import load_artifact, write_manifest
from weaksam_rt.contracts import DETECTOR, SAM_MASK_DECODER
from weaksam_rt.engine_serving import (
    CONTAINER_TENSORRT,
    engine_serving,
    serving_difference,
)
from weaksam_rt.errors import ArtifactError
from weaksam_rt.repository_check import check_model_repository, read_model_config

PLAN = {
    "versions": {"tensorrt": f"{CONTAINER_TENSORRT}.23"},
    "profiles": ({"name": "batch 1"}, {"name": "batch 4"}, {"name": "wide"}),
}


def engine(folder, kind, name, **passport):
    """A manifest beside a file that nothing opens here."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"engine")
    return write_manifest(
        folder / name,
        model=DETECTOR,
        engine=kind,
        parameters=PARAMETERS[DETECTOR],
        provenance=passport,
    )


@pytest.mark.parametrize(
    ("kind", "precision", "profile", "backend", "platform"),
    [
        ("onnxruntime", "fp32", "embedded", "python", ""),
        ("onnxruntime", "int8", "embedded", "python", ""),
        ("onnxruntime", "fp32", "container", "onnxruntime", "onnxruntime_onnx"),
        ("onnxruntime", "bf16", "container", "onnxruntime", "onnxruntime_onnx"),
        ("tensorrt", "fp16", "embedded", "python", ""),
        ("tensorrt", "fp8", "container", "tensorrt", "tensorrt_plan"),
        ("tensorrt-rtx", "fp8", "embedded", "python", ""),
    ],
)
def test_what_a_profile_serves(tmp_path, kind, precision, profile, backend, platform):
    made = engine(tmp_path, kind, "model.any", precision=precision)
    serving = engine_serving(made, profile)
    assert (serving.backend, serving.platform) == (backend, platform)


@pytest.mark.parametrize(
    ("kind", "passport", "profile", "reason"),
    [
        ("aot-inductor", {}, "embedded", "only PyTorch opens: neither profile has it; serve"),
        ("aot-inductor-cuda", {}, "container", "only PyTorch opens: neither profile has it; serve"),
        ("tensorrt-rtx", {}, "container", "no backend of the image reads (tensorrt_plan takes"),
        ("onnxruntime", {"precision": "fp8"}, "embedded", "computes wrong numbers"),
        ("onnxruntime", {"precision": "fp8"}, "container", "computes wrong numbers"),
        ("onnxruntime", {"precision": "bf16"}, "embedded", "runs on the CPU; serve fp32, fp16"),
        ("tensorrt", {"versions": {"tensorrt": "11.4.0.106"}}, "container", "inside the image"),
        ("openvino", {}, "embedded", "known are onnxruntime, tensorrt and tensorrt-rtx"),
    ],
)
def test_what_a_profile_cannot_serve_is_refused_before_anything_is_written(
    tmp_path, kind, passport, profile, reason
):
    made = engine(tmp_path / "made", kind, "model.any", **passport)
    with pytest.raises(ArtifactError) as refused:
        build({DETECTOR: made}, tmp_path / "repository", profile)
    text = str(refused.value)
    assert text.startswith(f"detector cannot be served in the {profile} profile: {made.path} ")
    assert reason in text
    assert "\n" not in text
    assert not (tmp_path / "repository").exists()


def test_a_plan_in_the_container_may_use_all_its_profiles(tmp_path):
    """Triton takes the first profile unless told, and the first takes one image alone."""
    made = engine(tmp_path / "made", "tensorrt", "model.plan", **PLAN)
    build({DETECTOR: made}, tmp_path / "r", "container")
    config = read_model_config(tmp_path / "r/detector/config.pbtxt")
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    assert config.default_model_filename == "model.plan"
    (group,) = config.instance_group
    assert group.kind == group.KIND_GPU
    assert list(group.profile) == ["0", "1", "2"]
    assert not config.parameters
    assert not (tmp_path / "r/detector/1/model.py").exists()
    assert check_model_repository(tmp_path / "r") == []


def test_a_repository_may_mix_engines(tmp_path):
    artifacts = write_artifacts(tmp_path / "artifacts")
    artifacts[DETECTOR] = engine(tmp_path / "made", "tensorrt", "model.plan", **PLAN)
    build(artifacts, tmp_path / "r", "container")
    found = {
        name: read_model_config(tmp_path / "r" / name / "config.pbtxt").platform
        for name in (DETECTOR, SAM_MASK_DECODER)
    }
    assert found == {DETECTOR: "tensorrt_plan", SAM_MASK_DECODER: "onnxruntime_onnx"}
    assert check_model_repository(tmp_path / "r") == []


@pytest.mark.parametrize(
    ("kind", "passport"),
    [
        ("tensorrt-rtx", {}),
        ("onnxruntime", {"exporter": {"name": "onnxruntime-cuda"}, "precision": "bf16"}),
    ],
)
def test_an_engine_on_a_gpu_gets_an_instance_there_in_the_embedded_profile(
    tmp_path, kind, passport
):
    made = engine(tmp_path / "made", kind, "model.any", **passport)
    build({DETECTOR: made}, tmp_path / "r")
    config = read_model_config(tmp_path / "r/detector/config.pbtxt")
    assert config.backend == "python"
    assert config.instance_group[0].kind == config.instance_group[0].KIND_AUTO
    assert "EngineModel" in (tmp_path / "r/detector/1/model.py").read_text()
    assert check_model_repository(tmp_path / "r") == []


def test_the_validator_finds_an_engine_that_its_config_cannot_run(tmp_path):
    build({DETECTOR: artifact(tmp_path / "a", DETECTOR)}, tmp_path / "r", "container")
    folder = tmp_path / "r/detector/1"
    made = load_artifact(folder)
    for kind, reason in (
        ("tensorrt", "its config runs it by backend 'onnxruntime' and platform 'onnxruntime_onnx'"),
        ("tensorrt-rtx", "no backend of the image reads"),
        ("aot-inductor", "only PyTorch opens"),
    ):
        write_manifest(
            made.path, model=DETECTOR, engine=kind, parameters=made.parameters, provenance={}
        )
        (problem,) = check_model_repository(tmp_path / "r")
        assert problem.startswith("detector: ")
        assert reason in problem


def test_a_config_is_compared_with_what_the_builder_would_write(tmp_path):
    made = engine(tmp_path, "tensorrt", "model.plan", **PLAN)
    assert serving_difference(made, backend="tensorrt", platform="tensorrt_plan") is None
    assert serving_difference(made, backend="python", platform="") is None
    wrong = serving_difference(made, backend="tensorrt", platform="")
    assert "needs 'tensorrt' and 'tensorrt_plan'" in wrong
