"""One engine as a Triton model: requests of a batch are joined, run once, and taken apart again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weaksam_rt.artifacts import load_artifact
from weaksam_rt.backends.base import Arrays
from weaksam_rt.backends.engines import open_engine
from weaksam_rt.backends.local import ModelFunction
from weaksam_rt.contracts import ModelContract
from weaksam_rt.model_config import THREADS_PARAMETER
from weaksam_rt.serving.batching import split_batch, stack_batch
from weaksam_rt.serving.requests import arrays_of, error_response_of, response_of


class EngineModel:
    """Triton's interface to the artifact that lies beside ``model.py``."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the engine; Triton reports what this raises and does not serve the model."""
        artifact = load_artifact(Path(args["model_repository"]) / args["model_version"])
        parameters = json.loads(args["model_config"])["parameters"]
        self._contract = artifact.contract
        on_gpu = args["model_instance_kind"] == "GPU"
        self._model = open_engine(
            artifact,
            num_threads=int(parameters[THREADS_PARAMETER]["string_value"]),
            device=int(args["model_instance_device_id"]) if on_gpu else 0,
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request: with its outputs, or with its own error."""
        return answer_requests(requests, self._contract, self._model)


def answer_requests(
    requests: Sequence[Any], contract: ModelContract, model: ModelFunction
) -> list[Any]:
    """Run ``model`` once for all good requests, or once for each if there is no batch axis.

    Triton forms batches of at most the contract's size; a request that breaks the contract is
    answered with its error and takes no part in the batch.
    """
    responses: list[Any] = [None] * len(requests)
    good: dict[int, Arrays] = {}
    for position, request in enumerate(requests):
        try:
            good[position] = arrays_of(request, contract)
        except Exception as error:
            responses[position] = error_response_of(error, contract.name)
    groups = [list(good)] if contract.is_batched and good else [[p] for p in good]
    for group in groups:
        answers = _run_group(
            [good[position] for position in group],
            [_wanted_outputs(requests[position], contract) for position in group],
            contract,
            model,
        )
        for position, answer in zip(group, answers, strict=True):
            responses[position] = answer
    return responses


def _run_group(
    inputs: Sequence[Arrays],
    wanted: Sequence[Sequence[str]],
    contract: ModelContract,
    model: ModelFunction,
) -> list[Any]:
    """Responses of requests that run together; computes only what at least one of them wants."""
    names = list(dict.fromkeys(name for some in wanted for name in some))
    try:
        if contract.is_batched:
            sizes = [len(next(iter(arrays.values()))) for arrays in inputs]
            parts = split_batch(model(stack_batch(inputs), names), sizes)
        else:
            parts = [model(arrays, names) for arrays in inputs]
        return [
            response_of({name: part[name] for name in some})
            for part, some in zip(parts, wanted, strict=True)
        ]
    except Exception as error:
        return [error_response_of(error, contract.name) for _ in inputs]


def _wanted_outputs(request: Any, contract: ModelContract) -> list[str]:
    return list(request.requested_output_names()) or [spec.name for spec in contract.outputs]
