"""TensorRT and TensorRT-RTX: one API family, one builder.

Both get strongly typed networks: precisions come from the ONNX graph. TensorRT measures kernels on
the GPU it builds for; TensorRT-RTX builds ahead of time on any machine and finishes on the GPU. A
plan of one is not a plan of the other.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from export.engines.base import (
    BuiltEngine,
    EngineBuildError,
    EngineConfig,
    EngineSource,
    typed_graph,
)
from export.engines.profiles import Profile, default_profiles
from export.onnx_files import save_onnx
from export.portable_graph import portable_model
from export.refit import RefitError, tensorrt_refit_refusal
from weaksam_rt.backends.tensorrt import TensorRtFamily, collecting_logger, load_tensorrt
from weaksam_rt.cuda_driver import CudaDevice
from weaksam_rt.errors import BackendUnavailableError
from weaksam_rt.files import atomic_path
from weaksam_rt.prompt_clustering.tensorrt_plugin import PLUGIN_NAMESPACE, register_prompt_plugin

_FP32_ONLY = {"bf16": frozenset({"ConvTranspose"})}
"""Operators that TensorRT-RTX 1.7 does not build in a precision."""

_REFIT_NEEDS = (
    ("Refitter", "refit_cuda_engine"),
    ("OnnxParserRefitter", "refit_from_file"),
    ("SerializationFlag", "INCLUDE_REFIT"),
)
"""Of the library's classes. TensorRT before 10.14 lacks the flag: an engine written without it
could not be refitted again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRtBuilder:
    """An ``EngineBuilder`` of either family."""

    family: TensorRtFamily

    @property
    def engine(self) -> str:
        """See ``EngineBuilder``."""
        return self.family.engine

    @property
    def file_name(self) -> str:
        """See ``EngineBuilder``."""
        return self.family.file_name

    def check(self, config: EngineConfig) -> None:
        """See ``EngineBuilder``."""
        trt = load_tensorrt(self.family, needs="Builder")
        refusal = tensorrt_refit_refusal(trt.__version__) if config.refittable else None
        if refusal is not None:
            raise BackendUnavailableError(refusal)
        if self.family.builds_ahead_of_time:
            _check_targets(trt, self.family, config)
        else:
            _check_this_gpu(self.family, config)

    def build(self, source: EngineSource, config: EngineConfig, path: Path) -> BuiltEngine:
        """See ``EngineBuilder``."""
        self.check(config)
        trt = load_tensorrt(self.family, needs="Builder")
        profiles = config.profiles or default_profiles(source.contract)
        for profile in profiles:
            profile.check(source.contract)
        start = time.perf_counter()
        kept = _FP32_ONLY.get(config.precision, frozenset())
        graph = typed_graph(source, config, keep_op_types=kept)
        if any(node.domain == PLUGIN_NAMESPACE for node in graph.graph.node):
            register_prompt_plugin(trt)
        log, complaints = collecting_logger(trt)
        builder = trt.Builder(log)
        network = builder.create_network(_network_flags(trt))
        parser = trt.OnnxParser(network, log)
        with tempfile.TemporaryDirectory(prefix="weaksam-engine-") as folder:
            save_onnx(portable_model(graph), Path(folder) / "model.onnx")
            is_read = parser.parse_from_file(str(Path(folder) / "model.onnx"))
        if not is_read:
            complaints += [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise self._refusal(source, "read the graph of", complaints)
        settings = self._settings(trt, builder, config, profiles)
        plan = builder.build_serialized_network(network, settings)
        if plan is None and config.refittable and not torch.cuda.is_available():
            # TensorRT-RTX 1.7, tried: not with REFIT, nor with REFIT_INDIVIDUAL and one weight.
            raise BackendUnavailableError(
                f"{self.engine} {trt.__version__} builds no refittable engine without a GPU "
                f"({_last(complaints)}); build it where one is, or not refittable"
            )
        if plan is None:
            raise self._refusal(source, "build", complaints)
        _keep_timing_cache(settings, config)
        with atomic_path(path) as temporary:
            temporary.write_bytes(memoryview(plan))
        return BuiltEngine(
            precision=config.precision,
            compute_capabilities=config.compute_capabilities or (this_gpu(),),
            profiles=tuple(profiles),
            versions={self.engine: trt.__version__},
            build_s=round(time.perf_counter() - start, 2),
        )

    def refit(self, live: Path, source: EngineSource, config: EngineConfig, path: Path) -> float:
        """Write ``live`` with the weights of ``source`` to ``path``, atomically.

        The parser refits by the names that it gave the weights when it built the engine, so the
        graph is made in the same way.

        Args:
            live: An engine built with ``config``, which has ``refittable``.
            source: An export of the same topology.
            config: Of ``live``.
            path: The new engine.

        Returns:
            Seconds.

        Raises:
            BackendUnavailableError: The library or the GPU is not here.
            RefitError: The library cannot exchange weights.
            EngineBuildError: The engine does not take the weights.
        """
        trt = load_tensorrt(self.family, needs="Runtime")
        _check_refits(trt, self.family)
        if refusal := tensorrt_refit_refusal(trt.__version__):
            raise BackendUnavailableError(refusal)
        start = time.perf_counter()
        graph = typed_graph(
            source, config, keep_op_types=_FP32_ONLY.get(config.precision, frozenset())
        )
        log, complaints = collecting_logger(trt)
        with (
            CudaDevice(0).current(),
            tempfile.TemporaryDirectory(prefix="weaksam-refit-") as folder,
        ):
            engine = trt.Runtime(log).deserialize_cuda_engine(live.read_bytes())
            if engine is None or not engine.refittable:
                raise self._refusal(source, "refit", [*complaints, "it was not built refittable"])
            refitter = trt.Refitter(engine, log)
            parser = trt.OnnxParserRefitter(refitter, log)
            save_onnx(portable_model(graph), Path(folder) / "model.onnx")
            if not parser.refit_from_file(str(Path(folder) / "model.onnx")):
                complaints += [parser.get_error(i).desc() for i in range(parser.num_errors)]
                raise self._refusal(source, "refit", complaints)
            if missing := refitter.get_missing_weights():
                raise self._refusal(source, "refit", [f"weights left over: {missing}"])
            if not refitter.refit_cuda_engine():
                raise self._refusal(source, "refit", complaints)
            settings = engine.create_serialization_config()
            settings.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
            settings.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
            plan = engine.serialize_with_config(settings)
        with atomic_path(path) as temporary:
            temporary.write_bytes(memoryview(plan))
        return round(time.perf_counter() - start, 2)

    def _refusal(
        self, source: EngineSource, what: str, complaints: Sequence[str]
    ) -> EngineBuildError:
        return EngineBuildError(
            f"{self.engine} cannot {what} {source.contract.name}: {_last(complaints)}; export it "
            "with operators that the engine has, or serve it with onnxruntime"
        )

    def _settings(
        self, trt: Any, builder: Any, config: EngineConfig, profiles: tuple[Profile, ...]
    ) -> Any:
        settings = builder.create_builder_config()
        if config.refittable:
            settings.set_flag(trt.BuilderFlag.REFIT)
        if config.workspace_bytes is not None:
            settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_bytes)
        if self.family.builds_ahead_of_time:
            settings.num_compute_capabilities = len(config.compute_capabilities)
            for index, capability in enumerate(config.compute_capabilities):
                settings.set_compute_capability(_known(trt)[capability], index)
        elif config.timing_cache is not None:
            before = config.timing_cache.read_bytes() if config.timing_cache.is_file() else b""
            settings.set_timing_cache(settings.create_timing_cache(before), ignore_mismatch=False)
        for profile in profiles:
            added = builder.create_optimization_profile()
            for name, shapes in profile.inputs.items():
                added.set_shape(name, shapes.smallest, shapes.usual, shapes.largest)
            settings.add_optimization_profile(added)
        return settings


