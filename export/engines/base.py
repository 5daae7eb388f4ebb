"""What every engine builder takes and gives."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import onnx
from torch import nn

from export.engines.profiles import Profile
from export.mixed_precision import KeepFp32, lower_precision
from weaksam_rt.contracts import ModelContract, Parameters, engine_contract
from weaksam_rt.errors import WeakSamError

EnginePrecision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
"""``int8`` and ``fp8`` are Q/DQ graphs: they are made by ``export.quantization`` beforehand."""


class EngineBuildError(WeakSamError):
    """A builder is there and refused the model; the message holds its reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How an engine is built."""

    precision: EnginePrecision = "fp32"
    keep_fp32: KeepFp32 = field(default_factory=KeepFp32)
    """What stays float32 under ``fp16`` and ``bf16``; the precision doctor proposes it."""
    profiles: tuple[Profile, ...] = ()
    """Sizes the engine is tuned for; empty: ``default_profiles`` of the contract."""
    compute_capabilities: tuple[str, ...] = ()
    """GPUs the engine is for, such as ``8.9``; empty: the one of this machine."""
    workspace_bytes: int | None = None
    """Most GPU memory an operator may borrow; None: what the builder chooses."""
    timing_cache: Path | None = None
    """Read and extended where the builder measures kernels: a second build is quicker."""
    refittable: bool = False
    """Weights can be exchanged in the built engine (TensorRT's). A built ONNX file has lowered
    weights and is built anew; an exported one takes new weights where they fit
    (``export.refit``)."""

    def __post_init__(self) -> None:
        for capability in self.compute_capabilities:
            major, _, minor = capability.partition(".")
            if not (major.isdigit() and minor.isdigit()):
                raise ValueError(f"compute capability {capability!r}, expected one like 8.9")
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise ValueError(f"workspace_bytes must be positive, got {self.workspace_bytes}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSource:
    """What an engine is built from."""

    model: str
    """A name in ``contracts.ENGINE_MODELS``."""
    parameters: Parameters
    """Of the verified ONNX model."""
    graph: onnx.ModelProto
    """In float32, or a Q/DQ graph for ``int8`` and ``fp8``; builders lower it."""
    module: nn.Module | None = None
    """The same model in PyTorch, for builders that do not read ONNX."""

    @property
    def contract(self) -> ModelContract:
        """The model's contract."""
        return engine_contract(self.model, self.parameters)


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltEngine:
    """What a builder knows of the file it wrote; it goes into the passport."""

    precision: EnginePrecision
    compute_capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    versions: Mapping[str, str]
    """Of the builder."""
    build_s: float


def typed_graph(
    source: EngineSource, config: EngineConfig, *, keep_op_types: frozenset[str] = frozenset()
) -> onnx.ModelProto:
    """The graph in the precision wanted.

    Args:
        source: What is built.
        config: Precision and what stays float32.
        keep_op_types: Operators that the engine has in float32 only.
    """
    precision = config.precision
    if precision == "int8" or precision == "fp8":
        kinds = {node.op_type for node in source.graph.graph.node}
        if "QuantizeLinear" not in kinds:
            raise ValueError(
                f"{precision} is built from a Q/DQ graph, this one has no QuantizeLinear; "
                "quantise it with export.quantization"
            )
        return source.graph
    keep = config.keep_fp32
    keep = replace(keep, op_types=keep.op_types | keep_op_types)
    return lower_precision(source.graph, precision, keep)


@runtime_checkable
class EngineBuilder(Protocol):
    """Builds the engines of one runtime."""

    @property
    def engine(self) -> str:
        """What the manifest calls the runtime."""
        ...

    @property
    def file_name(self) -> str:
        """Of the engine file."""
        ...

    def check(self, config: EngineConfig) -> None:
        """Raise ``BackendUnavailableError`` where this machine cannot build what is asked for, and
        ``ValueError`` where no machine can.
        """
        ...

    def build(self, source: EngineSource, config: EngineConfig, path: Path) -> BuiltEngine:
        """Build and write the engine to ``path``, atomically.

        Raises:
            BackendUnavailableError: See ``check``.
            EngineBuildError: The builder refuses the model.
        """
        ...
