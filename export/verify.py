"""An export is accepted because it agrees with PyTorch, not because it runs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weaksam_rt.backends.local import ModelFunction
from weaksam_rt.contracts import ModelContract
from weaksam_rt.errors import WeakSamError


class ParityError(WeakSamError):
    """An exported model differs from its PyTorch module by more than the tolerance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How far an engine may be from PyTorch."""

    max_abs_error: float
    """Largest difference of any element, relative to the output's largest magnitude (at least
    1).
    """
    max_mismatch_share: float = 0.0
    """Share of elements that may exceed it, in [0, 1]: for outputs that a sort reorders at ties."""


FP32 = Tolerance(max_abs_error=1e-4)
"""float32 on both sides: only the order of additions differs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputParity:
    """How well one output agrees over all inputs tried."""

    max_abs_error: float
    """Relative to the output's largest magnitude, at least 1."""
    mismatch_share: float
    """Share of elements beyond the tolerance."""
    num_elements: int


def parity(
    module: nn.Module,
    engine: ModelFunction,
    contract: ModelContract,
    inputs: Sequence[Mapping[str, NDArray[Any]]],
    tolerance: Tolerance,
) -> dict[str, dict[str, float]]:
    """Run both on the same inputs and compare every output.

    Args:
        module: The PyTorch side, contract-shaped.
        engine: The exported side.
        contract: Names the outputs.
        inputs: Several, of different sizes where the contract lets them vary.
        tolerance: For all outputs.

    Returns:
        ``OutputParity`` of each output as a dictionary, for the manifest.

    Raises:
        ParityError: An output is out of tolerance, not finite, or of another shape or dtype.
    """
    worst = {spec.name: (0.0, 0, 0) for spec in contract.outputs}
    for arrays in inputs:
        expected = _run_module(module, contract, arrays)
        for name, got in engine(arrays, None).items():
            error, beyond, count = _difference(contract.name, name, got, expected[name], tolerance)
            before = worst[name]
            worst[name] = (max(before[0], error), before[1] + beyond, before[2] + count)
    report = {
        name: OutputParity(
            max_abs_error=error, mismatch_share=beyond / max(count, 1), num_elements=count
        )
        for name, (error, beyond, count) in worst.items()
    }
    for name, result in report.items():
        if result.mismatch_share > tolerance.max_mismatch_share:
            raise ParityError(
                f"{contract.name}.{name}: {result.mismatch_share:.2%} of the elements differ from "
                f"PyTorch by more than {tolerance.max_abs_error:g} (worst {result.max_abs_error:g})"
                f", allowed is {tolerance.max_mismatch_share:.2%}; the export is not usable"
            )
    return {name: asdict(result) for name, result in report.items()}


def _run_module(
    module: nn.Module, contract: ModelContract, arrays: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    with torch.no_grad():
        answer = module(*(torch.from_numpy(arrays[spec.name]) for spec in contract.inputs))
    tensors = (answer,) if isinstance(answer, Tensor) else tuple(answer)
    names = [spec.name for spec in contract.outputs]
    return {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}


def _difference(
    model: str, name: str, got: NDArray[Any], expected: NDArray[Any], tolerance: Tolerance
) -> tuple[float, int, int]:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise ParityError(
            f"{model}.{name}: PyTorch gives {expected.dtype} {list(expected.shape)}, the engine "
            f"{got.dtype} {list(got.shape)}"
        )
    if not np.isfinite(got).all():
        raise ParityError(f"{model}.{name}: the engine gives values that are not finite")
    if got.size == 0:
        return 0.0, 0, 0
    scale = max(1.0, float(np.abs(expected).max()))
    error = np.abs(got.astype(np.float64) - expected.astype(np.float64)) / scale
    return float(error.max()), int((error > tolerance.max_abs_error).sum()), got.size
