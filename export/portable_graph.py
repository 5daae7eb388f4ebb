"""A graph in operators and types that every engine builder takes."""

import onnx
from onnx import TensorProto, helper

from export.onnx_graph import plain_model, replace_nodes

_MOVES = frozenset(["Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"])


def portable_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with its byte images cast to float first and moved afterwards.

    TensorRT takes bytes as inputs and lets nothing but a cast read them. All 256 values are exact
    in every float type.

    Raises:
        ValueError: Something computes with the bytes.
    """
    plain = plain_model(model)
    bytes_inputs = [
        value.name
        for value in plain.graph.input
        if value.type.tensor_type.elem_type == TensorProto.UINT8
    ]
    for name in bytes_inputs:
        _cast_first_(plain, name)
    return plain


def _cast_first_(model: onnx.ModelProto, name: str) -> None:
    as_float = f"{name}::float"
    moved = {name: as_float}
    nodes = [helper.make_node("Cast", [name], [as_float], name=as_float, to=TensorProto.FLOAT)]
    for node in model.graph.node:
        if node.input and node.input[0] in moved and node.op_type in _MOVES:
            moved[node.output[0]] = node.output[0]
            node.input[0] = moved[node.input[0]]
        elif node.op_type in ("Cast", "Shape") and node.input[0] in moved:
            node.input[0] = moved[node.input[0]]
        elif any(read in moved for read in node.input):
            raise ValueError(
                f"{node.op_type} {node.name!r} computes with the bytes of input {name!r}; cast "
                "them to float32 in the model"
            )
        nodes.append(node)
    replace_nodes(model, nodes)
