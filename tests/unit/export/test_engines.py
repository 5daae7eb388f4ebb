"""Engines behind one interface: real TensorRT-RTX plans for GPUs that are not here, and precise
refusals of what this machine cannot build.
"""

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.__main__ import engines
from export.engines.aot_inductor import AOT_ENGINES, AotInductorModel
from export.engines.base import EngineBuildError, EngineConfig
from export.engines.build import (
    BUILDERS,
    build_config,
    build_engine,
    builder_for,
    check_buildable,
    was_built,
)
from export.engines.compare import compare_with_source, opened_for_comparison
from export.engines.profiles import Profile, ShapeRange, default_profiles
from export.exportable import example_inputs
from export.mixed_precision import KeepFp32, node_names
from export.portable_graph import portable_model
from export.verify import FP32, ParityError, parity
from tests.unit.export.toy_models import TOY_DETECTOR, ToyDetector, export_toy_detector
from weaksam_rt.artifacts import load_artifact
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.contracts import (
    DETECTOR,
    SAM_MASK_DECODER,
    SamParameters,
    detector_contract,
    engine_contract,
)
from weaksam_rt.engine_serving import engine_serving
from weaksam_rt.errors import ArtifactError, BackendUnavailableError

_ADA = EngineConfig(compute_capabilities=("8.9",))
_WIDE = default_profiles(detector_contract(TOY_DETECTOR))[-1:]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture
def toy(toy_artifact):
    return toy_artifact


@pytest.mark.parametrize(
    ("capability", "precision"), [("8.0", "fp32"), ("8.9", "fp16"), ("12.0", "bf16")]
)
def test_rtx_engines_are_built_ahead_of_time_for_each_gpu(toy, tmp_path, capability, precision):
    config = EngineConfig(compute_capabilities=(capability,), precision=precision, profiles=_WIDE)
    artifact = build_engine(toy, tmp_path, engine="tensorrt-rtx", config=config)
    passport = artifact.passport
    assert load_artifact(tmp_path) == artifact
    assert artifact.path.stat().st_size > 1000
    assert passport.precision == precision
    assert passport.compute_capabilities == (capability,)
    assert passport.exporter["name"] == "tensorrt-rtx"
    assert passport.exporter["seconds"] > 0
    assert passport.versions["tensorrt-rtx"].startswith("1.")
    assert passport.profiles[0]["inputs"]["image"]["largest"] == [8, 16, 16, 3]
    assert passport.source == {"file": "toy"}
    assert not passport.parity
    assert "not_compared" in passport.notes


def test_one_rtx_engine_serves_several_gpus_and_has_all_profiles(toy, tmp_path):
    config = EngineConfig(compute_capabilities=("8.0", "8.9", "12.0"))
    artifact = build_engine(toy, tmp_path, engine="tensorrt-rtx", config=config)
    names = [profile["name"] for profile in artifact.passport.profiles]
    assert names == ["batch 1", "batch 4", "batch 8", "wide"]
    assert artifact.passport.compute_capabilities == ("8.0", "8.9", "12.0")


def test_an_rtx_plan_is_never_a_triton_tensorrt_plan(toy, tmp_path):
    config = dataclasses.replace(_ADA, profiles=_WIDE)
    artifact = build_engine(toy, tmp_path, engine="tensorrt-rtx", config=config)
    assert artifact.path.suffix != ".plan"
    with pytest.raises(ArtifactError, match="which no backend of the image reads"):
        engine_serving(artifact, "container")
    assert engine_serving(artifact, "embedded").opens_in_python
    with pytest.raises(ArtifactError, match="tensorrt-rtx, not for onnxruntime"):
        OnnxRuntimeModel(artifact)


def test_a_gpu_that_rtx_does_not_know_is_refused_with_those_it_knows(toy, tmp_path):
    hopper = EngineConfig(compute_capabilities=("9.0",))
    with pytest.raises(ValueError, match=r"8\.9, 12\.0.*got 9\.0.*--engine tensorrt"):
        build_engine(toy, tmp_path, engine="tensorrt-rtx", config=hopper)
    with pytest.raises(ValueError, match="got none"):
        build_engine(toy, tmp_path, engine="tensorrt-rtx", config=EngineConfig())
    with pytest.raises(ValueError, match="expected one like"):
        EngineConfig(compute_capabilities=("sm89",))


