"""Engines opened by the runtime: the right library for each, refusals before any byte of a plan is
read, and, over stand-ins for library and driver or on a GPU, the answers of ONNX Runtime.
"""

import dataclasses
import importlib
import shutil
import sys
from enum import Enum

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from export.engines.aot_inductor import AotInductorModel
from export.engines.base import EngineConfig
from export.engines.build import build_config, build_engine, build_engine_like
from export.engines.tensorrt import this_gpu
from export.exportable import example_inputs
from export.refit import RefitError
from tests.unit.export import stand_in_tensorrt
from tests.unit.export.toy_models import TOY_DETECTOR, export_toy_detector
from tests.unit.weaksam_rt.prompt_kernels.cpu_executor import build_cpu_driver
from weaksam_rt import cuda_driver
from weaksam_rt.artifacts import load_artifact, write_manifest
from weaksam_rt.backends.engines import open_engine
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.backends.tensorrt import TensorRtModel, narrowest_profile
from weaksam_rt.contracts import DETECTOR
from weaksam_rt.errors import (
    ArtifactError,
    BackendUnavailableError,
    ContractError,
    InferenceError,
)

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def rtx(toy_artifact, tmp_path_factory):
    """A real engine for GPUs that are not here."""
    config = EngineConfig(compute_capabilities=("8.6", "8.9"))
    folder = tmp_path_factory.mktemp("rtx")
    return build_engine(toy_artifact, folder, engine="tensorrt-rtx", config=config)


@pytest.fixture(scope="module")
def cpu_driver(tmp_path_factory):
    return build_cpu_driver(tmp_path_factory.mktemp("driver"), "-O0")


@pytest.fixture
def stand_in_gpu(cpu_driver, monkeypatch):
    """A GPU of compute capability 9.0."""
    monkeypatch.setattr(cuda_driver, "open_driver", lambda: cpu_driver)


@pytest.fixture
def never_deserialised(monkeypatch):
    """The library as it is, whose runtime must not be reached."""
    trt = importlib.import_module("tensorrt_rtx_bindings")

    def reached(*arguments):
        raise AssertionError(f"a plan was about to be read: {arguments}")

    monkeypatch.setattr(trt, "Runtime", reached)


@pytest.fixture
def plan(toy_artifact, tmp_path, monkeypatch, stand_in_gpu):
    """An engine of the stand-in library."""
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in_tensorrt)
    stand_in_tensorrt.used_profiles.clear()
    shutil.copyfile(toy_artifact.path, tmp_path / "model.plan")
    return write_manifest(
        tmp_path / "model.plan",
        model=DETECTOR,
        engine="tensorrt",
        parameters=TOY_DETECTOR,
        provenance={
            "versions": {"tensorrt": stand_in_tensorrt.__version__},
            "compute_capabilities": ("9.0",),
        },
    )


def refusal_of(artifact):
    with pytest.raises(ArtifactError) as refused:
        open_engine(artifact)
    text = str(refused.value)
    assert "\n" not in text
    return text


@no_gpu
def test_an_engine_is_refused_where_there_is_no_gpu(rtx, never_deserialised):
    text = refusal_of(load_artifact(rtx.path.parent))
    assert "model.rtx_engine was built for compute capability 8.6, 8.9" in text
    assert "this machine has no GPU; build the engine for it (no NVIDIA driver" in text


def test_an_engine_for_another_gpu_is_refused_before_it_is_read(
    rtx, stand_in_gpu, never_deserialised
):
    text = refusal_of(rtx)
    assert "compute capability 8.6, 8.9, this machine has compute capability 9.0" in text


def test_an_engine_of_another_version_is_refused_before_it_is_read(
    rtx, stand_in_gpu, never_deserialised
):
    here = rtx.passport.versions["tensorrt-rtx"]
    passport = dataclasses.replace(rtx.passport, versions={"tensorrt-rtx": "1.6.2.1"})
    text = refusal_of(dataclasses.replace(rtx, passport=passport))
    assert f"was built with tensorrt-rtx 1.6.2.1, this machine has {here}; build" in text


def test_a_missing_library_is_named_with_the_way_to_get_it(rtx, stand_in_gpu, monkeypatch):
    for module in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, module, None)
    text = refusal_of(rtx)
    assert "needs tensorrt-rtx 1." in text
    assert "which is not installed here" in text
    assert "pip install tensorrt-rtx-cu13-libs" in text


def test_a_library_of_an_unknown_major_version_is_refused(plan, monkeypatch):
    monkeypatch.setattr(stand_in_tensorrt, "__version__", "12.0.1")
    text = refusal_of(plan)
    assert "tensorrt 12.0.1 is installed, this package works with (10, 11)" in text


@no_gpu
def test_without_a_passport_the_machine_is_still_asked_for_a_gpu(rtx, never_deserialised):
    unknown = dataclasses.replace(rtx.passport, compute_capabilities=())
    with pytest.raises(BackendUnavailableError, match="no NVIDIA driver"):
        open_engine(dataclasses.replace(rtx, passport=unknown))


