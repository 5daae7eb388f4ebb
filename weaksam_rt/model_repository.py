"""A Triton model repository from artifacts: which models there are, and every file of them.

What is written is decided by ``plan_model_repository`` without touching a disk; the writers below
it only copy. Two profiles share all names and contracts: ``embedded`` holds each engine in a
Python-backend model (the server from the ``nvidia-pytriton`` wheel has no other backend),
``container`` leaves engines to the backends of NVIDIA's image.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from weaksam_rt.artifacts import MANIFEST_NAME, ModelArtifact, load_artifact
from weaksam_rt.config import PipelineConfig, load_toml
from weaksam_rt.contracts import (
    DETECTOR,
    MEMBERS_OF_PIPELINE,
    PIPELINE_CONTRACTS,
    PROMPT_CLUSTERING,
    PROMPTED_CLASSIFIER,
    SAM_IMAGE_ENCODER,
    SAM_MASK_DECODER,
    VIT_CLASSIFIER,
    WEAKSAM_DETECT,
    WEAKSAM_PROPOSE,
    ClusteringParameters,
    DetectorParameters,
    ModelContract,
    Parameters,
    SamParameters,
    VitClassifierParameters,
    engine_contract,
)
from weaksam_rt.engine_serving import EngineServing, Profile, engine_serving
from weaksam_rt.errors import ArtifactError, ContractError
from weaksam_rt.model_config import (
    PASSPORTS_PARAMETER,
    THREADS_PARAMETER,
    ModelSettings,
    ServingOptions,
    config_text,
)
from weaksam_rt.pipeline import PipelineModels

_P = TypeVar("_P", DetectorParameters, VitClassifierParameters, SamParameters)

CONFIG_NAME = "config.pbtxt"
PIPELINE_NAME = "pipeline.json"
LABELS_NAME = "labels.txt"
SETTINGS_NAME = "pipeline.toml"

LOCK_NAME = "release.lock"
JOURNAL_NAME = "release.json"
HISTORY_NAME = "releases.json"
RELEASE_FILES = (LOCK_NAME, JOURNAL_NAME, HISTORY_NAME)
"""Files beside the models that releases leave in a repository; the server does not read them."""

_LABEL_OUTPUTS = {DETECTOR: ("labels",), VIT_CLASSIFIER: ("logits",)}
_PIPELINE_CLASSES = {
    "weaksam_detect": "DetectModel",
    "weaksam_propose": "ProposeModel",
    "weaksam_segment": "SegmentModel",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RepositoryPlan:
    """Every file of a repository, by its path inside it."""

    texts: Mapping[str, str]
    """Small files, written as they stand."""
    copies: Mapping[str, Path]
    """Engine files and their manifests, copied from where they are."""


def build_model_repository(
    artifacts: Sequence[ModelArtifact],
    output: Path,
    *,
    profile: Profile,
    config: PipelineConfig,
    options: ServingOptions | None = None,
    version: int = 1,
) -> None:
    """Write a complete repository to ``output``, or leave what is there untouched.

    Args:
        artifacts: One artifact per engine model.
        output: Replaced in one step if it is a model repository; made if needed.
        profile: Which server will read it.
        config: Travels with the pipeline models.
        options: Queues, threads and instances; None takes the defaults.
        version: The number of the version folder, at least 1.

    Raises:
        ArtifactError: No pipeline can be served from these artifacts, they contradict each other,
            or the profile cannot serve one of them.
        ValueError: ``output`` is a folder with something else in it.
    """
    plan = plan_model_repository(
        artifacts, profile=profile, config=config, options=options, version=version
    )
    _replace_folder(output, plan.texts, plan.copies)


def write_repository_snapshot(
    artifacts: Sequence[ModelArtifact],
    output: Path,
    *,
    profile: Profile,
    config: PipelineConfig,
    options: ServingOptions | None = None,
) -> None:
    """Write the same files without the engines: what belongs under version control."""
    plan = plan_model_repository(artifacts, profile=profile, config=config, options=options)
    _replace_folder(output, plan.texts, {})


def plan_model_repository(
    artifacts: Sequence[ModelArtifact],
    *,
    profile: Profile,
    config: PipelineConfig,
    options: ServingOptions | None = None,
    version: int = 1,
) -> RepositoryPlan:
    """Decide every file of a repository; see ``build_model_repository``."""
    if version < 1:
        raise ValueError(f"version is {version}, expected at least 1")
    options = options or ServingOptions()
    by_model = _artifacts_by_model(artifacts)
    models = pipeline_models(by_model)
    served = member_contracts(models)
    pipelines = served_pipelines(by_model)
    if not pipelines:
        raise ArtifactError(
            f"no pipeline can be served from {sorted(by_model)}: weaksam_detect needs {DETECTOR}, "
            f"weaksam_segment needs {SAM_IMAGE_ENCODER} and {SAM_MASK_DECODER}"
        )
    texts: dict[str, str] = {}
    copies: dict[str, Path] = {}
    for artifact in by_model.values():
        texts |= _engine_texts(artifact, profile, options, version)
        copies |= _engine_copies(artifact, version)
    if WEAKSAM_PROPOSE.name in pipelines:
        texts |= _clustering_texts(models, config, profile, version)
    for pipeline in pipelines:
        members = [name for name in MEMBERS_OF_PIPELINE[pipeline] if name in served]
        file = PipelineFile(models=models, config=config, members=dict.fromkeys(members, version))
        engines = {name: by_model[name] for name in members if name in by_model}
        texts |= _pipeline_texts(pipeline, file, engines, options, version)
    return RepositoryPlan(texts=texts, copies=copies)


def pipeline_models(artifacts: Mapping[str, ModelArtifact]) -> PipelineModels:
    """The parameters that the pipelines need, from the artifacts by model.

    Raises:
        ArtifactError: SAM's encoder and decoder come from different models.
    """
    return PipelineModels(
        detector=_parameters(artifacts, DETECTOR, DetectorParameters),
        vit_classifier=_parameters(artifacts, VIT_CLASSIFIER, VitClassifierParameters),
        sam=_sam_parameters(artifacts),
    )


def member_contracts(models: PipelineModels) -> dict[str, ModelContract]:
    """The contracts of all models that pipelines with these parameters can call, by name."""
    return {
        name: engine_contract(name, value)
        for name, value in member_parameters(models).items()
        if value is not None
    }


def member_parameters(models: PipelineModels) -> dict[str, Parameters | None]:
    """The parameters of every member model by name; None: not served."""
    return {
        DETECTOR: models.detector,
        VIT_CLASSIFIER: models.vit_classifier,
        PROMPT_CLUSTERING: ClusteringParameters(),
        SAM_IMAGE_ENCODER: models.sam,
        SAM_MASK_DECODER: models.sam,
    }


def served_pipelines(models: Iterable[str]) -> tuple[str, ...]:
    """Which pipelines the engine models suffice for; ``weaksam_detect`` works without SAM."""
    available = {*models, PROMPT_CLUSTERING}
    optional = {WEAKSAM_DETECT.name: {SAM_IMAGE_ENCODER, SAM_MASK_DECODER}}
    return tuple(
        pipeline
        for pipeline, members in MEMBERS_OF_PIPELINE.items()
        if set(members) - optional.get(pipeline, set()) <= available
    )


def _artifacts_by_model(artifacts: Sequence[ModelArtifact]) -> dict[str, ModelArtifact]:
    by_model: dict[str, ModelArtifact] = {}
    for artifact in artifacts:
        if artifact.model in by_model:
            raise ArtifactError(
                f"two artifacts for {artifact.model}: {by_model[artifact.model].path} and "
                f"{artifact.path}; keep one"
            )
        by_model[artifact.model] = artifact
    return by_model


def _parameters(artifacts: Mapping[str, ModelArtifact], model: str, kind: type[_P]) -> _P | None:
    if model not in artifacts:
        return None
    parameters = artifacts[model].parameters
    if not isinstance(parameters, kind):
        raise ArtifactError(f"{artifacts[model].path}: parameters are not those of {model}")
    return parameters


def _sam_parameters(artifacts: Mapping[str, ModelArtifact]) -> SamParameters | None:
    encoder = _parameters(artifacts, SAM_IMAGE_ENCODER, SamParameters)
    decoder = _parameters(artifacts, SAM_MASK_DECODER, SamParameters)
    if encoder is None or decoder is None:
        return None
    if encoder != decoder:
        raise ArtifactError(
            f"SAM's encoder has {encoder}, its decoder {decoder}; export both from one checkpoint"
        )
    return encoder


# ---------------------------------------------------------------------------------------------
# The files of one model
# ---------------------------------------------------------------------------------------------


def engine_config_text(
    artifact: ModelArtifact, profile: Profile, options: ServingOptions, version: int
) -> str:
    """``config.pbtxt`` of an engine; raises ``ArtifactError`` where ``profile`` cannot serve it."""
    serving = engine_serving(artifact, profile)
    threads = {"python": THREADS_PARAMETER, "onnxruntime": "intra_op_thread_count"}
    settings = ModelSettings(
        serving=serving,
        engine_file=None if serving.opens_in_python else artifact.path.name,
        batches_requests=artifact.contract.is_batched,
        max_queue_delay_us=options.max_queue_delay_us,
        label_outputs=_LABEL_OUTPUTS.get(artifact.model, ()),
        # Zeros are no image and tags for it.
        warms_up=artifact.model != PROMPTED_CLASSIFIER,
        parameters=tuple(
            (name, str(options.engine_threads))
            for backend, name in threads.items()
            if backend == serving.backend
        ),
        version=version,
    )
    return config_text(artifact.contract, settings, options)


def _engine_texts(
    artifact: ModelArtifact, profile: Profile, options: ServingOptions, version: int
) -> dict[str, str]:
    config = engine_config_text(artifact, profile, options, version)
    texts = {f"{artifact.model}/{CONFIG_NAME}": config}
    if engine_serving(artifact, profile).opens_in_python:
        texts[f"{artifact.model}/{version}/model.py"] = engine_model_py(artifact.model)
    if artifact.model in _LABEL_OUTPUTS:
        names: tuple[str, ...] = getattr(artifact.parameters, "class_names", ())
        texts[f"{artifact.model}/{LABELS_NAME}"] = "".join(f"{name}\n" for name in names)
    return texts


def _engine_copies(artifact: ModelArtifact, version: int) -> dict[str, Path]:
    folder = f"{artifact.model}/{version}"
    return {f"{folder}/{path.name}": path for path in artifact_files(artifact)}


def artifact_files(artifact: ModelArtifact) -> tuple[Path, ...]:
    """Every file of an artifact: the engine, what belongs to it, and the manifest."""
    return (*artifact.files, artifact.path.parent / MANIFEST_NAME)


def engine_model_py(model: str) -> str:
    """``model.py`` of an engine in the embedded profile."""
    return _model_py(model, "engine_model", "EngineModel")


def clustering_config_text(profile: Profile, version: int) -> str:
    """``config.pbtxt`` of ``prompt_clustering``."""
    contract = engine_contract(PROMPT_CLUSTERING, ClusteringParameters())
    settings = ModelSettings(
        serving=EngineServing(backend="python"), batches_requests=False, version=version
    )
    if profile == "container":
        # On a GPU where there is one; then maps may stay there.
        settings = replace(
            settings,
            serving=EngineServing(backend="python", instance_kind="KIND_AUTO"),
            parameters=(("FORCE_CPU_ONLY_INPUT_TENSORS", "no"),),
        )
    return config_text(contract, settings, ServingOptions())


def _clustering_texts(
    models: PipelineModels, config: PipelineConfig, profile: Profile, version: int
) -> dict[str, str]:
    file = PipelineFile(models=models, config=config, members={})
    folder = f"{PROMPT_CLUSTERING}/{version}"
    return {
        f"{PROMPT_CLUSTERING}/{CONFIG_NAME}": clustering_config_text(profile, version),
        f"{folder}/model.py": _model_py(PROMPT_CLUSTERING, "clustering_model", "ClusteringModel"),
        f"{folder}/{PIPELINE_NAME}": pipeline_text(file),
    }


def pipeline_config_text(
    pipeline: str, passports: str, options: ServingOptions, version: int
) -> str:
    """``config.pbtxt`` of a pipeline whose engines ``passports`` (``passports_text``) describes."""
    # No warm-up request here: the server loads models in no order of its own, and a pipeline that
    # is warmed before its members are there would count as broken. The model warms its own parts
    # when it is loaded, and its members have warm-ups of theirs.
    settings = ModelSettings(
        serving=EngineServing(backend="python"),
        batches_requests=True,
        queue_is_bounded=True,
        instances=options.pipeline_instances,
        parameters=((PASSPORTS_PARAMETER, passports),),
        version=version,
    )
    return config_text(PIPELINE_CONTRACTS[pipeline], settings, options)


def _pipeline_texts(
    pipeline: str,
    file: "PipelineFile",
    engines: Mapping[str, ModelArtifact],
    options: ServingOptions,
    version: int,
) -> dict[str, str]:
    passports = passports_text(engines, file.members)
    return {
        f"{pipeline}/{CONFIG_NAME}": pipeline_config_text(pipeline, passports, options, version),
        f"{pipeline}/{version}/model.py": _model_py(
            pipeline, "pipeline_models", _PIPELINE_CLASSES[pipeline]
        ),
        f"{pipeline}/{version}/{PIPELINE_NAME}": pipeline_text(file),
    }


def _model_py(model: str, module: str, name: str) -> str:
    return (
        f'"""Serves ``{model}``."""\n\n'
        f"from weaksam_rt.serving.{module} import {name} as TritonPythonModel\n\n"
        '__all__ = ["TritonPythonModel"]\n'
    )


def passports_text(
    engines: Mapping[str, ModelArtifact],
    versions: Mapping[str, int],
    changes: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """What a pipeline's config says about the engines it calls, as JSON on one line.

    Args:
        engines: By model.
        versions: Of each model.
        changes: By model: what differs from the version before.
    """
    content = {
        name: {
            "version": versions[name],
            "engine": artifact.engine,
            "precision": artifact.passport.precision,
            "parity": _three_digits(artifact.passport.worst_parity),
            "ap50": artifact.passport.task_metrics.get("ap50"),
            "created_at": artifact.passport.created_at,
            "changes": list((changes or {}).get(name, ())),
        }
        for name, artifact in engines.items()
    }
    return json.dumps(content)


def _three_digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineFile:
    """What a pipeline model needs to know about its members: ``pipeline.json``."""

    models: PipelineModels
    config: PipelineConfig
    members: Mapping[str, int]
    """The version of each member that this version of the pipeline calls, and no other: every
    answer comes from one set of engines, whatever else is loaded at the time.
    """


def pipeline_text(file: PipelineFile) -> str:
    """``pipeline.json``."""
    content = {
        "models": file.models.to_json(),
        "config": file.config.to_json(),
        "members": dict(file.members),
    }
    return json.dumps(content, indent=2) + "\n"


def read_pipeline_file(path: Path) -> PipelineFile:
    """What ``pipeline_text`` wrote.

    Raises:
        ArtifactError: The file is missing or not one of ours.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        members = content["members"]
        if not all(type(version) is int and version > 0 for version in members.values()):
            raise ValueError(f"members are {members}, expected a version for each name")
        return PipelineFile(
            models=PipelineModels.from_json(content["models"]),
            config=PipelineConfig.from_json(content["config"]),
            members=members,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ContractError) as error:
        raise ArtifactError(
            f"{path} does not describe a pipeline ({error}); build the model repository again"
        ) from error


