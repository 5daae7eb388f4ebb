"""Half the file size without changing a result: float16 storage of weights that fit it exactly."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from export.onnx_files import EXTERNAL_DATA_BYTES, save_onnx

_MIN_ELEMENTS = 1024
"""Smaller weights are left alone; a cast costs more than it saves."""


def round_weights_(module: nn.Module) -> None:
    """Round every parameter to the nearest float16 value, in place, still stored as float32.

    PyTorch and the exported graph then hold the same numbers, and parity is measured on them.

    Raises:
        ValueError: A weight is beyond float16's range.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            rounded = parameter.half().float()
            if not torch.isfinite(rounded).all():
                raise ValueError(f"{name} has values beyond float16's range (65504)")
            parameter.copy_(rounded)


def store_weights_as_half(path: Path, *, external_above: int = EXTERNAL_DATA_BYTES) -> None:
    """Store each weight of an ONNX file as float16 where that loses nothing, with a cast behind it.

    ONNX Runtime folds the casts when it opens the file, so nothing is slower afterwards.

    Args:
        path: The ``.onnx`` file, with its weights beside it or not.
        external_above: See ``onnx_from_module``.
    """
    model = onnx.load(path)
    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        half = values.astype(np.float16)
        if values.size < _MIN_ELEMENTS or not np.array_equal(half.astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, name=f"{name}.half"))
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    save_onnx(model, path, external_above=external_above)