def test_each_engine_is_opened_by_its_own_runtime(toy_artifact, plan):
    assert isinstance(open_engine(toy_artifact), OnnxRuntimeModel)
    assert isinstance(open_engine(plan), TensorRtModel)
    for engine in ("aot-inductor", "aot-inductor-cuda"):
        text = refusal_of(dataclasses.replace(toy_artifact, engine=engine))
        assert f"for {engine}: only PyTorch opens such a package" in text
        assert AotInductorModel.__name__ in text
    assert "'openvino'; engines are opened for" in refusal_of(
        dataclasses.replace(toy_artifact, engine="openvino")
    )
    with pytest.raises(ArtifactError, match="not for tensorrt or tensorrt-rtx"):
        TensorRtModel(toy_artifact)


def test_answers_are_those_of_onnx_runtime_for_every_batch(toy_artifact, plan):
    engine, reference = open_engine(plan), OnnxRuntimeModel(toy_artifact)
    for arrays in example_inputs(DETECTOR, TOY_DETECTOR):
        got, expected = engine(arrays, None), reference(arrays)
        assert list(got) == list(expected)
        for name in expected:
            np.testing.assert_allclose(got[name], expected[name], atol=1e-5)
    assert stand_in_tensorrt.used_profiles == [1, 0, 1]  # batches of 2, 1 and 3


def test_only_wanted_outputs_are_read_back_and_views_are_taken_as_they_are(toy_artifact, plan):
    engine, reference = open_engine(plan), OnnxRuntimeModel(toy_artifact)
    image = example_inputs(DETECTOR, TOY_DETECTOR)[2]["image"][::2, :, ::-1]
    got = engine({"image": image}, ["scores"])
    assert list(got) == ["scores"]
    np.testing.assert_allclose(got["scores"], reference({"image": image})["scores"], atol=1e-5)
    again = engine({"image": image[:1]}, ["scores"])  # another profile, the same scratch memory
    np.testing.assert_allclose(again["scores"], got["scores"][:1], atol=1e-5)


def test_bad_inputs_are_refused_before_the_gpu_sees_them(plan):
    engine = open_engine(plan)
    with pytest.raises(ContractError, match="batch of 9, at most 8"):
        engine({"image": np.zeros((9, 16, 16, 3), np.uint8)}, None)
    with pytest.raises(InferenceError, match=r"takes image \[0, 16, 16, 3\]; the largest sizes"):
        engine({"image": np.zeros((0, 16, 16, 3), np.uint8)}, None)
    assert stand_in_tensorrt.used_profiles == []


def test_what_the_library_says_against_a_plan_is_in_the_one_line(plan):
    plan.path.write_bytes(b"x" * 100)
    assert "tensorrt 10.7.0.23 cannot open" in refusal_of(plan)
    assert "magic tag mismatch; build the engine again" in refusal_of(plan)


def test_a_plan_with_other_tensors_than_its_contract_is_refused(plan):
    masking = dataclasses.replace(TOY_DETECTOR, mask_size=4)
    text = refusal_of(dataclasses.replace(plan, parameters=masking))
    assert "'mask_logits': 'output of float32'" in text


@pytest.fixture
def refittable(plan, toy_artifact, monkeypatch):
    """A live engine whose weights can be exchanged, as its passport says."""
    monkeypatch.setattr("export.engines.compare.this_gpu", lambda: "9.0")
    exporter = {"name": "tensorrt", "seconds": 300.0, "refittable": True}
    passport = dataclasses.replace(
        plan.passport, precision="fp32", exporter=exporter, notes={"onnx": {}}
    )
    return write_manifest(
        plan.path, model=DETECTOR, engine="tensorrt", parameters=TOY_DETECTOR, provenance=passport
    )


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory):
    return export_toy_detector(tmp_path_factory.mktemp("other"), seed=1)


def test_a_refit_says_what_it_took_and_keeps_the_builds_seconds(
    refittable, other_checkpoint, tmp_path
):
    made = build_engine_like(refittable, other_checkpoint, tmp_path / "new", refit=True)
    assert made == load_artifact(tmp_path / "new")
    assert made.passport.worst_parity < 1e-5
    assert made.passport.exporter["seconds"] == 300.0
    refit = made.passport.exporter["refit"]
    assert refit["from_sha256"] == refittable.sha256
    assert 0 < refit["seconds"] < 300
    assert build_config(made) == build_config(refittable)


@pytest.mark.parametrize(
    ("name", "value", "missing"),
    [
        ("OnnxParserRefitter", None, "OnnxParserRefitter.refit_from_file"),
        (
            "SerializationFlag",
            Enum("Flags", ["EXCLUDE_WEIGHTS"]),
            "SerializationFlag.INCLUDE_REFIT",
        ),
    ],
)
def test_a_library_that_cannot_refit_says_what_it_lacks(
    refittable, other_checkpoint, tmp_path, monkeypatch, name, value, missing
):
    """``RefitError``: a release then builds the engine anew."""
    monkeypatch.setattr(stand_in_tensorrt, name, value)
    with pytest.raises(RefitError, match=rf"tensorrt 10\.7\.0\.23 cannot .* {missing}; build"):
        build_engine_like(refittable, other_checkpoint, tmp_path / "new", refit=True)


