"""A model repository on disk that changes while it is served: which versions are live, the next
one written beside them, and the lines that choose. Knows no server.

A version folder is never changed once it has its name, and no folder is served because it exists:
``config.pbtxt`` names the versions. So what a restarted server would serve is what the configs
say, at any moment.
"""

import json
import os
import py_compile
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from weaksam_rt.artifacts import (
    ModelArtifact,
    load_artifact,
    passport_changes,
)
from weaksam_rt.contracts import (
    DETECTOR,
    MEMBERS_OF_PIPELINE,
    PROMPT_CLUSTERING,
    SAM_IMAGE_ENCODER,
    SAM_MASK_DECODER,
    VIT_CLASSIFIER,
)
from weaksam_rt.errors import ArtifactError
from weaksam_rt.files import atomic_path, write_json
from weaksam_rt.model_config import (
    PASSPORTS_PARAMETER,
    with_label_file,
    with_parameter,
    with_versions,
)
from weaksam_rt.model_repository import (
    CONFIG_NAME,
    HISTORY_NAME,
    PIPELINE_NAME,
    PipelineFile,
    artifact_files,
    passports_text,
    pipeline_text,
    read_pipeline_file,
)

_STAGING = re.compile(r"\.\d+\.staging")
_KEY_OF_MODEL = {
    DETECTOR: "detector",
    VIT_CLASSIFIER: "vit_classifier",
    SAM_IMAGE_ENCODER: "sam",
    SAM_MASK_DECODER: "sam",
}
"""The engines that pipelines call, and which part of ``PipelineModels`` describes each."""
_HISTORY_KEPT = 200


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def read_config(repository: Path, model: str) -> str:
    """The text of a model's ``config.pbtxt``; raises ``ArtifactError`` where there is none."""
    try:
        return (repository / model / CONFIG_NAME).read_text()
    except OSError as error:
        raise ArtifactError(
            f"{repository} has no {model}/{CONFIG_NAME}: it is no model repository, or does not "
            f"serve {model}"
        ) from error


def versions_in_config(text: str) -> tuple[int, ...]:
    """The versions that a ``config.pbtxt`` tells the server to serve.

    Raises:
        ArtifactError: It names none, as repositories built before versions were named.
    """
    try:
        message = text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ArtifactError(f"{CONFIG_NAME} cannot be read: {error}") from error
    versions = tuple(message.version_policy.specific.versions)
    if not versions:
        raise ArtifactError(
            f"the config of {message.name or 'a model'} does not name the versions to serve; build "
            "the model repository again"
        )
    return versions


def live_versions(repository: Path, model: str) -> tuple[int, ...]:
    """The versions of ``model`` that a server started now would serve."""
    return versions_in_config(read_config(repository, model))


def live_version(repository: Path, model: str) -> int:
    """The one version of a pipeline that is served; raises ``ArtifactError`` if it is not one."""
    versions = live_versions(repository, model)
    if len(versions) != 1:
        raise ArtifactError(f"{model} names versions {versions}, expected one")
    return versions[0]


def version_folders(repository: Path, model: str) -> list[int]:
    """The versions of ``model`` on disk, ascending; served or kept."""
    names = [p.name for p in (repository / model).iterdir() if p.is_dir()]
    return sorted(int(name) for name in names if name.isdigit() and name != "0")


def pipelines_of(repository: Path, model: str) -> tuple[str, ...]:
    """The pipelines in ``repository`` whose live version calls the engine ``model``."""
    return tuple(
        pipeline
        for pipeline in MEMBERS_OF_PIPELINE
        if (repository / pipeline / CONFIG_NAME).is_file()
        and model in pipeline_file(repository, pipeline).members
    )


def pipeline_file(repository: Path, pipeline: str, version: int | None = None) -> PipelineFile:
    """``pipeline.json`` of a version; None: of the live one."""
    chosen = live_version(repository, pipeline) if version is None else version
    return read_pipeline_file(repository / pipeline / str(chosen) / PIPELINE_NAME)


