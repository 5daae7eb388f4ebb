"""ONNX Runtime sessions as model functions."""

from collections.abc import Sequence
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from weaksam_rt.artifacts import ModelArtifact
from weaksam_rt.backends.base import Arrays
from weaksam_rt.errors import ArtifactError, InferenceError


class OnnxRuntimeModel:
    """One engine, callable with the arrays of its contract."""

    def __init__(self, artifact: ModelArtifact, *, num_threads: int = 0) -> None:
        """Open the session on the CPU.

        Args:
            artifact: A verified artifact whose engine is ``onnxruntime``.
            num_threads: Threads inside one operator; 0 lets ONNX Runtime take all cores.

        Raises:
            ArtifactError: ONNX Runtime cannot open the file, or the graph differs from the
                contract.
        """
        if artifact.engine != "onnxruntime":
            raise ArtifactError(f"{artifact.path} is for {artifact.engine}, not for onnxruntime")
        self.contract = artifact.contract
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        # Idle threads that spin take the cores from the other models of a server.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                str(artifact.path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise ArtifactError(f"ONNX Runtime cannot open {artifact.path}: {error}") from error
        self._check_names(artifact)

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
            results = self._session.run(names, dict(inputs), options)
        except Exception as error:
            raise InferenceError(f"{self.contract.name} failed: {error}") from error
        return dict(zip(names, results, strict=True))

    def _check_names(self, artifact: ModelArtifact) -> None:
        for kind, found, specs in (
            ("inputs", self._session.get_inputs(), self.contract.inputs),
            ("outputs", self._session.get_outputs(), self.contract.outputs),
        ):
            got, expected = {node.name for node in found}, {spec.name for spec in specs}
            if got != expected:
                raise ArtifactError(
                    f"{artifact.path}: {kind} are {sorted(got)}, the contract says "
                    f"{sorted(expected)}; export the model again"
                )
