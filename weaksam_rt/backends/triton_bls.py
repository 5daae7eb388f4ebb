"""Models of the same Triton server, called from inside one of its Python models.

Importable only inside Triton's Python backend, which brings ``triton_python_backend_utils``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from weaksam_rt.backends.base import Arrays
from weaksam_rt.contracts import ModelContract
from weaksam_rt.errors import InferenceError
from weaksam_rt.wire_errors import error_from_text


class BlsBackend:
    """An ``InferenceBackend`` over the server's own queue: no network, arrays in shared memory."""

    def __init__(
        self,
        contracts: Mapping[str, ModelContract],
        versions: Mapping[str, int],
        *,
        is_blocking: bool = False,
    ) -> None:
        """Call the models of these contracts, by name, each in one version.

        Args:
            contracts: By model.
            versions: By model; only these are called.
            is_blocking: Wait for each answer in the calling thread. A call costs two changes of
                thread less (ADR 0019), and nothing else of the event loop runs meanwhile.
        """
        self._contracts = {name: contracts[name] for name in versions}
        self._versions = dict(versions)
        self._is_blocking = is_blocking

    async def infer(
        self, model: str, inputs: Arrays, outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """See ``InferenceBackend.infer``."""
        if model not in self._contracts:
            raise InferenceError(f"{model!r} is not served here; {sorted(self._contracts)} are")
        contract = self._contracts[model]
        contract.check_inputs(inputs)
        names = [spec.name for spec in contract.outputs] if outputs is None else list(outputs)
        request = pb_utils.InferenceRequest(
            model_name=model,
            model_version=self._versions[model],
            requested_output_names=names,
            inputs=[
                pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in inputs.items()
            ],
        )
        response = request.exec() if self._is_blocking else await request.async_exec()
        if response.has_error():
            message = response.error().message()
            raise error_from_text(message) or InferenceError(f"{model}: {message}")
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