def engine_versions_needed(repository: Path, model: str) -> tuple[int, ...]:
    """The versions of an engine that the live pipelines call, ascending."""
    return tuple(
        sorted(
            {
                pipeline_file(repository, pipeline).members[model]
                for pipeline in pipelines_of(repository, model)
            }
        )
    )


def history(repository: Path) -> list[dict[str, Any]]:
    """What was released and rolled back, oldest first; empty before the first release."""
    path = repository / HISTORY_NAME
    if not path.is_file():
        return []
    try:
        content: list[dict[str, Any]] = json.loads(path.read_text())["releases"]
        return content
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); move it away") from error


def next_version(repository: Path) -> int:
    """A number that no version of any model has or had."""
    models = [p.name for p in repository.iterdir() if (p / CONFIG_NAME).is_file()]
    on_disk = [v for model in models for v in version_folders(repository, model)]
    released = [int(entry["version"]) for entry in history(repository)]
    return max([0, *on_disk, *released]) + 1


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def write_config(repository: Path, model: str, text: str) -> None:
    """Replace a model's ``config.pbtxt`` in one step."""
    with atomic_path(repository / model / CONFIG_NAME) as temporary:
        temporary.write_text(text)


def append_history(repository: Path, entry: Mapping[str, Any]) -> None:
    """Add one entry to the history, atomically."""
    entries = [*history(repository), dict(entry)][-_HISTORY_KEPT:]
    write_json(repository / HISTORY_NAME, {"releases": entries})


@dataclass(frozen=True, kw_only=True, slots=True)
class NewEngine:
    """An engine that takes the place of a live one."""

    artifact: ModelArtifact
    live: ModelArtifact
    """The engine that it replaces."""
    live_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class NewVersion:
    """A version to be written: new engines, and the pipelines that will call them."""

    version: int
    engines: Mapping[str, NewEngine]
    """By model."""
    pipelines: Mapping[str, int]
    """Their live versions."""


def plan_version(repository: Path, artifacts: Sequence[ModelArtifact]) -> NewVersion:
    """What releasing ``artifacts`` into ``repository`` means; nothing is written.

    Raises:
        ArtifactError: The repository does not serve a model, an artifact needs another config than
            the live one (versions of one model share theirs), or half a SAM is given.
    """
    _check_halves(artifacts)
    engines = {artifact.model: _new_engine(repository, artifact) for artifact in artifacts}
    if len(engines) != len(artifacts) or not artifacts:
        raise ArtifactError(
            f"a release takes one engine for each model, got {[a.model for a in artifacts]}"
        )
    pipelines = [p for model in engines for p in pipelines_of(repository, model)]
    return NewVersion(
        version=next_version(repository),
        engines=engines,
        pipelines={pipeline: live_version(repository, pipeline) for pipeline in pipelines},
    )


def _new_engine(repository: Path, artifact: ModelArtifact) -> NewEngine:
    model = artifact.model
    if model not in _KEY_OF_MODEL:
        raise ArtifactError(f"{model} has no engine that a pipeline calls: nothing to release")
    needed = engine_versions_needed(repository, model)
    if len(needed) != 1:
        raise ArtifactError(
            f"the pipelines of {repository} call versions {needed} of {model}, expected one: "
            "build the model repository again"
        )
    live = load_artifact(repository / model / str(needed[0]))
    if artifact.contract != live.contract:
        raise ArtifactError(
            f"the new {model} has {artifact.parameters}, the live one {live.parameters}: versions "
            "of one model share their tensors' shapes; build a new repository with `python -m "
            "export repository` and serve it beside this one"
        )
    if (artifact.engine, artifact.path.name) != (live.engine, live.path.name):
        raise ArtifactError(
            f"the new engine is {artifact.path.name} for {artifact.engine}, the live one "
            f"{live.path.name} for {live.engine}; build a new repository"
        )
    return NewEngine(artifact=artifact, live=live, live_version=needed[0])


