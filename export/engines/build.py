"""From an ONNX artifact to an engine artifact: build, then the manifest."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import onnx
from torch import nn

from export.engines.aot_inductor import AotInductorBuilder
from export.engines.base import BuiltEngine, EngineBuilder, EngineConfig, EngineSource
from export.engines.onnx_runtime import OnnxRuntimeBuilder
from export.engines.tensorrt import TensorRtBuilder
from training.engine.stage import git_commit, package_versions
from weaksam_rt.artifacts import ModelArtifact, Passport, load_artifact, write_manifest
from weaksam_rt.backends.tensorrt import TENSORRT, TENSORRT_RTX
from weaksam_rt.errors import ArtifactError

BUILDERS: Mapping[str, EngineBuilder] = {
    "onnxruntime": OnnxRuntimeBuilder(),
    "onnxruntime-cuda": OnnxRuntimeBuilder(provider="CUDAExecutionProvider"),
    "tensorrt": TensorRtBuilder(family=TENSORRT),
    "tensorrt-rtx": TensorRtBuilder(family=TENSORRT_RTX),
    "aot-inductor": AotInductorBuilder(device="cpu"),
    "aot-inductor-cuda": AotInductorBuilder(device="cuda"),
}


def builder_for(engine: str) -> EngineBuilder:
    """The builder called ``engine``; raises ``ValueError`` that lists the names."""
    if engine not in BUILDERS:
        raise ValueError(f"no engine is called {engine!r}; choose one of {', '.join(BUILDERS)}")
    return BUILDERS[engine]


def build_engine(
    source: ModelArtifact,
    directory: Path,
    *,
    engine: str,
    config: EngineConfig,
    module: nn.Module | None = None,
    graph: onnx.ModelProto | None = None,
) -> ModelArtifact:
    """Build one engine from a verified ONNX model and write its manifest.

    Args:
        source: Of ``export_model``; its checkpoint and parity go into the new manifest.
        directory: Gets the engine file and ``manifest.json``; not the folder of ``source``.
        engine: A name in ``BUILDERS``.
        config: Precision, profiles, targets.
        module: The model in PyTorch, for ``aot-inductor``.
        graph: The Q/DQ graph of ``source`` for ``int8`` and ``fp8``; None: the model's own.

    Raises:
        BackendUnavailableError: This machine cannot build it.
        EngineBuildError: The builder refuses the model.
        ArtifactError: ``source`` is no ONNX model.
        ValueError: The configuration fits no machine, or ``directory`` is that of ``source``.
    """
    if source.engine != "onnxruntime":
        raise ArtifactError(f"{source.path} is for {source.engine}; engines are built from ONNX")
    if directory.resolve() == source.path.parent.resolve():
        raise ValueError(f"{directory} holds the model that the engine is built from")
    builder = builder_for(engine)
    builder.check(config)
    if graph is None:
        graph = onnx.load(source.path)
    path = directory / builder.file_name
    built = builder.build(EngineSource(artifact=source, graph=graph, module=module), config, path)
    return write_manifest(
        path,
        model=source.model,
        engine=builder.engine,
        parameters=source.parameters,
        provenance=_passport(source, builder.engine, built, refittable=config.refittable),
    )


def exported_onnx(models: Path) -> list[ModelArtifact]:
    """The ONNX models in the subfolders of ``models``, by name.

    Raises:
        ArtifactError: There are none, or one cannot be trusted.
    """
    folders = sorted(path.parent for path in models.glob("*/manifest.json"))
    if not folders:
        raise ArtifactError(f"{models} holds no exported models; run python -m export models")
    return [load_artifact(folder) for folder in folders]


def _passport(
    source: ModelArtifact, engine: str, built: BuiltEngine, *, refittable: bool
) -> Passport:
    """The model's passport, and what the builder added to it."""
    origin = source.passport
    of_model = {key: getattr(origin, key) for key in ("exporter", "parity", "tolerance", "commit")}
    return Passport(
        source=origin.source,
        commit=git_commit(),
        versions={**package_versions(), **built.versions},
        precision=built.precision,
        compute_capabilities=built.compute_capabilities,
        profiles=tuple(asdict(profile) for profile in built.profiles),
        exporter={"name": engine, "seconds": built.build_s, "refittable": refittable},
        notes={"onnx": {"sha256": source.sha256, **of_model}},
    )
