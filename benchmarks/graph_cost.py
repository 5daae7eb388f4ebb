"""What an ONNX graph costs at given input shapes: operations, bytes, memory; nothing is run.

Shapes come from the exporter's own symbolic shapes where it wrote them (``4*batch``), else from
ONNX's shape inference. Only products of matrices and convolutions are counted as operations, 2 for
each multiply-add, as PyTorch's ``FlopCounterMode`` does; the rest is bounded by bytes.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, ValueInfoProto, helper

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphCost:
    """Costs of one call."""

    flops: float
    """Multiplications and additions in convolutions and matrix products."""
    weight_bytes: int
    """Weights, in float32, as they are computed with."""
    io_bytes: int
    """Inputs and outputs."""
    activation_bytes: int
    """Most that is alive at one time between the operators, in the file's order, without reuse in
    place."""

    @property
    def least_bytes(self) -> int:
        """That must be read or written at least: weights once, inputs and outputs once."""
        return self.weight_bytes + self.io_bytes


def load_graph(path: Path) -> ModelProto:
    """The model at ``path``, with its weights."""
    return onnx.load(path)


def cost_of_model(model: ModelProto, inputs: Shapes) -> GraphCost:
    """Costs of one call with inputs of these shapes.

    Raises:
        ValueError: An input is missing or does not fit, or the shape of a counted operator's
            tensor cannot be told.
    """
    bound = _bind(model, inputs)
    graph = bound.graph
    shapes = _known_shapes(graph)
    sizes = _byte_sizes(graph, shapes)
    io_names = [value.name for value in (*graph.input, *graph.output)]
    return GraphCost(
        flops=float(sum(_node_flops(node, shapes) for node in graph.node)),
        weight_bytes=sum(
            4 * math.prod(t.dims) for t in graph.initializer if t.data_type in _FLOAT_TYPES
        ),
        io_bytes=sum(sizes.get(name, 0) for name in io_names),
        activation_bytes=_most_alive(graph, sizes),
    )


_FLOAT_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


# ---------------------------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------------------------


def _bind(model: ModelProto, inputs: Shapes) -> ModelProto:
    """A copy with the inputs' sizes in place of their symbols, all over the graph."""
    bound = ModelProto()
    bound.CopyFrom(model)
    symbols: dict[str, int] = {}
    for value in bound.graph.input:
        if value.name not in inputs:
            raise ValueError(f"no shape for input {value.name!r}; got {sorted(inputs)}")
        _bind_input(value, inputs[value.name], symbols)
    for value in (*bound.graph.value_info, *bound.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                size = _evaluate(dim.dim_param, symbols)
                dim.Clear()
                if size is not None:
                    dim.dim_value = size
    return onnx.shape_inference.infer_shapes(bound, data_prop=True)


def _bind_input(value: ValueInfoProto, shape: Shape, symbols: dict[str, int]) -> None:
    dims = value.type.tensor_type.shape.dim
    if len(dims) != len(shape):
        raise ValueError(f"input {value.name!r} has {len(dims)} axes, got shape {list(shape)}")
    for dim, size in zip(dims, shape, strict=True):
        if dim.HasField("dim_param"):
            expected = symbols.setdefault(dim.dim_param, size)
        else:
            expected = dim.dim_value
        if expected != size:
            raise ValueError(f"input {value.name!r}: got {list(shape)}, expected {expected} there")
        dim.dim_value = size


def _evaluate(expression: str, symbols: Mapping[str, int]) -> int | None:
    """An exporter's dimension such as ``150*s40`` or ``s55 + 5``; None if it is not understood."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name) if name in symbols:
                return symbols[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
        raise ValueError(expression)

    try:
        return value(ast.parse(expression, mode="eval").body)
    except (ValueError, SyntaxError):
        return None


def _known_shapes(graph: GraphProto) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {t.name: tuple(t.dims) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            shapes[value.name] = tuple(d.dim_value for d in tensor.shape.dim)
    return shapes


# ---------------------------------------------------------------------------------------------
# Operations
# ---------------------------------------------------------------------------------------------


def _node_flops(node: NodeProto, shapes: Shapes) -> int:
    count = _COUNTERS.get(node.op_type)
    if count is None:
        return 0
    try:
        operands = [shapes[name] for name in node.input if name]
        return count(node, operands, shapes[node.output[0]])
    except KeyError as error:
        raise ValueError(
            f"the shape of {error} at {node.op_type} {node.name!r} cannot be told; export the "
            "model with shapes, or give all inputs their sizes"
        ) from error


def _convolution(node: NodeProto, operands: Sequence[Shape], output: Shape) -> int:
    # Weights are [out, in / groups, kernel...].
    return 2 * math.prod(output) * math.prod(operands[1][1:])


def _transposed_convolution(node: NodeProto, operands: Sequence[Shape], output: Shape) -> int:
    # Weights are [in, out / groups, kernel...]: each input value is spread over them.
    return 2 * math.prod(operands[0]) * math.prod(operands[1][1:])


def _matrix_product(node: NodeProto, operands: Sequence[Shape], output: Shape) -> int:
    return 2 * math.prod(output) * operands[0][-1]


def _gemm(node: NodeProto, operands: Sequence[Shape], output: Shape) -> int:
    is_transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return 2 * math.prod(output) * operands[0][0 if is_transposed else 1]


def _einsum(node: NodeProto, operands: Sequence[Shape], output: Shape) -> int:
    (equation,) = (a.s.decode() for a in node.attribute if a.name == "equation")
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if len(terms) != 2 or "." in equation:
        raise ValueError(f"einsum {equation!r} is not counted; only products of two tensors are")
    sizes = {
        letter: size
        for term, shape in zip(terms, operands, strict=True)
        for letter, size in zip(term, shape, strict=True)
    }
    return 2 * math.prod(sizes.values())


def _attention(node: NodeProto, operands: Sequence[Shape], output: Shape) -> int:
    query, key, value = operands[:3]
    if len(query) != 4:
        heads = {a.name: a.i for a in node.attribute if a.type == AttributeProto.INT}
        pairs = query[0] * heads["q_num_heads"] * query[1] * key[1]
        return 2 * pairs * (query[2] // heads["q_num_heads"] + value[2] // heads["kv_num_heads"])
    pairs = query[0] * query[1] * query[2] * key[2]
    return 2 * pairs * (query[3] + value[3])


_COUNTERS: Mapping[str, Callable[[NodeProto, Sequence[Shape], Shape], int]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "MatMul": _matrix_product,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "Attention": _attention,
}


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


def _byte_sizes(graph: GraphProto, shapes: Shapes) -> dict[str, int]:
    sizes = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type.elem_type
        if value.name in shapes and kind:
            width = helper.tensor_dtype_to_np_dtype(kind).itemsize
            sizes[value.name] = width * math.prod(shapes[value.name])
    return sizes


def _most_alive(graph: GraphProto, sizes: Mapping[str, int]) -> int:
    """Bytes of the tensors that are alive at once: from the node that makes them to the last that
    reads them. Values made of weights alone are folded when a session opens and count as none.
    """
    constant = {t.name for t in graph.initializer}
    last_use: dict[str, int] = {}
    made: list[list[str]] = []
    for step, node in enumerate(graph.node):
        if all(name in constant for name in node.input):
            constant.update(node.output)
        made.append([name for name in node.output if name not in constant])
        last_use.update(dict.fromkeys(node.input, step))
    forever = len(graph.node)
    last_use.update({value.name: forever for value in graph.output})
    alive, most = 0, 0
    ends: dict[int, int] = {}
    for step, names in enumerate(made):
        for name in names:
            alive += sizes.get(name, 0)
            end = last_use.get(name, step)
            ends[end] = ends.get(end, 0) + sizes.get(name, 0)
        most = max(most, alive)
        alive -= ends.get(step, 0)
    return most
