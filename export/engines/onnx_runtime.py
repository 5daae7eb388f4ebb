"""ONNX Runtime as an engine: the graph itself, opened once to see that this runtime takes it."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from export.engines.base import (
    BuiltEngine,
    EngineBuildError,
    EngineConfig,
    EngineSource,
    typed_graph,
)
from export.onnx_files import publish_onnx, save_onnx
from weaksam_rt.backends.onnx_runtime import CPU, Provider, check_provider, check_started


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxRuntimeBuilder:
    """An ``EngineBuilder`` of ONNX files."""

    provider: Provider = CPU

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
        check_provider(self.provider)
        if config.compute_capabilities and self.provider == CPU:
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
        check_started(session, self.provider)
