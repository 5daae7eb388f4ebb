"""ONNX Runtime sessions as model functions."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from weaksam_rt.artifacts import ModelArtifact
from weaksam_rt.backends.base import Arrays
from weaksam_rt.errors import ArtifactError, BackendUnavailableError, InferenceError

Provider = Literal["CPUExecutionProvider", "CUDAExecutionProvider"]
CPU: Provider = "CPUExecutionProvider"
CUDA: Provider = "CUDAExecutionProvider"


class OnnxRuntimeModel:
    """One engine, callable with the arrays of its contract."""

    def __init__(
        self,
        artifact: ModelArtifact,
        *,
        num_threads: int = 0,
        rows_side_by_side: bool = False,
        device: int = 0,
    ) -> None:
        """Open the session, on the GPU if the engine was built for one and else on the CPU.

        Args:
            artifact: A verified artifact whose engine is ``onnxruntime``.
            num_threads: Threads at work in a call; 0 takes all cores.
            rows_side_by_side: On the CPU, give each thread a row of a batch of its own, as many
                rows at a time as there are threads, and let all work at the rows that are left
                over. Threads that never wait for each other do more in the same time (a detector
                of ours 14 % on two cores); a second session holds the weights once more.
            device: Number of the GPU.

        Raises:
            BackendUnavailableError: The engine is for a GPU, and this ONNX Runtime has no CUDA or
                cannot start it.
            ArtifactError: ONNX Runtime cannot open the file, or the graph differs from the
                contract.
        """
        if artifact.engine != "onnxruntime":
            raise ArtifactError(f"{artifact.path} is for {artifact.engine}, not for onnxruntime")
        self.contract = artifact.contract
        self._session = _open(artifact, num_threads, device)
        self._num_lanes = 0
        if rows_side_by_side and self.contract.is_batched and not artifact.needs_gpu:
            self._num_lanes = num_threads or len(os.sched_getaffinity(0))
        if self._num_lanes > 1:
            self._row_session = _open(artifact, 1, device)
            self._lanes = ThreadPoolExecutor(self._num_lanes, "row")

    @property
    def num_sessions(self) -> int:
        """Sessions held; each has the weights."""
        return 2 if self._num_lanes > 1 else 1

    def __call__(
        self, inputs: Arrays, outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Run once; raises ``ContractError`` for ill-formed inputs, ``InferenceError`` for the
        rest.
        """
        self.contract.check_inputs(inputs)
        names = [spec.name for spec in self.contract.outputs] if outputs is None else list(outputs)
        for name in names:
            self.contract.output(name)
        options = onnxruntime.RunOptions()
        # A detector's masks, for example, are not computed where only boxes are wanted.
        options.only_execute_path_to_fetches = len(names) < len(self.contract.outputs)
        try:
            results = self._run(names, dict(inputs), options)
        except Exception as error:
            raise InferenceError(f"{self.contract.name} failed: {error}") from error
        return dict(zip(names, results, strict=True))

    def _run(
        self, names: Sequence[str], inputs: Arrays, options: onnxruntime.RunOptions
    ) -> list[NDArray[Any]]:
        num_rows = len(next(iter(inputs.values())))
        if not 1 < self._num_lanes <= num_rows:
            return list(self._session.run(names, inputs, options))
        num_alone = num_rows - num_rows % self._num_lanes

        def run_row(row: int) -> list[NDArray[Any]]:
            only = {name: array[row : row + 1] for name, array in inputs.items()}
            return list(self._row_session.run(names, only, options))

        parts = list(self._lanes.map(run_row, range(num_alone)))
        if num_alone < num_rows:
            rest = {name: array[num_alone:] for name, array in inputs.items()}
            parts.append(self._session.run(names, rest, options))
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def check_provider(provider: Provider) -> None:
    """Raise ``BackendUnavailableError`` where the installed ONNX Runtime lacks ``provider``."""
    found = onnxruntime.get_available_providers()
    if provider not in found:
        raise BackendUnavailableError(
            f"this ONNX Runtime {onnxruntime.__version__} has {found}, not {provider}; "
            "install onnxruntime-gpu in place of (not beside) onnxruntime on a machine with a GPU"
        )


def check_started(session: onnxruntime.InferenceSession, provider: Provider) -> None:
    """Raise ``BackendUnavailableError`` where ``session`` runs on something else.

    Without its libraries the CUDA provider gives way to the CPU without an error.
    """
    started = session.get_providers()[0]
    if started != provider:
        raise BackendUnavailableError(
            f"{provider} did not start and {started} took its place; check the CUDA and cuDNN "
            "libraries"
        )


def _open(artifact: ModelArtifact, num_threads: int, device: int) -> onnxruntime.InferenceSession:
    provider = CUDA if artifact.needs_gpu else CPU
    check_provider(provider)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    # Idle threads that spin take the cores from the other models of a server.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # What CUDA has no kernel for runs on the CPU.
    providers = [CPU] if provider == CPU else [(CUDA, {"device_id": device}), CPU]
    try:
        session = onnxruntime.InferenceSession(str(artifact.path), options, providers=providers)
    except Exception as error:
        raise ArtifactError(f"ONNX Runtime cannot open {artifact.path}: {error}") from error
    check_started(session, provider)
    _check_names(session, artifact)
    return session


def _check_names(session: onnxruntime.InferenceSession, artifact: ModelArtifact) -> None:
    contract = artifact.contract
    for kind, found, specs in (
        ("inputs", session.get_inputs(), contract.inputs),
        ("outputs", session.get_outputs(), contract.outputs),
    ):
        got, expected = {node.name for node in found}, {spec.name for spec in specs}
        if got != expected:
            raise ArtifactError(
                f"{artifact.path}: {kind} are {sorted(got)}, the contract says "
                f"{sorted(expected)}; export the model again"
            )