def _last(complaints: Sequence[str]) -> str:
    return " ".join((complaints[-1] if complaints else "no reason given").split())[:500]


def this_gpu() -> str:
    """Compute capability of this machine's first GPU.

    Raises:
        BackendUnavailableError: It has none.
    """
    if not torch.cuda.is_available():
        raise BackendUnavailableError("no CUDA device is visible on this machine")
    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}.{minor}"


def _check_targets(trt: ModuleType, family: TensorRtFamily, config: EngineConfig) -> None:
    known = _known(trt)
    unknown = [c for c in config.compute_capabilities if c not in known]
    if unknown or not config.compute_capabilities:
        raise ValueError(
            f"{family.engine} {trt.__version__} builds for compute capabilities "
            f"{', '.join(known)}, got {', '.join(config.compute_capabilities) or 'none'}; for "
            "other GPUs build with --engine tensorrt on the GPU itself"
        )
    if config.timing_cache is not None:
        raise ValueError(f"{family.engine} measures no kernels while it builds: no timing cache")
    if config.precision == "fp8" and any(
        _number(c) < _number("8.9") for c in config.compute_capabilities
    ):
        raise ValueError(
            f"fp8 needs compute capability 8.9 or later, got {config.compute_capabilities}"
        )


def _check_this_gpu(family: TensorRtFamily, config: EngineConfig) -> None:
    try:
        here = this_gpu()
    except BackendUnavailableError as error:
        raise BackendUnavailableError(
            f"{family.engine} builds on the GPU it builds for: {error}; run this where it is, or "
            "build with --engine tensorrt-rtx"
        ) from error
    if any(capability != here for capability in config.compute_capabilities):
        raise BackendUnavailableError(
            f"{family.engine} builds for the GPU at hand ({here}), asked for "
            f"{', '.join(config.compute_capabilities)}; run this on such a GPU"
        )


def _check_refits(trt: ModuleType, family: TensorRtFamily) -> None:
    missing = [name for name in _REFIT_NEEDS if not hasattr(getattr(trt, name[0], None), name[1])]
    if missing:
        raise RefitError(
            f"{family.engine} {trt.__version__} cannot exchange an engine's weights: it has no "
            f"{', '.join('.'.join(name) for name in missing)}; build the engine anew, or use a "
            "later version"
        )


def _known(trt: Any) -> Mapping[str, Any]:
    """Targets of ``set_compute_capability`` by their usual spelling."""
    members = trt.ComputeCapability.__members__
    numbers = {name: value for name, value in members.items() if name[2:].isdigit()}
    return {f"{name[2:-1]}.{name[-1]}": value for name, value in numbers.items()}


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def _network_flags(trt: Any) -> int:
    """Strongly typed; where the flag is gone there is nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _keep_timing_cache(settings: Any, config: EngineConfig) -> None:
    if config.timing_cache is not None:
        with atomic_path(config.timing_cache) as temporary:
            temporary.write_bytes(memoryview(settings.get_timing_cache().serialize()))
