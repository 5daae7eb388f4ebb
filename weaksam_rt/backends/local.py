"""Models in this process, each a plain function from input arrays to output arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from weaksam_rt.backends.base import Arrays
from weaksam_rt.errors import InferenceError

ModelFunction = Callable[[Arrays, Sequence[str] | None], dict[str, NDArray[Any]]]
"""Inputs and wanted outputs (None: all) to outputs."""


class LocalBackend:
    """An ``InferenceBackend`` over functions: ONNX Runtime sessions, torch modules, or a test's
    own.
    """

    def __init__(self, models: Mapping[str, ModelFunction]) -> None:
        """Serve ``models`` by name."""
        self._models = dict(models)

    async def infer(
        self, model: str, inputs: Arrays, outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """See ``InferenceBackend.infer``."""
        if model not in self._models:
            raise InferenceError(f"no model {model!r} here; there are {sorted(self._models)}")
        return self._models[model](inputs, outputs)
