"""AOTInductor packages: PyTorch compiled ahead of time, for CUDA machines without TensorRT."""

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from export.engines.base import BuiltEngine, EngineBuildError, EngineConfig, EngineSource
from export.engines.tensorrt import this_gpu
from export.exportable import example_inputs
from export.onnx_from_module import dynamic_shapes
from training.torch_backend import call_on_arrays
from weaksam_rt.artifacts import ModelArtifact
from weaksam_rt.backends.base import Arrays
from weaksam_rt.errors import ArtifactError, BackendUnavailableError
from weaksam_rt.files import atomic_path

Device = Literal["cpu", "cuda"]
AOT_ENGINES: dict[Device, str] = {"cpu": "aot-inductor", "cuda": "aot-inductor-cuda"}


@dataclass(frozen=True, kw_only=True, slots=True)
class AotInductorBuilder:
    """An ``EngineBuilder`` of AOTInductor packages; it needs the model in PyTorch and a C++
    compiler.
    """

    device: Device

    @property
    def engine(self) -> str:
        """See ``EngineBuilder``."""
        return AOT_ENGINES[self.device]

    @property
    def file_name(self) -> str:
        """See ``EngineBuilder``."""
        return "model.pt2"

    def check(self, config: EngineConfig) -> None:
        """See ``EngineBuilder``."""
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise BackendUnavailableError(
                f"{self.engine} compiles C++ and finds no {compiler}; install it or set CXX"
            )
        if config.precision != "fp32":
            raise ValueError(
                f"{self.engine} builds fp32, got {config.precision}; typed graphs are for the "
                "engines that read ONNX"
            )
        if config.refittable:
            raise ValueError(f"{self.engine} compiles weights in: its packages are not refittable")
        if self.device == "cpu" and config.compute_capabilities:
            raise ValueError(
                f"a CPU has no compute capability, got {config.compute_capabilities}; leave it out"
            )
        if self.device == "cuda":
            self._check_gpu(config)

    def build(self, source: EngineSource, config: EngineConfig, path: Path) -> BuiltEngine:
        """See ``EngineBuilder``."""
        self.check(config)
        if source.module is None:
            raise ValueError(
                f"{self.engine} is built from PyTorch, not from ONNX; give the checkpoint of "
                f"{source.contract.name}"
            )
        start = time.perf_counter()
        module = source.module.eval().to(self.device)
        arrays = example_inputs(source.model, source.parameters)[0]
        example = tuple(
            torch.from_numpy(arrays[spec.name]).to(self.device) for spec in source.contract.inputs
        )
        try:
            with torch.no_grad(), tempfile.TemporaryDirectory(prefix="weaksam-engine-") as folder:
                program = torch.export.export(
                    module, example, dynamic_shapes=dynamic_shapes(source.contract)
                )
                package = str(Path(folder) / self.file_name)
                torch._inductor.aoti_compile_and_package(program, package_path=package)
                with atomic_path(path) as temporary:
                    shutil.copyfile(package, temporary)
        except Exception as error:
            raise EngineBuildError(
                f"{self.engine} cannot compile {source.contract.name}: "
                f"{' '.join(str(error).split())[:500]}; serve it with onnxruntime"
            ) from error
        return BuiltEngine(
            precision="fp32",
            compute_capabilities=(this_gpu(),) if self.device == "cuda" else (),
            profiles=(),
            versions={"torch": torch.__version__},
            build_s=round(time.perf_counter() - start, 2),
        )

    def _check_gpu(self, config: EngineConfig) -> None:
        try:
            here = this_gpu()
        except BackendUnavailableError as error:
            raise BackendUnavailableError(
                f"{self.engine} compiles for the GPU at hand: {error}; run this where it is"
            ) from error
        if any(capability != here for capability in config.compute_capabilities):
            raise BackendUnavailableError(
                f"{self.engine} compiles for the GPU at hand ({here}), asked for "
                f"{', '.join(config.compute_capabilities)}; run this on such a GPU"
            )


class AotInductorModel:
    """A package as a model function."""

    def __init__(self, artifact: ModelArtifact) -> None:
        """Open the package; it holds compiled code, so only a verified artifact is opened."""
        devices: dict[str, Device] = {engine: device for device, engine in AOT_ENGINES.items()}
        if artifact.engine not in devices:
            raise ArtifactError(f"{artifact.path} is for {artifact.engine}, not for aot-inductor")
        self.contract = artifact.contract
        self._device = devices[artifact.engine]
        self._call: Any = torch._inductor.aoti_load_package(str(artifact.path))

    def __call__(
        self, inputs: Arrays, outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Run once; raises ``ContractError`` for ill-formed inputs and unknown outputs."""
        return call_on_arrays(self._call, self.contract, inputs, outputs, self._device)