def _nudged(source, folder, factor):
    """The checkpoint of ``source``, fine-tuned a little."""
    folder.mkdir()
    model = onnx.load(source.path)
    bias = next(t for t in model.graph.initializer if t.name == "head.bias")
    bias.CopyFrom(numpy_helper.from_array(factor * numpy_helper.to_array(bias), bias.name))
    onnx.save(model, folder / "model.onnx")
    return write_manifest(
        folder / "model.onnx", model=DETECTOR, engine="onnxruntime", parameters=TOY_DETECTOR,
        provenance=source.passport,
    )  # fmt: skip


def test_a_refit_that_left_the_old_weights_is_noticed_within_the_limit(
    refittable, toy_artifact, tmp_path, monkeypatch
):
    near = _nudged(toy_artifact, tmp_path / "near", np.float32(1.01))
    assert build_engine_like(refittable, near, tmp_path / "right", refit=True)
    monkeypatch.setattr(stand_in_tensorrt.Refitter, "refit_cuda_engine", lambda refitter: True)
    with pytest.raises(RefitError, match=r"of 0\.00\d+ from the new .* and of 0 from the live"):
        build_engine_like(refittable, near, tmp_path / "kept", refit=True)
    assert not (tmp_path / "kept" / "manifest.json").exists()
    same = _nudged(toy_artifact, tmp_path / "same", np.float32(1))
    assert build_engine_like(refittable, same, tmp_path / "again", refit=True)


_SIZES = st.tuples(st.integers(1, 4), st.integers(0, 4)).map(lambda s: (s[0], s[0] + s[1]))
_RANGES = st.tuples(_SIZES, _SIZES).map(lambda axes: tuple(zip(*axes, strict=True)))


@given(
    profiles=st.lists(st.fixed_dictionaries({"a": _RANGES, "b": _RANGES}), min_size=1, max_size=5),
    shapes=st.fixed_dictionaries({n: st.tuples(*[st.integers(1, 8)] * 2) for n in "ab"}),
)
def test_the_profile_is_the_narrowest_of_those_that_fit(profiles, shapes):
    def accepted(ranges):
        lows, highs = (np.array([ranges["a"][i], ranges["b"][i]]) for i in (0, 1))
        wanted = np.array([shapes["a"], shapes["b"]])
        fits = (lows <= wanted).all() and (wanted <= highs).all()
        return (highs - lows + 1).prod() if fits else np.inf

    counts = [accepted(ranges) for ranges in profiles]
    if min(counts) == np.inf:
        with pytest.raises(InferenceError, match="no optimisation profile of the engine takes"):
            narrowest_profile(profiles, shapes)
    else:
        assert narrowest_profile(profiles, shapes) == int(np.argmin(counts))


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_real_engine_answers_as_onnx_runtime(toy_artifact, tmp_path, engine, precision):
    config = EngineConfig(precision=precision, compute_capabilities=(this_gpu(),))
    try:
        built = build_engine(toy_artifact, tmp_path, engine=engine, config=config)
    except (BackendUnavailableError, ValueError) as error:
        pytest.skip(str(error))
    opened, reference = open_engine(built), OnnxRuntimeModel(toy_artifact)
    limit = {"fp32": 1e-3, "fp16": 2e-2}[precision]
    for arrays in example_inputs(DETECTOR, TOY_DETECTOR):
        got, expected = opened(arrays, None), reference(arrays)
        np.testing.assert_allclose(got["scores"], expected["scores"], atol=limit)
        np.testing.assert_allclose(got["boxes"], expected["boxes"], atol=16 * limit)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx"])
def test_a_refitted_engine_answers_as_its_new_checkpoint(toy_artifact, tmp_path, engine):
    config = EngineConfig(compute_capabilities=(this_gpu(),), refittable=True)
    try:
        live = build_engine(toy_artifact, tmp_path / "live", engine=engine, config=config)
    except (BackendUnavailableError, ValueError) as error:
        pytest.skip(str(error))
    new = export_toy_detector(tmp_path / "new", seed=1)
    refitted = build_engine_like(live, new, tmp_path / "refitted", refit=True)
    opened, reference = open_engine(refitted), OnnxRuntimeModel(new)
    arrays = example_inputs(DETECTOR, TOY_DETECTOR)[0]
    np.testing.assert_allclose(opened(arrays)["scores"], reference(arrays)["scores"], atol=1e-3)
    assert build_config(refitted) == build_config(live)
    build_engine_like(refitted, toy_artifact, tmp_path / "again", refit=True)
