"""Between Triton's request and response objects and arrays.

Importable only inside Triton's Python backend, which brings ``triton_python_backend_utils``.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from weaksam_rt.contracts import ModelContract
from weaksam_rt.errors import (
    ArtifactError,
    InferenceError,
    InferenceTimeoutError,
    ServerUnavailableError,
    WeakSamError,
)
from weaksam_rt.prompt_clustering import as_array
from weaksam_rt.wire_errors import text_from_error

_LOGGER = logging.getLogger(__name__)


def arrays_of(request: Any, contract: ModelContract) -> dict[str, NDArray[Any]]:
    """The request's inputs by name, checked; views of Triton's memory, valid until the response.

    A tensor on a GPU, which Triton passes only to models that ask for it, is a ``DeviceArray``.

    Raises:
        ContractError: An input is missing or differs from the contract.
    """
    arrays = {tensor.name(): _array(tensor) for tensor in request.inputs()}
    contract.check_inputs(arrays)
    return arrays


def response_of(arrays: Mapping[str, NDArray[Any]]) -> Any:
    """A response with these outputs."""
    tensors = [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in arrays.items()]
    return pb_utils.InferenceResponse(output_tensors=tensors)


def error_response_of(error: Exception, model: str) -> Any:
    """A response that fails this request alone; the client raises the same kind of error again.

    An exception that is not ours is a bug: it is logged with its traceback and reported as such.
    """
    if not isinstance(error, (WeakSamError, ValueError)):
        _LOGGER.error("%s failed", model, exc_info=error)
        error = InferenceError(
            f"internal error in {model} ({type(error).__name__}: {error}); "
            "the server's log has the details"
        )
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError(text_from_error(error), _code(error))
    )


def _code(error: WeakSamError | ValueError) -> int:
    """Triton's code, which decides the gRPC status; the names exist only once a model runs."""
    codes = pb_utils.TritonError
    match error:
        case ServerUnavailableError() | InferenceTimeoutError():
            return codes.UNAVAILABLE
        case ArtifactError() | InferenceError():
            return codes.INTERNAL
    return codes.INVALID_ARG


def _array(tensor: Any) -> NDArray[Any]:
    array: Any = (
        tensor.as_numpy() if tensor.is_cpu() else as_array(tensor.name(), tensor.to_dlpack())
    )
    return array
