"""What the passes over ONNX graphs share: a graph in plain form, and the types in it.

Plain: no functions or subgraphs, every constant an initialiser, every node named. Our exporter
writes nothing else; a foreign graph that cannot be brought to it is refused.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto, helper, numpy_helper

_SHAPE_CONSTANT = 1024
"""Elements of a constant that shape inference may need the values of."""


def plain_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose constants are float32 initialisers and whose nodes have unique names.

    Casts of initialisers (weights stored as float16) and identities are folded away.

    Raises:
        ValueError: The model has functions or control flow.
    """
    _refuse_subgraphs(model)
    model = copy.deepcopy(model)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    renamed: dict[str, str] = {}
    outputs = {value.name for value in graph.output}
    nodes = []
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        folded = _folded(node, constants)
        if folded is not None:
            constants[node.output[0]] = folded
        elif node.op_type == "Identity" and node.output[0] not in outputs:
            renamed[node.output[0]] = node.input[0]
        else:
            nodes.append(node)
    replace_nodes(model, nodes)
    replace_initializers(model, constants.values())
    _name_nodes(model)
    del graph.value_info[:]
    return model


def replace_nodes(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Put ``nodes`` in the place of the graph's own."""
    nodes = list(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def replace_initializers(model: onnx.ModelProto, tensors: Iterable[TensorProto]) -> None:
    """Put those of ``tensors`` that are read in the place of the graph's own."""
    used = {name for node in model.graph.node for name in node.input}
    used |= {value.name for value in model.graph.output}
    tensors = [tensor for tensor in tensors if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """ONNX element type of every tensor in a plain graph, by name."""
    types = {name: value.type.tensor_type.elem_type for name, value in _inferred(model).items()}
    return types | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def ranks(model: onnx.ModelProto) -> dict[str, int]:
    """Number of axes of every tensor whose rank is known, by name."""
    return {
        name: len(value.type.tensor_type.shape.dim)
        for name, value in _inferred(model).items()
        if value.type.tensor_type.HasField("shape")
    }


def constant(name: str, values: NDArray[Any] | np.generic) -> TensorProto:
    """An initialiser."""
    return numpy_helper.from_array(np.asarray(values), name=name)


def float_output(name: str) -> onnx.ValueInfoProto:
    """A float32 output of any shape."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def _inferred(model: onnx.ModelProto) -> Mapping[str, onnx.ValueInfoProto]:
    """Value infos of all tensors. Weights are left out of what is inferred on: a large model's
    would not fit into the message that goes to the library.
    """
    skeleton = onnx.ModelProto()
    skeleton.ir_version = model.ir_version
    skeleton.opset_import.extend(model.opset_import)
    graph = skeleton.graph
    graph.name = "types"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if int(np.prod(tensor.dims)) <= _SHAPE_CONSTANT:
            graph.initializer.append(tensor)
        else:
            graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    return {value.name: value for value in values}


def _refuse_subgraphs(model: onnx.ModelProto) -> None:
    kinds = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
    inner = [n.op_type for n in model.graph.node if any(a.type in kinds for a in n.attribute)]
    if inner or len(model.functions):
        raise ValueError(
            f"the graph has control flow ({sorted(set(inner))}) or {len(model.functions)} "
            "functions; inline them before its types are changed"
        )


def _folded(node: onnx.NodeProto, constants: Mapping[str, TensorProto]) -> TensorProto | None:
    """The initialiser that ``node`` amounts to: a constant, or a cast of one."""
    if node.op_type == "Constant":
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if value is None:
            raise ValueError(f"constant {node.output[0]!r} is not a tensor")
        return constant(node.output[0], numpy_helper.to_array(value))
    if node.op_type == "Cast" and node.input[0] in constants:
        target = helper.tensor_dtype_to_np_dtype(node.attribute[0].i)
        values = numpy_helper.to_array(constants[node.input[0]])
        return constant(node.output[0], values.astype(target))
    return None


def _name_nodes(model: onnx.ModelProto) -> None:
    """Keep given names where unique; else the operator and the output, which is unique."""
    seen: set[str] = set()
    for node in model.graph.node:
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}:{node.output[0]}"
        seen.add(node.name)
