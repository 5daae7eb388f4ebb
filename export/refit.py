"""New weights in an existing engine: the graph stays as it was built, only its weights change.

Whether a refit engine is right is not argued here: it ends with the same comparison with PyTorch
as a fresh export (``export.accept``).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import nn

from weaksam_rt.artifacts import ModelArtifact
from weaksam_rt.errors import WeakSamError
from weaksam_rt.files import atomic_path

_HALF = ".half"
"""What ``store_weights_as_half`` appends to a weight's name."""
_NUMPY_OF: dict[int, np.dtype[Any]] = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
}
_TRANSPOSED = "^T"
"""Behind a weight's name: the graph holds its transpose, as a matrix product wants it."""
_NAMED = 3
"""How many names an error lists."""


class RefitError(WeakSamError):
    """The engine cannot take the weights, or did not; export or build it again instead."""


def tensorrt_refit_refusal(version: str) -> str | None:
    """Why engines of this TensorRT must not be refitted, or None.

    Args:
        version: As in ``11.3.0.14``.

    Source:
        TensorRT 11.3.0's documentation, "Refitting an engine": a refittable engine may give wrong
        numbers, even without a refit (a GEMM's bias can be dropped). The warning is gone from
        11.4.0's.
    """
    major, minor, *_ = version.split(".")
    if (major, minor) == ("11", "3"):
        return (
            f"TensorRT {version} may compute wrong numbers in refittable engines; build the engine "
            "again, or use 11.4 or later"
        )
    return None


def renamed_weights(path: Path, module: nn.Module) -> dict[str, str]:
    """Which constants of an exported graph are weights under another name.

    The exporter keeps most parameters' names; those that it reshaped or transposed became constants
    without a name. They are recognised by their values, which is possible only right after the
    export.

    Args:
        path: An ONNX file, just exported from ``module``.
        module: The weights' owner.

    Returns:
        Names in the graph to names in the module's state, with ``^T`` behind a transposed one. A
        constant that could be several weights (all ones, say) is left out.
    """
    model = onnx.load(path)
    in_graph = {_plain_name(tensor.name): tensor for tensor in model.graph.initializer}
    state = _float_state(module)
    missing = {name: values for name, values in state.items() if name not in in_graph}
    found = {}
    for name, tensor in in_graph.items():
        if name in state or tensor.data_type not in _NUMPY_OF:
            continue
        values = numpy_helper.to_array(tensor).astype(np.float32)
        fitting = [
            key + suffix for key, weight in missing.items() for suffix in _ways_to(weight, values)
        ]
        if len(fitting) == 1:
            found[name] = fitting[0]
    return found


def _ways_to(weight: NDArray[np.float32], values: NDArray[np.float32]) -> list[str]:
    """How ``weight`` becomes ``values``: as it is or reshaped, or transposed."""
    ways = [""] if np.array_equal(weight.ravel(), values.ravel()) else []
    is_matrix = weight.ndim == 2 and 1 not in weight.shape
    return [*ways, *([_TRANSPOSED] if is_matrix and np.array_equal(weight.T, values) else [])]


def refit_onnx(live: ModelArtifact, module: nn.Module, path: Path) -> int:
    """Write the graph of ``live`` with the weights of ``module`` to ``path``, atomically.

    Args:
        live: An exported engine, verified.
        module: Of the same topology.
        path: The new ``.onnx`` file.

    Returns:
        How many weights were replaced.

    Raises:
        RefitError: The weights are not exactly those of the graph: a name, shape or type differs,
            or a weight has no place in it.
    """
    if live.engine != "onnxruntime" or live.extra_files:
        raise RefitError(f"{live.path} is no ONNX file that holds its own weights; export it again")
    model = onnx.load(live.path)
    state, renamed = _float_state(module), live.passport.weights
    replaced = set()
    for tensor in model.graph.initializer:
        plain = _plain_name(tensor.name)
        way = plain if plain in state else renamed.get(plain)
        if way is None:
            continue  # a constant of the graph
        key = way.removesuffix(_TRANSPOSED)
        if key not in state:
            raise RefitError(f"the engine's weight {key} is not in the checkpoint; export it again")
        weight = state[key] if key == way else state[key].T
        values = _stored_as(tensor, weight, by_name=key == plain)
        tensor.CopyFrom(numpy_helper.from_array(values, name=tensor.name))
        replaced.add(key)
    if without_place := sorted(set(state) - replaced):
        raise RefitError(
            f"{len(without_place)} weights have no place in the engine "
            f"({', '.join(without_place[:_NAMED])}); export it again"
        )
    with atomic_path(path) as temporary:
        onnx.save(model, temporary)
    return len(replaced)


def _stored_as(
    tensor: TensorProto, values: NDArray[np.float32], *, by_name: bool
) -> NDArray[np.generic]:
    """``values`` in the shape and type of ``tensor``; without loss or not at all."""
    dims = tuple(tensor.dims)
    if (values.shape != dims) if by_name else (values.size != int(np.prod(dims))):
        raise RefitError(
            f"{tensor.name}: the checkpoint has {list(values.shape)}, the engine {list(dims)}; "
            "the topology differs, export it again"
        )
    dtype = _NUMPY_OF.get(tensor.data_type)
    if dtype is None:
        kind = TensorProto.DataType.Name(tensor.data_type)
        raise RefitError(f"{tensor.name}: the engine stores {kind}, which cannot be refitted")
    stored = values.reshape(dims).astype(dtype)
    if not np.array_equal(stored.astype(np.float32), values.reshape(dims)):
        raise RefitError(f"{tensor.name}: the engine stores {dtype}, which would change the weight")
    return stored


def _float_state(module: nn.Module) -> dict[str, NDArray[np.float32]]:
    state: Mapping[str, Any] = module.state_dict()
    return {
        name: tensor.detach().cpu().float().numpy()
        for name, tensor in state.items()
        if tensor.is_floating_point()
    }


def _plain_name(name: str) -> str:
    return name.removesuffix(_HALF)
