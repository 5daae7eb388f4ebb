"""ONNX Runtime sessions as model functions."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from weaksam_rt.artifacts import ModelArtifact
from weaksam_rt.backends.base import Arrays
from weaksam_rt.errors import ArtifactError, InferenceError


class OnnxRuntimeModel:
    """One engine, callable with the arrays of its contract."""

    def __init__(
        self, artifact: ModelArtifact, *, num_threads: int = 0, rows_side_by_side: bool = False
    ) -> None:
        """Open the session on the CPU.

        Args:
            artifact: A verified artifact whose engine is ``onnxruntime``.
            num_threads: Threads at work in a call; 0 takes all cores.
            rows_side_by_side: Give each thread a row of a batch of its own, as many rows at a time
                as there are threads, and let all work at the rows that are left over. Threads that
                never wait for each other do more in the same time (a detector of ours 14 % on two
                cores); a second session holds the weights once more.

        Raises:
            ArtifactError: ONNX Runtime cannot open the file, or the graph differs from the
                contract.
        """
        if artifact.engine != "onnxruntime":
            raise ArtifactError(f"{artifact.path} is for {artifact.engine}, not for onnxruntime")
        self.contract = artifact.contract
        self._session = _open(artifact, num_threads)
        self._num_lanes = 0
        if rows_side_by_side and self.contract.is_batched:
            self._num_lanes = num_threads or len(os.sched_getaffinity(0))
        if self._num_lanes > 1:
            self._row_session = _open(artifact, 1)
            self._lanes = ThreadPoolExecutor(self._num_lanes, "row")

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


def _open(artifact: ModelArtifact, num_threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    # Idle threads that spin take the cores from the other models of a server.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(
            str(artifact.path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise ArtifactError(f"ONNX Runtime cannot open {artifact.path}: {error}") from error
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
