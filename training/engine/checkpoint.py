"""Checkpoints without pickle: tensors in safetensors, everything else as JSON in its header,
written atomically.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from weaksam_rt.errors import ArtifactError, WeakSamError
from weaksam_rt.files import atomic_path

_OPTIMIZER = "optimizer"
_RNG = "rng.torch"
_CUDA_RNG = "rng.cuda"
"""Only where CUDA was used; of the process's own GPU."""


class DivergedError(WeakSamError):
    """Training has gone wrong: a loss or weight is not finite, or the loss grows without end."""


def save_weights(path: Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata to one ``.safetensors`` file, atomically."""
    tensors = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()
    }
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"json": json.dumps(dict(metadata))})
        except SafetensorError as error:
            raise OSError(
                f"cannot write {path}: {error}; the file before it is untouched"
            ) from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file, or of a ``.pt`` / ``.pth`` state dict, by itself or under
    ``model`` (tensors only, no code is run).

    Raises:
        ArtifactError: The file is missing or damaged, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        state: dict[str, Tensor] = content.get("model", content)
        others = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if others:
            raise ValueError(f"no state dict: {others[:5]} are no tensors")
        return dict(state)
    except Exception as error:
        raise ArtifactError(f"cannot read weights from {path}: {error}") from error


def load_metadata(path: Path) -> dict[str, Any]:
    """The JSON metadata that ``save_weights`` put beside the tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            content: dict[str, Any] = json.loads((file.metadata() or {}).get("json", "{}"))
    except Exception as error:
        raise ArtifactError(f"cannot read metadata from {path}: {error}") from error
    return content


def save_checkpoint(
    path: Path,
    *,
    modules: Mapping[str, nn.Module],
    optimizer: Optimizer,
    step: int,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write all that is needed to go on as if never interrupted: modules, optimiser, step,
    torch's RNG states. Tensors are written from the CPU: a run may go on on another device, where
    it draws other numbers.

    Args:
        path: A ``.safetensors`` file.
        modules: By name; the names are prefixes in the file.
        optimizer: Its tensors are stored; its hyper-parameters must be JSON values.
        step: Steps done.
        extra: More JSON state, for example the epoch and the state of a NumPy generator.

    Raises:
        DivergedError: A weight is not finite; the checkpoint before stays.
        OSError: It cannot be written, for example because the disk is full; likewise.
    """
    for name, module in modules.items():
        _check_finite(module, name, step, path)
    tensors = {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    state = optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}.{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    tensors[_RNG] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors[_CUDA_RNG] = torch.cuda.get_rng_state()
    metadata = {
        "step": step,
        "param_groups": state["param_groups"],
        "optimizer_scalars": scalars,
        "extra": dict(extra or {}),
    }
    save_weights(path, tensors, metadata)


def load_checkpoint(
    path: Path, *, modules: Mapping[str, nn.Module], optimizer: Optimizer
) -> tuple[int, dict[str, Any]]:
    """Restore what ``save_checkpoint`` wrote into the given objects.

    Returns:
        The number of steps done and the ``extra`` state.

    Raises:
        ArtifactError: The file is damaged, or its tensors do not fit the modules.
    """
    tensors, metadata = load_weights(path), load_metadata(path)
    try:
        for name, module in modules.items():
            module.load_state_dict(_below(tensors, name))
        state: dict[int, dict[str, Any]] = {}
        for key, value in _below(tensors, _OPTIMIZER).items():
            index, entry = key.split(".", 1)
            state.setdefault(int(index), {})[entry] = value
        for index, entries in metadata["optimizer_scalars"].items():
            state.setdefault(int(index), {}).update(entries)
        optimizer.load_state_dict({"state": state, "param_groups": metadata["param_groups"]})
        _match_memory_formats_(optimizer)
        torch.set_rng_state(tensors[_RNG])
        if _CUDA_RNG in tensors and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(tensors[_CUDA_RNG])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ArtifactError(
            f"{path} does not fit this model: {error}; delete it to start again"
        ) from error
    return int(metadata["step"]), metadata["extra"]


def _check_finite(module: nn.Module, name: str, step: int, path: Path) -> None:
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            before = f"{path} holds the last good one" if path.is_file() else "there is none before"
            raise DivergedError(
                f"after {step} steps {name}.{key} has values that are not finite; no checkpoint is "
                f"written, {before}. Lower the learning rate (in another folder)."
            )


def _match_memory_formats_(optimizer: Optimizer) -> None:
    """Lay the optimiser's tensors out like their parameters: fused steps pair them by position in
    memory, and files hold the plain layout.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key[len(prefix) + 1 :]: value
        for key, value in tensors.items()
        if key.startswith(prefix + ".")
    }
