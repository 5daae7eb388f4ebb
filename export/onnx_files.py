"""ONNX files: one file, or, beyond what protobuf can hold, a graph and its weights beside it."""

import os
import tempfile
from pathlib import Path

import onnx

from weaksam_rt.artifacts import external_data_path

EXTERNAL_DATA_BYTES = 1_900_000_000
"""Weights beyond this go to a second file; protobuf ends at 2 GiB."""
_SMALL_TENSOR = 1024
"""Bytes of a tensor that stays in the graph in any case: axes and shapes are read from there."""


def save_onnx(
    model: onnx.ModelProto, path: Path, *, external_above: int = EXTERNAL_DATA_BYTES
) -> None:
    """Write ``model`` so that a kill leaves each file either old or new.

    Args:
        model: Its weights are moved out of it where they go to a second file.
        path: The ``.onnx`` file; ``external_data_path(path)`` is written or removed beside it.
        external_above: Bytes of weights that still go into the one file.
    """
    weights = external_data_path(path)
    is_external = weight_bytes(model) > external_above
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        graph = Path(folder) / path.name
        onnx.save(
            model,
            graph,
            save_as_external_data=is_external,
            location=weights.name,
            size_threshold=_SMALL_TENSOR,
        )
        publish_onnx(graph, path)


def publish_onnx(source: Path, path: Path) -> None:
    """Move an ONNX file, and its weights where they lie beside it, to ``path`` on the same disk.

    A graph without its weights is refused by its manifest's hash, so the order is safe.
    """
    if external_data_path(source).is_file():
        _publish(external_data_path(source), external_data_path(path))
    else:
        external_data_path(path).unlink(missing_ok=True)
    _publish(source, path)


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all initialisers."""
    return sum(len(tensor.raw_data) or tensor.ByteSize() for tensor in model.graph.initializer)


def _publish(source: Path, target: Path) -> None:
    with source.open("rb+") as file:
        os.fsync(file.fileno())
    source.chmod(0o644)
    source.replace(target)
