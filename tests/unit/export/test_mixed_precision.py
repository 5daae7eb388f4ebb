"""Typed graphs: every node computes in the precision it should, and the contract stays."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from export.exportable import example_inputs
from export.graph_model import GraphModel
from export.mixed_precision import (
    KeepFp32,
    emulated,
    expand_normalizations,
    low_share,
    lower_precision,
    node_names,
)
from export.onnx_graph import constant, element_types, plain_model
from tests.unit.export.toy_models import TOY_DETECTOR
from weaksam_rt.contracts import DETECTOR

_INPUTS = example_inputs(DETECTOR, TOY_DETECTOR)[0]
_LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.fixture(scope="module")
def toy(toy_artifact):
    return onnx.load(toy_artifact.path)


def _chain(scale):
    """y = sqrt(mean((scale * x) ^ 2)), which overflows float16 for a scale of 1000."""
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["a"], name="scaled"),
        helper.make_node("Mul", ["a", "a"], ["b"], name="squared"),
        helper.make_node("ReduceMean", ["b", "axes"], ["c"], name="mean", keepdims=1),
        helper.make_node("Sqrt", ["c"], ["y"], name="root"),
    ]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
        [constant("scale", np.float32(scale)), constant("axes", np.array([1]))],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


_X = {"x": np.array([[1, -2, 0.5, 1], [1, 1, 1, 1]], np.float32)}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_typed_graph_is_valid_and_keeps_the_types_of_the_contract(toy, precision):
    typed = lower_precision(toy, precision)
    onnx.checker.check_model(typed, full_check=True)
    for before, after in (
        (toy.graph.input, typed.graph.input),
        (toy.graph.output, typed.graph.output),
    ):
        assert [v.type.tensor_type.elem_type for v in before] == [
            v.type.tensor_type.elem_type for v in after
        ]
    assert low_share(typed) > 0.9
    weights = [t for t in typed.graph.initializer if np.prod(t.dims) > 20]
    assert {t.data_type for t in weights} == {_LOW[precision]}


def test_kept_nodes_compute_in_float32_and_nothing_else_does(toy):
    kept = KeepFp32(op_types=frozenset({"Conv"}))
    typed = lower_precision(toy, "fp16", kept)
    onnx.checker.check_model(typed, full_check=True)
    types = element_types(typed)
    for node in typed.graph.node:
        if node.op_type == "Conv":
            assert {types[name] for name in node.input} == {TensorProto.FLOAT}
        if node.op_type in ("Gemm", "MatMul"):
            assert {types[name] for name in node.input} == {TensorProto.FLOAT16}


def test_keeping_every_node_changes_no_bit(toy):
    everything = KeepFp32(nodes=frozenset(node_names(toy)))
    kept = GraphModel(lower_precision(toy, "fp16", everything))(_INPUTS)
    plain = GraphModel(plain_model(toy))(_INPUTS)
    for name, expected in plain.items():
        np.testing.assert_array_equal(kept[name], expected)


def test_a_cast_is_shared_by_all_who_read_it(toy):
    typed = lower_precision(toy, "fp16")
    casts = [(n.input[0], n.attribute[0].i) for n in typed.graph.node if n.op_type == "Cast"]
    assert len(casts) == len(set(casts))


def test_an_overflow_shows_where_results_are_rounded():
    well, ill = (emulated(lower_precision(_chain(s), "fp16")) for s in (1, 1000))
    np.testing.assert_allclose(GraphModel(well)(_X)["y"][1], 1, rtol=1e-3)
    assert np.isinf(GraphModel(ill)(_X)["y"]).all()


def test_bfloat16_has_the_range_and_not_the_digits():
    typed = lower_precision(_chain(1000), "bf16")
    got = GraphModel(emulated(typed))(_X)["y"]
    exact = GraphModel(_chain(1000))(_X)["y"]
    error = np.abs(got / exact - 1).max()
    assert 1e-4 < error < 2**-6


def test_what_is_kept_heals_the_overflow():
    keep = KeepFp32(nodes=frozenset({"squared", "mean"}))
    mixed = lower_precision(_chain(1000), "fp16", keep)
    assert np.isinf(GraphModel(emulated(mixed))(_X)["y"]).all()  # the mean itself is too large
    keep = KeepFp32(nodes=frozenset({"squared", "mean", "root"}))
    mixed = lower_precision(_chain(1000), "fp16", keep)
    exact = GraphModel(_chain(1000))(_X)["y"]
    np.testing.assert_allclose(GraphModel(emulated(mixed))(_X)["y"], exact, rtol=1e-3)


def test_a_constant_beyond_the_range_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'scale' reaches 1e\+06, beyond the range of FLOAT16"):
        lower_precision(_chain(1e6), "fp16")
    assert lower_precision(_chain(1e6), "bf16")


def test_a_node_that_is_not_there_cannot_be_kept(toy):
    with pytest.raises(ValueError, match="no node is called"):
        lower_precision(toy, "fp16", KeepFp32(nodes=frozenset({"nobody"})))


def test_control_flow_is_refused():
    branch = helper.make_graph(
        [], "empty", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    )
    model = _chain(1)
    model.graph.node.append(
        helper.make_node("If", ["x"], ["z"], then_branch=branch, else_branch=branch)
    )
    with pytest.raises(ValueError, match="control flow"):
        lower_precision(model, "fp16")


def _normalization(kind, shape, rng):
    size = shape[-1] if kind == "LayerNormalization" else shape[1]
    axis = {"axis": -1} if kind == "LayerNormalization" else {}
    names = ["x", "scale", "bias"]
    graph = helper.make_graph(
        [helper.make_node(kind, names, ["y"], name="norm", epsilon=1e-3, **axis)],
        "norm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(shape))],
        [constant(n, rng.normal(size=size).astype(np.float32)) for n in names[1:]],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@given(
    kind=st.sampled_from(["LayerNormalization", "InstanceNormalization"]),
    shape=st.tuples(*[st.integers(2, 5)] * 4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_a_normalization_written_out_is_the_same_function(kind, shape, seed):
    rng = np.random.default_rng(seed)
    model = _normalization(kind, shape, rng)
    x = {"x": rng.normal(size=shape).astype(np.float32)}
    written = expand_normalizations(model)
    assert kind not in {node.op_type for node in written.graph.node}
    np.testing.assert_allclose(
        GraphModel(written)(x)["y"], GraphModel(model)(x)["y"], rtol=1e-4, atol=1e-5
    )