def _check_halves(artifacts: Sequence[ModelArtifact]) -> None:
    """SAM's halves go together: one's embeddings mean nothing to another's decoder."""
    halves = [a for a in artifacts if a.model in (SAM_IMAGE_ENCODER, SAM_MASK_DECODER)]
    if len(halves) == 1:
        raise ArtifactError(
            f"{halves[0].model} is half a SAM: release {SAM_IMAGE_ENCODER} and {SAM_MASK_DECODER} "
            "of one checkpoint together"
        )
    if halves and halves[0].parameters != halves[-1].parameters:
        raise ArtifactError(
            f"{halves[0].model} has {halves[0].parameters}, {halves[-1].model} "
            f"{halves[-1].parameters}; export both from one checkpoint"
        )
    checkpoints = {half.passport.source.get("sha256") for half in halves}
    if len(checkpoints) > 1:
        raise ArtifactError(
            f"{SAM_IMAGE_ENCODER} and {SAM_MASK_DECODER} come from different checkpoints "
            f"({', '.join(sorted(str(c)[:12] for c in checkpoints))}); export both from one"
        )


def write_engine_versions(repository: Path, plan: NewVersion) -> None:
    """Write the new engines' folders."""
    for model, engine in plan.engines.items():
        live = repository / model / str(engine.live_version)
        files = [path for path in live.iterdir() if path.name == "model.py"]
        files += artifact_files(engine.artifact)

        def fill(folder: Path, files: Sequence[Path] = tuple(files)) -> None:
            for path in files:
                shutil.copyfile(path, folder / path.name)

        _write_folder(repository / model / str(plan.version), fill)


def write_pipeline_versions(repository: Path, plan: NewVersion) -> None:
    """Write a version of each pipeline that calls the new engines and is otherwise the live one."""
    for pipeline, version in plan.pipelines.items():
        live = repository / pipeline / str(version)
        text = pipeline_text(_next_pipeline_file(pipeline_file(repository, pipeline), plan))

        def fill(folder: Path, live: Path = live, text: str = text) -> None:
            shutil.copyfile(live / "model.py", folder / "model.py")
            (folder / PIPELINE_NAME).write_text(text)

        _write_folder(repository / pipeline / str(plan.version), fill)


def engine_config(repository: Path, model: str, versions: Sequence[int], named: int) -> str:
    """The config of an engine that serves ``versions``, with the class names of ``named``.

    Where no label file holds these names yet, one is written; a config that changes in nothing but
    its versions lets the server keep what it has loaded.
    """
    text = with_versions(read_config(repository, model), versions)
    names = _class_names(load_artifact(repository / model / str(named)))
    if not names:
        return text
    labels = "".join(f"{name}\n" for name in names)
    fitting = [
        path.name
        for path in sorted((repository / model).glob("labels*.txt"))
        if path.read_text() == labels
    ]
    if any(f'"{name}"' in text for name in fitting):
        return text
    if not fitting:
        fitting = [_label_file(named)]
        with atomic_path(repository / model / fitting[0]) as temporary:
            temporary.write_text(labels)
    return with_label_file(text, fitting[0])


def pipeline_config(repository: Path, pipeline: str, version: int) -> str:
    """The config of a pipeline that serves ``version``, with what its passports say."""
    file = pipeline_file(repository, pipeline, version)
    before = pipeline_file(repository, pipeline)
    engines, changes = {}, {}
    for model, number in file.members.items():
        if model == PROMPT_CLUSTERING:
            continue
        engines[model] = load_artifact(repository / model / str(number))
        old = before.members.get(model, number)
        if old != number:
            live = load_artifact(repository / model / str(old))
            changes[model] = passport_changes(engines[model], live)
    text = with_versions(read_config(repository, pipeline), (version,))
    described = passports_text(engines, file.members, changes)
    return with_parameter(text, PASSPORTS_PARAMETER, described)


