"""A float32 ONNX graph to one that says for every node in which precision it computes.

Strongly typed engines (TensorRT 11, TensorRT-RTX) take precisions from the graph and nowhere else.
Each tensor has the type its producer gives it; where a consumer wants another, one cast stands
between them. Inputs and outputs of the graph keep the types of the contract.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import onnx
from onnx import TensorProto, defs, helper, numpy_helper, version_converter

from export.onnx_graph import (
    constant,
    element_types,
    plain_model,
    ranks,
    replace_initializers,
    replace_nodes,
)

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_ELEMENT_TYPE: Mapping[str, int] = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}
_BF16_OPSET = 22
"""The first in which convolution, pooling and normalisation take bfloat16."""
_PART = "::"
"""Between a node's name and a part of it (``expand_normalizations``)."""

_MOVES = frozenset(
    [
        *("Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity"),
        *("Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    ]
)
"""Operators that only move values: they follow the type of what they move."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepFp32:
    """Which nodes go on computing in float32."""

    nodes: frozenset[str] = frozenset()
    """Names of nodes in the plain graph (``onnx_graph.plain_model``)."""
    op_types: frozenset[str] = frozenset()
    """Operators, wherever they stand."""

    def holds(self, node: onnx.NodeProto) -> bool:
        """``node`` stays float32."""
        return node_of(node) in self.nodes or node.op_type in self.op_types


def node_of(part: onnx.NodeProto) -> str:
    """The node of the plain graph that ``part`` is or belongs to."""
    return part.name.partition(_PART)[0]


def lower_precision(
    model: onnx.ModelProto, precision: Precision, keep: KeepFp32 | None = None
) -> onnx.ModelProto:
    """``model`` with every node that can computing in ``precision``.

    Args:
        model: A float32 model; weights stored as float16 are taken for float32.
        precision: ``fp32`` gives the plain model itself.
        keep: Nodes that stay float32; None: none.

    Returns:
        A new model with the same inputs and outputs. Weights of lowered nodes are stored in the
        lower type.

    Raises:
        ValueError: A kept node is not there, a weight is beyond the range of ``precision``, or
            the graph is not plain and cannot be made so.
    """
    keep = keep or KeepFp32()
    plain = plain_model(model)
    unknown = keep.nodes - {node_of(node) for node in plain.graph.node}
    if unknown:
        raise ValueError(f"no node is called {sorted(unknown)}; names are those of plain_model()")
    if precision == "fp32":
        return plain
    if precision == "bf16" and _opset(plain) < _BF16_OPSET:
        plain = version_converter.convert_version(plain, _BF16_OPSET)
        del plain.graph.value_info[:]
    return _Lowering(plain, _ELEMENT_TYPE[precision], keep).result()


def node_names(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names by which ``KeepFp32`` knows the nodes that a lower precision would change."""
    plain = plain_model(model)
    types = element_types(plain)
    return tuple(
        node.name
        for node in plain.graph.node
        if node.op_type not in (*_MOVES, "Cast")
        and any(types.get(name) == TensorProto.FLOAT for name in (*node.input, *node.output))
    )


def low_share(model: onnx.ModelProto) -> float:
    """Share of the computing float nodes of ``model`` that do not compute in float32, in [0, 1]."""
    types = element_types(model)
    counts: Counter[bool] = Counter()
    for node in model.graph.node:
        kinds = {types.get(name) for name in node.output}
        if node.op_type not in (*_MOVES, "Cast") and kinds & set(_ELEMENT_TYPE.values()):
            counts[TensorProto.FLOAT not in kinds] += 1
    return counts[True] / max(counts.total(), 1)


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` computing in float32 with every result of a low-precision node rounded.

    A CPU has no arithmetic of its own for bfloat16, and ONNX Runtime widens float16 nodes and may
    leave out the rounding between them; so overflow would not show. Tensor cores multiply rounded
    numbers and add in float32, which is what this computes. What an engine does inside one fused
    operator it may do better or worse.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    types = element_types(result)
    low = {kind for name, kind in _ELEMENT_TYPE.items() if name != "fp32"}
    nodes: list[onnx.NodeProto] = []
    for node in result.graph.node:
        touched = [n for n in (*node.input, *node.output) if types.get(n) in low]
        if not touched or node.op_type in (*_MOVES, "Cast"):
            nodes.append(node)
            continue
        inside = {name: f"{name}{_PART}{len(nodes)}" for name in touched}
        before = [_cast(n, inside[n], TensorProto.FLOAT) for n in node.input if n in inside]
        after = [_cast(inside[n], n, types[n]) for n in node.output if n in inside]
        node.input[:] = [inside.get(name, name) for name in node.input]
        node.output[:] = [inside.get(name, name) for name in node.output]
        nodes += [*{cast.output[0]: cast for cast in before}.values(), node, *after]
    replace_nodes(result, nodes)
    return result


def expand_normalizations(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with its fused normalisations written as arithmetic, one rounding after each step.

    ONNX lets an engine compute them in either precision. Written out, a low precision shows the
    worst of it: the squares of what is normalised may overflow.
    """
    plain = plain_model(model)
    of_rank = ranks(plain)
    nodes: list[onnx.NodeProto] = []
    constants = list(plain.graph.initializer)
    for node in plain.graph.node:
        if node.op_type not in ("LayerNormalization", "InstanceNormalization"):
            nodes.append(node)
            continue
        added, new = _written_out(node, of_rank[node.input[0]])
        nodes += added
        constants += new
    replace_nodes(plain, nodes)
    replace_initializers(plain, constants)
    return plain


@dataclass
class _Lowering:
    """One run of ``lower_precision`` over a plain model."""

    model: onnx.ModelProto
    low: int
    keep: KeepFp32
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    native: dict[str, int] = field(default_factory=dict)
    """Type of each float tensor as its producer gives it."""
    casts: dict[tuple[str, int], str] = field(default_factory=dict)

    def result(self) -> onnx.ModelProto:
        graph = self.model.graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        floats = {n for n, kind in element_types(self.model).items() if kind == TensorProto.FLOAT}
        self.native = dict.fromkeys(floats, TensorProto.FLOAT)
        outputs = {value.name for value in graph.output}
        for node in graph.node:
            self._lower(node, outputs)
        replace_nodes(self.model, self.nodes)
        replace_initializers(self.model, self.constants.values())
        return self.model

    def _lower(self, node: onnx.NodeProto, outputs: set[str]) -> None:
        typed_inputs, typed_outputs = _positions_of_low(node, self.low, _opset(self.model))
        typed_inputs = [i for i in typed_inputs if node.input[i] in self.native]
        typed_outputs = [i for i in typed_outputs if node.output[i] in self.native]
        kind = self._kind_of(node, typed_inputs)
        for i, name in enumerate(node.input):
            if name in self.native and node.op_type != "Cast":
                wanted = kind if i in typed_inputs else TensorProto.FLOAT
                node.input[i] = self._as(name, wanted)
        self.nodes.append(node)
        for i in typed_outputs:
            name = node.output[i]
            if kind == TensorProto.FLOAT:
                continue
            if name in outputs:
                node.output[i] = f"{name}{_PART}low"
                self.nodes.append(_cast(node.output[i], name, TensorProto.FLOAT))
            else:
                self.native[name] = kind

    def _kind_of(self, node: onnx.NodeProto, typed_inputs: list[int]) -> int:
        """The type in which ``node`` computes."""
        if self.keep.holds(node) or node.op_type == "Cast":
            return TensorProto.FLOAT
        if node.op_type in _MOVES:
            moved = {
                self.native[node.input[i]]
                for i in typed_inputs
                if node.input[i] not in self.constants
            }
            return self.low if moved == {self.low} else TensorProto.FLOAT
        return self.low if typed_inputs else TensorProto.FLOAT

    def _as(self, name: str, kind: int) -> str:
        """The name under which tensor ``name`` has type ``kind``."""
        if self.native[name] == kind:
            return name
        key = (name, kind)
        if key not in self.casts:
            self.casts[key] = f"{name}{_PART}{TensorProto.DataType.Name(kind).lower()}"
            if name in self.constants:
                self.constants[self.casts[key]] = _rounded(
                    self.constants[name], self.casts[key], kind
                )
            else:
                self.nodes.append(_cast(name, self.casts[key], kind))
        return self.casts[key]


def _positions_of_low(node: onnx.NodeProto, low: int, opset: int) -> tuple[list[int], list[int]]:
    """Inputs and outputs of ``node`` whose type may be ``low`` in place of float32."""
    schema = defs.get_schema(node.op_type, opset, node.domain)
    name = f"tensor({TensorProto.DataType.Name(low).lower()})"
    allows = {
        constraint.type_param_str
        for constraint in schema.type_constraints
        if {name, "tensor(float)"} <= set(constraint.allowed_type_strs)
    }
    shared = {formal.type_str for formal in schema.inputs} if node.op_type != "Cast" else set()

    def of(formals: Iterable[defs.OpSchema.FormalParameter], names: Iterable[str]) -> list[int]:
        formals = list(formals)
        kinds = [formals[min(i, len(formals) - 1)].type_str for i, _ in enumerate(names)]
        return [i for i, kind in enumerate(kinds) if kind in allows & shared]

    return of(schema.inputs, node.input), of(schema.outputs, node.output)


def _rounded(tensor: TensorProto, name: str, kind: int) -> TensorProto:
    values = numpy_helper.to_array(tensor)
    with np.errstate(over="ignore"):
        rounded = values.astype(helper.tensor_dtype_to_np_dtype(kind))
    if not np.array_equal(np.isfinite(rounded.astype(np.float32)), np.isfinite(values)):
        raise ValueError(
            f"constant {tensor.name!r} reaches {np.abs(values).max():g}, beyond the range of "
            f"{TensorProto.DataType.Name(kind)}; keep what reads it in float32"
        )
    return constant(name, rounded)


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{_PART}cast{_PART}{target}", to=kind)


def _written_out(node: onnx.NodeProto, rank: int) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """(x - mean) / sqrt(mean of squares + epsilon) * scale + bias, node by node."""
    is_layer = node.op_type == "LayerNormalization"
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    axis = values.get("axis", -1) % rank
    axes = list(range(axis, rank)) if is_layer else list(range(2, rank))
    x, scale, *bias = node.input

    def name(part: str) -> str:
        return f"{node.name}{_PART}{part}"

    new = [
        constant(name("axes"), np.array(axes, np.int64)),
        constant(name("epsilon"), np.float32(values.get("epsilon", 1e-5))),
    ]
    steps: list[tuple[str, list[str], str]] = [
        ("ReduceMean", [x, name("axes")], "mean"),
        ("Sub", [x, name("mean")], "centred"),
        ("Mul", [name("centred"), name("centred")], "squared"),
        ("ReduceMean", [name("squared"), name("axes")], "variance"),
        ("Add", [name("variance"), name("epsilon")], "shifted"),
        ("Sqrt", [name("shifted")], "deviation"),
        ("Div", [name("centred"), name("deviation")], "normalized"),
    ]
    affine = [("Mul", scale, "scaled"), *(("Add", b, "biased") for b in bias)]
    for op_type, parameter, part in affine:
        source = name(steps[-1][2])
        if not is_layer:
            shape = constant(name(f"{part}_shape"), np.array([-1] + [1] * (rank - 2), np.int64))
            new.append(shape)
            steps.append(("Reshape", [parameter, shape.name], f"{part}_by"))
            parameter = name(f"{part}_by")
        steps.append((op_type, [source, parameter], part))
    nodes = [helper.make_node(op, inputs, [name(out)], name=name(out)) for op, inputs, out in steps]
    nodes[-1].output[0] = node.output[0]
    return nodes, new


def _opset(model: onnx.ModelProto) -> int:
    return next(int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx"))