# ---------------------------------------------------------------------------------------------
# Reading exported models
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedModels:
    """What a folder of exported models holds."""

    artifacts: tuple[ModelArtifact, ...]
    config: PipelineConfig


def load_exported_models(folder: Path, config: Path | None = None) -> ExportedModels:
    """Every artifact under ``folder``, verified, and the settings to serve them with.

    Args:
        folder: One subfolder for each exported model.
        config: TOML file of the pipeline; None takes ``pipeline.toml`` in ``folder``, or the
            defaults.

    Raises:
        ArtifactError: There is no artifact, or one is damaged.
        ValueError: The settings are not valid.
    """
    folders = sorted(path.parent for path in folder.glob(f"*/{MANIFEST_NAME}"))
    if not folders:
        raise ArtifactError(f"{folder} holds no exported models (*/{MANIFEST_NAME})")
    beside = folder / SETTINGS_NAME
    chosen = config if config is not None else beside if beside.is_file() else None
    return ExportedModels(
        artifacts=tuple(map(load_artifact, folders)),
        config=PipelineConfig() if chosen is None else load_toml(chosen),
    )


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def _replace_folder(output: Path, texts: Mapping[str, str], copies: Mapping[str, Path]) -> None:
    _check_replaceable(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        fresh, old = Path(scratch) / "new", Path(scratch) / "old"
        fresh.mkdir()
        for name, text in texts.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_text(text)
        for name, source in copies.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, fresh / name)
        if output.exists():
            output.rename(old)
        fresh.rename(output)


def _check_replaceable(output: Path) -> None:
    if not output.exists():
        return
    if any((output / name).exists() for name in RELEASE_FILES):
        raise ValueError(
            f"{output} has had releases and may be being served; give a new folder, or delete this "
            "one when no server uses it"
        )
    strangers = (
        sorted(p.name for p in output.iterdir() if not (p / CONFIG_NAME).is_file())
        if output.is_dir()
        else [output.name]
    )
    if strangers:
        raise ValueError(
            f"{output} is no model repository (it holds {', '.join(strangers[:3])}); "
            "give a new folder, or empty this one"
        )
