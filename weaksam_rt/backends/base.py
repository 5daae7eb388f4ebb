"""The one seam between the pipeline and whatever runs the models."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


@runtime_checkable
class InferenceBackend(Protocol):
    """Runs engine models by name, with the tensors of their contracts.

    Asynchronous, because a server can run the models of several images at once; a local backend
    answers before it returns.
    """

    async def infer(
        self, model: str, inputs: Arrays, outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Run ``model``.

        Args:
            model: A name in ``contracts.ENGINE_MODELS``.
            inputs: Every input of the contract, with the batch axis where the contract has one.
            outputs: Names of the outputs wanted; None means all.

        Raises:
            WeakSamError: The model is not there, refuses the inputs, or fails.
        """
        ...
