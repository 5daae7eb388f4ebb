"""INT8 and FP8 by Q/DQ pairs around weighted layers."""

import numpy as np
import onnx
import pytest

from export.engines.base import EngineConfig
from export.engines.build import build_engine
from export.engines.profiles import default_profiles
from export.exportable import example_inputs
from export.graph_model import GraphModel
from export.mixed_precision import KeepFp32
from export.onnx_graph import element_types
from export.quantization import quantized
from tests.unit.export.toy_models import TOY_DETECTOR
from weaksam_rt.artifacts import load_artifact
from weaksam_rt.contracts import DETECTOR, detector_contract

_INPUTS = example_inputs(DETECTOR, TOY_DETECTOR)
_CALIBRATION = [{"image": image[None]} for inputs in _INPUTS for image in inputs["image"]]


@pytest.fixture(scope="module")
def graph(toy_artifact):
    return onnx.load(toy_artifact.path)


@pytest.mark.parametrize(("precision", "kind"), [("int8", "INT8"), ("fp8", "FLOAT8E4M3FN")])
def test_weights_and_activations_of_weighted_layers_are_quantised(graph, precision, kind):
    found = quantized(graph, _CALIBRATION, precision)
    onnx.checker.check_model(found, full_check=True)
    types = element_types(found)
    dequantised = {n.output[0] for n in found.graph.node if n.op_type == "DequantizeLinear"}
    weighted = [n for n in found.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    assert weighted
    for node in weighted:
        assert set(node.input[:2]) <= dequantised
        assert not set(node.input[2:]) & dequantised
    values = {types[n.output[0]] for n in found.graph.node if n.op_type == "QuantizeLinear"}
    assert values == {onnx.TensorProto.DataType.Value(kind)}


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_quantised_model_is_near_the_float_one_and_not_it(graph, precision):
    run = GraphModel(quantized(graph, _CALIBRATION, precision))
    expected, got = GraphModel(graph)(_INPUTS[0]), run(_INPUTS[0])
    error = np.abs(got["scores"] - expected["scores"]).max()
    assert 0 < error < 0.05


def test_kept_layers_are_not_quantised(graph):
    kept = KeepFp32(op_types=frozenset({"Conv"}))
    found = quantized(graph, _CALIBRATION, "int8", kept)
    dequantised = {n.output[0] for n in found.graph.node if n.op_type == "DequantizeLinear"}
    convolutions = [n for n in found.graph.node if n.op_type == "Conv"]
    assert convolutions
    assert not any(set(node.input) & dequantised for node in convolutions)
    everything = KeepFp32(op_types=frozenset({"Conv", "Gemm", "MatMul"}))
    with pytest.raises(ValueError, match="no layer to quantise"):
        quantized(graph, _CALIBRATION, "int8", everything)


def test_without_calibration_nothing_is_quantised(graph):
    with pytest.raises(ValueError, match="at least one input"):
        quantized(graph, [], "int8")


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_rtx_builds_quantised_engines(toy_artifact, graph, tmp_path, precision):
    config = EngineConfig(
        precision=precision,
        compute_capabilities=("8.9",),
        profiles=default_profiles(detector_contract(TOY_DETECTOR))[-1:],
    )
    source = quantized(graph, _CALIBRATION, precision)
    build_engine(toy_artifact, tmp_path, engine="tensorrt-rtx", config=config, graph=source)
    assert load_artifact(tmp_path).provenance["precision"] == precision


def test_fp8_is_refused_for_gpus_without_it(toy_artifact, tmp_path):
    config = EngineConfig(precision="fp8", compute_capabilities=("8.0", "8.9"))
    with pytest.raises(ValueError, match=r"fp8 needs compute capability 8\.9"):
        build_engine(toy_artifact, tmp_path, engine="tensorrt-rtx", config=config)
