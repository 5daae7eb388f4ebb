"""ONNX Runtime as an engine: the graph itself, opened once to see that this runtime takes it."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnxruntime

from export.engines.base import (
    BuiltEngine,
    EngineBuildError,
    EngineConfig,
    EngineSource,
    typed_graph,
)
from export.onnx_files import publish_onnx, save_onnx
from weaksam_rt.errors import BackendUnavailableError

Provider = Literal["CPUExecutionProvider", "CUDAExecutionProvider"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxRuntimeBuilder:
    """An ``EngineBuilder`` of ONNX files."""

    provider: Provider = "CPUExecutionProvider"

    @property
    def engine(self) -> str:
        """See ``EngineBuilder``."""
        return "onnxruntime"

    @property
    def file_name(self) -> str:
        """See ``EngineBuilder``."""
        return "model.onnx"

    def check(self, config: EngineConfig) -> None:
        """See ``EngineBuilder``."""
        found = onnxruntime.get_available_providers()
        if self.provider not in found:
            raise BackendUnavailableError(
                f"this ONNX Runtime {onnxruntime.__version__} has {found}, not {self.provider}; "
                "install onnxruntime-gpu in place of (not beside) onnxruntime on a machine with a "
                "GPU"
            )
        if config.compute_capabilities and self.provider == "CPUExecutionProvider":
            raise ValueError(
                f"a CPU has no compute capability, got {config.compute_capabilities}; leave it out"
            )

    def build(self, source: EngineSource, config: EngineConfig, path: Path) -> BuiltEngine:
        """See ``EngineBuilder``."""
        self.check(config)
        start = time.perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            fresh = Path(folder) / path.name
            save_onnx(typed_graph(source, config), fresh)
            self._try(fresh, source, config)
            publish_onnx(fresh, path)
        return BuiltEngine(
            precision=config.precision,
            compute_capabilities=config.compute_capabilities,
            profiles=(),
            versions={"onnxruntime": onnxruntime.__version__},
            build_s=round(time.perf_counter() - start, 2),
        )

    def _try(self, path: Path, source: EngineSource, config: EngineConfig) -> None:
        """Open the file as a server will."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=[self.provider])
        except Exception as error:
            raise EngineBuildError(
                f"ONNX Runtime {onnxruntime.__version__} on {self.provider} cannot run "
                f"{source.contract.name} in {config.precision}: {' '.join(str(error).split())}; "
                "choose another precision or engine"
            ) from error
        # Without its libraries the CUDA provider gives way to the CPU without an error.
        if session.get_providers()[0] != self.provider:
            raise BackendUnavailableError(
                f"{self.provider} did not start and {session.get_providers()[0]} took its place; "
                "check the CUDA and cuDNN libraries"
            )
