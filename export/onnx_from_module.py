"""A contract-shaped module to an ONNX file; names, dtypes and dynamic axes come from the
contract.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from export.onnx_files import EXTERNAL_DATA_BYTES, save_onnx
from weaksam_rt.contracts import ModelContract

_LOGGER = logging.getLogger(__name__)
OPSET = 18


def onnx_from_module(
    module: nn.Module,
    contract: ModelContract,
    example: Mapping[str, Tensor],
    path: Path,
    *,
    external_above: int = EXTERNAL_DATA_BYTES,
) -> None:
    """Trace ``module`` with torch's dynamo exporter and write an ONNX file, atomically.

    Args:
        module: Takes the contract's inputs in order, gives its outputs in order (a tuple, or one
            tensor). Switched to evaluation here.
        contract: Decides names and which axes vary: the batch axis and every -1.
        example: One array of each input. Sizes of varying axes must be at least 2, because the
            exporter freezes a size of 1.
        path: The ``.onnx`` file.
        external_above: Bytes of weights beyond which they go to a second file beside it.

    Raises:
        ValueError: An example does not fit the contract.
    """
    arrays = {name: tensor.numpy() for name, tensor in example.items()}
    contract.check_inputs(arrays)
    inputs = tuple(example[spec.name] for spec in contract.inputs)
    module.eval()
    with torch.no_grad():
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            dynamic_shapes=dynamic_shapes(contract),
            input_names=[spec.name for spec in contract.inputs],
            output_names=[spec.name for spec in contract.outputs],
            opset_version=OPSET,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    model = program.model_proto
    _forget_origin(model)
    save_onnx(model, path, external_above=external_above)
    _LOGGER.info("exported %s to %s, %.1f MB", contract.name, path, path.stat().st_size / 1e6)


def dynamic_shapes(contract: ModelContract) -> tuple[dict[int, Any], ...]:
    """For each input of a contract, in order, its varying axes as ``torch.export`` takes them."""
    batch = (-1,) if contract.is_batched else ()
    return tuple(
        {
            axis: torch.export.Dim.DYNAMIC
            for axis, size in enumerate((*batch, *spec.shape))
            if size == -1
        }
        for spec in contract.inputs
    )


def _forget_origin(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes on every node: source lines and folders of this machine."""
    functions = [node for function in model.functions for node in function.node]
    parts: list[Any] = [model, model.graph, *model.graph.node, *model.graph.initializer]
    for part in parts + functions:
        del part.metadata_props[:]
        part.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        del value.metadata_props[:]
