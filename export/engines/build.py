"""From an ONNX artifact to an engine artifact: build, compare, then the manifest; and the same way
once more, from what a manifest says.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import onnx
from torch import nn

from export.agreement import Agreement
from export.calibration import CalibratedGraph, calibrated
from export.engines.aot_inductor import AotInductorBuilder
from export.engines.base import (
    BuiltEngine,
    EngineBuilder,
    EngineConfig,
    EnginePrecision,
    EngineSource,
)
from export.engines.compare import (
    ENGINE_LIMITS,
    check_refit,
    check_runs_here,
    compare_with_source,
    parity_of,
)
from export.engines.onnx_runtime import OnnxRuntimeBuilder
from export.engines.profiles import Profile
from export.engines.tensorrt import TensorRtBuilder
from export.machine import machine_versions
from export.mixed_precision import KeepFp32
from export.refit import RefitError
from training.data.coco import CocoFolder
from training.engine.stage import git_commit
from weaksam_rt.artifacts import (
    MANIFEST_NAME,
    ONNX_RUNTIME_CUDA,
    ModelArtifact,
    Passport,
    load_artifact,
    write_manifest,
)
from weaksam_rt.backends.onnx_runtime import CUDA
from weaksam_rt.backends.tensorrt import TENSORRT, TENSORRT_RTX
from weaksam_rt.errors import ArtifactError, BackendUnavailableError

_LOGGER = logging.getLogger(__name__)

BUILDERS: Mapping[str, EngineBuilder] = {
    "onnxruntime": OnnxRuntimeBuilder(),
    ONNX_RUNTIME_CUDA: OnnxRuntimeBuilder(provider=CUDA),
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
    graph: onnx.ModelProto | CalibratedGraph | None = None,
) -> ModelArtifact:
    """Build one engine from a verified ONNX model, compare both, and write its manifest.

    Where this machine cannot run the engine, the passport has no parity and says why.

    Args:
        source: Of ``export_model``; its checkpoint and parity go into the new manifest.
        directory: Gets the engine file and ``manifest.json``; not the folder of ``source``.
        engine: A name in ``BUILDERS``.
        config: Precision, profiles, targets.
        module: The model in PyTorch, for ``aot-inductor``.
        graph: Of ``calibrated`` for ``int8`` and ``fp8``; None: the model's own.

    Raises:
        BackendUnavailableError: This machine cannot build it.
        EngineBuildError: The builder refuses the model.
        ParityError: The engine's answers are not those of ``source``; it has no manifest, so
            nothing will load it.
        ArtifactError: ``source`` is no ONNX model.
        ValueError: The configuration fits no machine, or ``directory`` is that of ``source``.
    """
    if source.engine != "onnxruntime":
        raise ArtifactError(f"{source.path} is for {source.engine}; engines are built from ONNX")
    if directory.resolve() == source.path.parent.resolve():
        raise ValueError(f"{directory} holds the model that the engine is built from")
    builder = builder_for(engine)
    builder.check(config)
    path = directory / builder.file_name
    origin = _source(source, graph, module)
    built = builder.build(origin, config, path)
    passport = engine_passport(source, engine, built, config, _calibration(graph))

    def compare(unverified: ModelArtifact) -> Agreement:
        return compare_with_source(unverified, source, built.precision, built.profiles)

    return accepted(path, origin, passport, compare)


def build_engine_like(
    live: ModelArtifact,
    source: ModelArtifact,
    directory: Path,
    *,
    calibration: CocoFolder | None = None,
    refit: bool = False,
) -> ModelArtifact:
    """An engine from another checkpoint, with the runtime, precision, sizes and GPUs of ``live``.

    Args:
        live: Of ``build_engine``.
        source: The other checkpoint, exported and verified.
        directory: As in ``build_engine``.
        calibration: Images, where ``live`` is quantised.
        refit: Exchange the weights of ``live`` (TensorRT) and build nothing.

    Raises:
        RefitError: ``live`` is no engine whose weights can be exchanged, or it kept its own.
    """
    engine, config = live.passport.exporter["name"], build_config(live)
    graph = None
    if config.precision == "int8" or config.precision == "fp8":
        graph = calibrated(source, config.precision, config.keep_fp32, calibration)
    if not refit:
        return build_engine(source, directory, engine=engine, config=config, graph=graph)
    builder = builder_for(engine)
    if not (config.refittable and isinstance(builder, TensorRtBuilder)):
        raise RefitError(
            f"the live {live.model} was built without --refittable for {engine}; build it anew"
        )
    path = directory / builder.file_name
    origin = _source(source, graph)
    seconds = builder.refit(live.path, origin, config, path)
    built = BuiltEngine(
        precision=config.precision,
        compute_capabilities=config.compute_capabilities,
        profiles=config.profiles,
        versions={engine: live.passport.versions[engine]},
        build_s=live.passport.exporter["seconds"],
    )
    refitted = {"refit": {"seconds": seconds, "from_sha256": live.sha256}}
    options = {**_calibration(graph), **refitted}
    passport = engine_passport(source, engine, built, config, options)

    def compare(unverified: ModelArtifact) -> Agreement:
        found = compare_with_source(unverified, source, built.precision, built.profiles)
        check_refit(unverified, live, source, built.profiles)
        return found

    return accepted(path, origin, passport, compare)


def exported_onnx(models: Path) -> list[ModelArtifact]:
    """The ONNX models in the subfolders of ``models``, by name.

    Raises:
        ArtifactError: There are none, or one cannot be trusted.
    """
    folders = sorted(path.parent for path in models.glob("*/manifest.json"))
    if not folders:
        raise ArtifactError(f"{models} holds no exported models; run python -m export models")
    return [load_artifact(folder) for folder in folders]


def was_built(artifact: ModelArtifact) -> bool:
    """By ``build_engine``, from an exported model."""
    return _ONNX in artifact.passport.notes


def build_config(built: ModelArtifact) -> EngineConfig:
    """How ``built`` was built, to build another engine like it."""
    passport = built.passport
    options = passport.exporter
    kept = options.get("keep_fp32", {})
    return EngineConfig(
        precision=cast(EnginePrecision, passport.precision),
        keep_fp32=KeepFp32(**{kind: frozenset(names) for kind, names in kept.items()}),
        profiles=tuple(Profile.from_json(profile) for profile in passport.profiles),
        compute_capabilities=passport.compute_capabilities,
        workspace_bytes=options.get("workspace_bytes"),
        refittable=bool(options.get("refittable", False)),
    )


def check_buildable(live: ModelArtifact) -> None:
    """Raise ``BackendUnavailableError`` where this machine cannot build and try an engine like
    ``live``.
    """
    engine = live.passport.exporter["name"]
    try:
        builder_for(engine).check(build_config(live))
        check_runs_here(live)
    except BackendUnavailableError as error:
        raise BackendUnavailableError(
            f"the live {live.model} is an engine for {engine}, and its successor must be built and "
            f"tried here: {error}; release it on the machine that serves it"
        ) from error


_ONNX = "onnx"


def _source(
    source: ModelArtifact,
    graph: onnx.ModelProto | CalibratedGraph | None,
    module: nn.Module | None = None,
) -> EngineSource:
    if graph is None:
        graph = onnx.load(source.path)
    return EngineSource(
        model=source.model,
        parameters=source.parameters,
        graph=graph.graph if isinstance(graph, CalibratedGraph) else graph,
        module=module,
    )


def _calibration(graph: onnx.ModelProto | CalibratedGraph | None) -> dict[str, Any]:
    if not isinstance(graph, CalibratedGraph):
        return {}
    return {"calibration": {"data": graph.data, "num_images": graph.num_images}}


def accepted(
    path: Path,
    source: EngineSource,
    passport: Passport,
    compare: Callable[[ModelArtifact], Agreement],
) -> ModelArtifact:
    """Write the manifest of a built engine that answers as it should.

    Args:
        path: The engine.
        source: What it was built from.
        passport: Without parity.
        compare: How far the engine's answers are off; raises ``ParityError`` where they are too
            far, and ``BackendUnavailableError`` where this machine cannot run it.

    Returns:
        The artifact. Where this machine cannot run it, the passport has no parity and says why.
    """

    def manifest(passport: Passport) -> ModelArtifact:
        return write_manifest(
            path,
            model=source.model,
            engine=builder_for(passport.exporter["name"]).engine,
            parameters=source.parameters,
            provenance=passport,
        )

    unverified = manifest(_not_compared(passport, "the comparison did not end"))
    try:
        found = compare(unverified)
    except BackendUnavailableError as error:
        _LOGGER.warning("%s was not compared: %s", path, error)
        return manifest(_not_compared(passport, str(error)))
    except Exception:
        (path.parent / MANIFEST_NAME).unlink()
        raise
    precision = cast(EnginePrecision, passport.precision)
    limit = {"distance": ENGINE_LIMITS[precision]}
    return manifest(replace(passport, parity=parity_of(found), tolerance=limit))


def _not_compared(passport: Passport, reason: str) -> Passport:
    return replace(passport, notes={**passport.notes, "not_compared": reason})


def engine_passport(
    source: ModelArtifact,
    engine: str,
    built: BuiltEngine,
    config: EngineConfig,
    options: Mapping[str, Any],
) -> Passport:
    """That of the ONNX model, what the builder added to it, and ``options`` of the exporter."""
    origin = source.passport
    of_model = {key: getattr(origin, key) for key in ("exporter", "parity", "tolerance", "commit")}
    return Passport(
        source=origin.source,
        commit=git_commit(),
        versions={**machine_versions(), **built.versions},
        precision=built.precision,
        compute_capabilities=built.compute_capabilities,
        profiles=tuple(asdict(profile) for profile in built.profiles),
        exporter={
            "name": engine,
            "seconds": built.build_s,
            "refittable": config.refittable,
            "keep_fp32": {
                "nodes": sorted(config.keep_fp32.nodes),
                "op_types": sorted(config.keep_fp32.op_types),
            },
            "workspace_bytes": config.workspace_bytes,
            **options,
        },
        notes={_ONNX: {"sha256": source.sha256, **of_model}},
    )
