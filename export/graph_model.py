"""An ONNX graph in memory as a model function, as it stands: no optimiser may change its types."""

from collections.abc import Sequence
from typing import Any

import onnx
import onnxruntime
from numpy.typing import NDArray

from weaksam_rt.backends.base import Arrays


class GraphModel:
    """Runs on the CPU."""

    def __init__(self, model: onnx.ModelProto, *, optimized: bool = False) -> None:
        """Open a session.

        Args:
            model: At most 2 GB.
            optimized: Let ONNX Runtime fuse; it may then leave out roundings.
        """
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(
        self, inputs: Arrays, outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Outputs by name; None: all."""
        names = outputs or [value.name for value in self._session.get_outputs()]
        return dict(zip(names, self._session.run(list(names), dict(inputs)), strict=True))