def remove_version(repository: Path, model: str, version: int) -> None:
    """Remove a version's folder and labels, whole or half-written; nothing if it is not there.

    Raises:
        ValueError: The config names it.
    """
    folder = repository / model / str(version)
    if version in live_versions(repository, model):
        raise ValueError(f"{folder} is live and was not removed")
    for path in (folder, _staging(folder)):
        if path.exists():
            # Renamed first: a folder with its number is always whole.
            path = path.rename(_staging(folder)) if path == folder else path
            shutil.rmtree(path)
    label_file = _label_file(version)
    if label_file not in read_config(repository, model):
        (repository / model / label_file).unlink(missing_ok=True)


def remove_unfinished(repository: Path) -> None:
    """Remove half-written folders that a killed release left."""
    for path in repository.glob("*/.*.staging"):
        if _STAGING.fullmatch(path.name):
            shutil.rmtree(path)


def prune(repository: Path, models: Sequence[str], keep: int) -> list[int]:
    """Remove old versions of the pipelines that call engines, and engines that nothing calls.

    Args:
        repository: Live.
        models: The engines.
        keep: How many versions of each pipeline stay, the live one among them, at least 2: with
            one there is no way back.

    Returns:
        The pipelines' versions that were removed.
    """
    if keep < 2:
        raise ValueError(f"keep is {keep}, expected at least 2")
    removed = set()
    for pipeline in {p: None for model in models for p in pipelines_of(repository, model)}:
        live = live_version(repository, pipeline)
        others = [v for v in version_folders(repository, pipeline) if v != live]
        for version in others[: max(len(others) - (keep - 1), 0)]:
            remove_version(repository, pipeline, version)
            removed.add(version)
    for model in _KEY_OF_MODEL:  # a removed pipeline may have been the last to call any of them
        if (repository / model / CONFIG_NAME).is_file():
            _remove_uncalled(repository, model)
    return sorted(removed)


def _remove_uncalled(repository: Path, model: str) -> None:
    called = {
        pipeline_file(repository, pipeline, version).members.get(model)
        for pipeline in pipelines_of(repository, model)
        for version in version_folders(repository, pipeline)
    }
    for version in version_folders(repository, model):
        if version not in called and version not in live_versions(repository, model):
            remove_version(repository, model, version)


def compile_model_files(repository: Path) -> None:
    """Write the byte code of every ``model.py`` before a server looks at the folders.

    Otherwise Python writes it at the first load, and the server takes the version for a changed
    one and starts it anew at the next. A repository that cannot be written to is left alone.
    """
    for path in repository.glob("*/*/model.py"):
        _compile(path)


def _compile(path: Path) -> None:
    try:
        py_compile.compile(str(path), doraise=True)
    except (OSError, py_compile.PyCompileError):
        return  # the server will say what is wrong with it


def _next_pipeline_file(file: PipelineFile, plan: NewVersion) -> PipelineFile:
    called = {model: e.artifact for model, e in plan.engines.items() if model in file.members}
    parameters: Any = {_KEY_OF_MODEL[model]: a.parameters for model, a in called.items()}
    return replace(
        file,
        models=replace(file.models, **parameters),
        members={**file.members, **dict.fromkeys(called, plan.version)},
    )


def _write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make ``folder`` appear whole: filled under another name, flushed, then renamed."""
    with _fresh(_staging(folder)) as staging:
        fill(staging)
        for path in list(staging.glob("model.py")):
            _compile(path)
        for path in [*staging.rglob("*"), staging]:
            _flush(path)
        staging.rename(folder)
    _flush(folder.parent)


@contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _staging(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.staging")


def _label_file(version: int) -> str:
    return f"labels.{version}.txt"


def _class_names(artifact: ModelArtifact) -> tuple[str, ...]:
    names: tuple[str, ...] = getattr(artifact.parameters, "class_names", ())
    return names