@no_gpu
def test_what_rtx_cannot_refit_without_a_gpu_it_says(toy, tmp_path):
    config = dataclasses.replace(_ADA, refittable=True, profiles=_WIDE)
    with pytest.raises(BackendUnavailableError) as refusal:
        build_engine(toy, tmp_path, engine="tensorrt-rtx", config=config)
    assert "builds no refittable engine without a GPU (" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_an_aot_inductor_package_cannot_be_refitted(toy, tmp_path):
    config = EngineConfig(refittable=True)
    with pytest.raises(ValueError, match="its packages are not refittable"):
        build_engine(toy, tmp_path, engine="aot-inductor", config=config, module=ToyDetector())


def test_rtx_has_no_timing_cache(toy, tmp_path):
    config = dataclasses.replace(_ADA, timing_cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="no timing cache"):
        build_engine(toy, tmp_path, engine="tensorrt-rtx", config=config)


def _with_non_zero(path):
    """A model with an operator that cannot be built without a GPU."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("NonZero", ["pixels"], ["boxes"]),
        ],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["b", 16, 16, 3])],
        [helper.make_tensor_value_info("boxes", TensorProto.INT64, [4, "n"])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)


def test_what_the_builder_says_against_a_model_is_in_the_error(toy, tmp_path):
    path = tmp_path / "non_zero.onnx"
    _with_non_zero(path)
    with pytest.raises(EngineBuildError, match=r"tensorrt-rtx cannot .* detector: .*\w"):
        build_engine(
            toy, tmp_path / "out", engine="tensorrt-rtx", config=_ADA, graph=onnx.load(path)
        )
    assert not (tmp_path / "out" / "manifest.json").exists()


@no_gpu
@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ("tensorrt", "tensorrt"),
        ("onnxruntime-cuda", "install onnxruntime-gpu"),
        ("aot-inductor-cuda", "no CUDA device is visible"),
    ],
)
def test_what_needs_a_gpu_says_so_in_one_line(toy, tmp_path, engine, reason):
    with pytest.raises(BackendUnavailableError, match=reason) as refusal:
        build_engine(toy, tmp_path, engine=engine, config=EngineConfig(), module=ToyDetector())
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


@no_gpu
def test_an_engine_for_a_gpu_cannot_be_released_from_a_machine_without(toy):
    passport = dataclasses.replace(
        toy.passport, precision="fp16", exporter={"name": "onnxruntime-cuda"}
    )
    with pytest.raises(
        BackendUnavailableError, match=r"install onnxruntime-gpu.*machine that serves it"
    ):
        check_buildable(dataclasses.replace(toy, passport=passport))


def test_an_unknown_engine_lists_the_known_ones():
    with pytest.raises(ValueError, match="tensorrt, tensorrt-rtx, aot-inductor"):
        builder_for("openvino")
    assert all(builder.file_name for builder in BUILDERS.values())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnx_runtime_engines_run_and_agree(toy, tmp_path, precision):
    config = EngineConfig(precision=precision)
    artifact = build_engine(toy, tmp_path, engine="onnxruntime", config=config)
    inputs = example_inputs(DETECTOR, TOY_DETECTOR)[0]
    got, expected = OnnxRuntimeModel(artifact)(inputs), OnnxRuntimeModel(toy)(inputs)
    limit = {"fp32": 1e-6, "fp16": 2e-3}[precision]
    np.testing.assert_allclose(got["scores"], expected["scores"], atol=limit)
    if precision == "fp16":
        assert np.abs(got["scores"] - expected["scores"]).max() > 0
    assert artifact.passport.parity["all outputs"]["distance"] <= limit
    assert artifact.passport.worst_parity == artifact.passport.parity["all outputs"]["distance"]


@pytest.mark.parametrize(("factor", "said"), [(-1.0, "distance"), (np.nan, "not finite")])
def test_an_engine_that_answers_otherwise_is_refused_and_never_loaded(toy, tmp_path, factor, said):
    wrong = onnx.load(toy.path)
    weight = next(t for t in wrong.graph.initializer if t.name == "head.bias")
    weight.CopyFrom(numpy_helper.from_array(factor * numpy_helper.to_array(weight), weight.name))
    with pytest.raises(ParityError, match=rf"detector for onnxruntime in fp32: .*{said}"):
        build_engine(toy, tmp_path, engine="onnxruntime", config=EngineConfig(), graph=wrong)
    with pytest.raises(ArtifactError):
        load_artifact(tmp_path)


def test_an_engine_with_wrong_masks_is_refused_though_its_boxes_are_right(tmp_path):
    source = export_toy_detector(tmp_path / "toy", masks=True)
    config = EngineConfig(precision="fp16")
    built = build_engine(source, tmp_path / "right", engine="onnxruntime", config=config)
    assert built.passport.worst_parity < 2e-3
    wrong = onnx.load(source.path)
    mask = next(t for t in wrong.graph.initializer if t.name == "mask")
    mask.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(mask), mask.name))
    with pytest.raises(ParityError, match=r"distance [01]\S* beside .* for image \[2, 16, 16, 3\]"):
        build_engine(source, tmp_path / "wrong", engine="onnxruntime", config=config, graph=wrong)
    assert not (tmp_path / "wrong" / "manifest.json").exists()


def test_one_broken_batch_size_is_not_hidden_by_the_others(toy, monkeypatch):
    """Distances of 0, 0 and 1: their mean is within the limit of int8."""

    class Broken:
        def __init__(self, artifact):
            self._model = OnnxRuntimeModel(artifact)

        def __call__(self, arrays, outputs):
            answer = self._model(arrays, outputs)
            moved = 1000.0 if len(arrays["image"]) == 3 else 0.0
            return {**answer, "boxes": answer["boxes"] + np.float32(moved)}

    monkeypatch.setattr("export.engines.compare.open_engine", Broken)
    named = dataclasses.replace(toy.passport, exporter={"name": "onnxruntime"})
    with pytest.raises(ParityError, match=r"distance 1 .* for image \[3, 16, 16, 3\], up to 0\.5"):
        compare_with_source(dataclasses.replace(toy, passport=named), toy, "int8")


def test_how_an_engine_was_built_can_be_read_from_its_passport(toy, tmp_path):
    kept = KeepFp32(
        nodes=frozenset(node_names(onnx.load(toy.path))[:2]), op_types=frozenset({"Gemm"})
    )
    config = EngineConfig(precision="fp16", keep_fp32=kept)
    artifact = build_engine(toy, tmp_path / "a", engine="onnxruntime", config=config)
    assert was_built(artifact)
    assert not was_built(toy)
    assert build_config(load_artifact(tmp_path / "a")) == config
    config = dataclasses.replace(_ADA, workspace_bytes=1 << 28)
    artifact = build_engine(toy, tmp_path / "b", engine="tensorrt-rtx", config=config)
    expected = default_profiles(toy.contract)
    assert build_config(load_artifact(tmp_path / "b")) == dataclasses.replace(
        config, profiles=expected
    )


def test_a_passport_says_on_which_machine_an_engine_was_built(toy, tmp_path, monkeypatch):
    here = {"driver": "570.1", "cuda": "12.8", "compute_capability": "8.9", "onnxruntime": "0"}
    monkeypatch.setattr("export.engines.build.machine_versions", lambda: here)
    built = build_engine(toy, tmp_path, engine="onnxruntime", config=EngineConfig())
    assert built.passport.versions == {**here, "onnxruntime": onnxruntime.__version__}


def test_a_profile_takes_what_is_within_its_ranges():
    narrow, *_, wide = default_profiles(detector_contract(TOY_DETECTOR))
    two, one, _ = example_inputs(DETECTOR, TOY_DETECTOR)
    assert narrow.takes(one)
    assert not narrow.takes(two)
    assert wide.takes(two)


def test_bf16_on_a_cpu_is_refused_with_onnx_runtimes_reason(toy, tmp_path):
    with pytest.raises(EngineBuildError, match=r"CPUExecutionProvider .* in bf16: .*choose"):
        build_engine(toy, tmp_path, engine="onnxruntime", config=EngineConfig(precision="bf16"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_aot_inductor_package_agrees_with_pytorch(toy, tmp_path):
    module = ToyDetector()
    artifact = build_engine(
        toy, tmp_path, engine="aot-inductor", config=EngineConfig(), module=module
    )
    inputs = example_inputs(DETECTOR, TOY_DETECTOR)
    report = parity(module, AotInductorModel(artifact), toy.contract, inputs, FP32)
    assert report["boxes"]["max_abs_error"] < 1e-5
    assert artifact.passport.versions["torch"] == torch.__version__


@pytest.mark.parametrize("engine", AOT_ENGINES.values())
def test_an_aot_inductor_package_is_compared_in_pytorch(toy, monkeypatch, engine):
    monkeypatch.setattr("export.engines.compare.check_runs_here", lambda artifact: None)
    monkeypatch.setattr("export.engines.compare.AotInductorModel", lambda artifact: "package")
    assert opened_for_comparison(dataclasses.replace(toy, engine=engine)) == "package"


def test_an_aot_inductor_package_needs_the_model_in_pytorch(toy, tmp_path):
    with pytest.raises(ValueError, match="give the checkpoint"):
        build_engine(toy, tmp_path, engine="aot-inductor", config=EngineConfig())


def test_int8_is_built_from_a_quantised_graph_only(toy, tmp_path):
    config = dataclasses.replace(_ADA, precision="int8")
    with pytest.raises(ValueError, match="no QuantizeLinear"):
        build_engine(toy, tmp_path, engine="tensorrt-rtx", config=config)


def test_an_engine_does_not_replace_the_model_it_is_built_from(toy):
    with pytest.raises(ValueError, match="built from"):
        build_engine(toy, toy.path.parent, engine="onnxruntime", config=EngineConfig())


def test_kept_nodes_are_those_of_the_graph(toy, tmp_path):
    config = EngineConfig(precision="fp16", keep_fp32=KeepFp32(nodes=frozenset({"nobody"})))
    with pytest.raises(ValueError, match="nobody"):
        build_engine(toy, tmp_path, engine="onnxruntime", config=config)


def test_default_profiles_are_narrow_for_hot_sizes_and_one_is_wide():
    parameters = SamParameters(image_size=64, embedding_size=8, embedding_dim=16)
    contract = engine_contract(SAM_MASK_DECODER, parameters)
    hot, wide = default_profiles(contract)
    assert hot.inputs["point_coords"].smallest == hot.inputs["point_coords"].largest == (64, 2, 2)
    assert wide.inputs["image_embeddings"].smallest == (1, 16, 8, 8)
    assert wide.inputs["image_embeddings"].largest == (8, 16, 8, 8)
    for profile in (hot, wide):
        profile.check(contract)


def test_a_profile_of_another_shape_is_refused():
    sizes = (1, 17, 16, 3)
    profile = Profile(
        name="odd", inputs={"image": ShapeRange(smallest=sizes, usual=sizes, largest=sizes)}
    )
    with pytest.raises(ValueError, match=r"detector\.image is \[-1, 16, 16, 3\], got \[1, 17"):
        profile.check(detector_contract(TOY_DETECTOR))
    with pytest.raises(ValueError, match="smallest <= usual"):
        ShapeRange(smallest=(2,), usual=(1,), largest=(3,))


def test_bytes_are_cast_before_they_are_moved_with_the_same_answer(toy):
    portable = portable_model(onnx.load(toy.path))
    first = next(node for node in portable.graph.node if "image" in node.input)
    assert first.op_type == "Cast"
    onnx.checker.check_model(portable, full_check=True)
    inputs = example_inputs(DETECTOR, TOY_DETECTOR)[1]
    moved = dataclasses.replace(toy, path=toy.path.with_name("portable.onnx"))
    onnx.save(portable, moved.path)
    expected, got = OnnxRuntimeModel(toy)(inputs), OnnxRuntimeModel(moved)(inputs)
    np.testing.assert_array_equal(got["boxes"], expected["boxes"])


def test_the_command_builds_every_model_of_a_folder(toy, tmp_path):
    engines(
        toy.path.parent.parent,
        tmp_path,
        engine="tensorrt-rtx",
        precision="bf16",
        compute_capability=("8.0", "12.0"),
        hot_batches=(),
    )
    (folder,) = tmp_path.iterdir()
    assert load_artifact(folder).engine == "tensorrt-rtx"
