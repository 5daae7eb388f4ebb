"""Releasing, rolling back, and cleaning up after a release that was killed: a live repository and
its server, changed together.

The order of the steps is the safety. Until ``commit`` the configs on disk name the old versions, so
that a server started at any moment serves them; the running server is told otherwise without the
disk (``switch``), watched, and told back if a check fails or the process that watches dies. From
``commit`` on the configs name the new versions.

A journal beside the models says what is under way. It is written before the first change and
removed after the last one; whoever finds it without a process that holds the lock finishes or
undoes the release (``recover``): the next release, or ``weaksam serve``.
"""

import fcntl
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from weaksam_rt.artifacts import ModelArtifact, utc_now
from weaksam_rt.errors import (
    ArtifactError,
    ReleaseError,
    ServerUnavailableError,
    WeakSamError,
)
from weaksam_rt.files import write_json
from weaksam_rt.live_repository import (
    append_history,
    engine_config,
    engine_versions_needed,
    history,
    live_version,
    live_versions,
    pipeline_config,
    pipeline_file,
    pipelines_of,
    plan_version,
    prune,
    read_config,
    remove_unfinished,
    remove_version,
    version_folders,
    write_config,
    write_engine_version,
    write_pipeline_versions,
)
from weaksam_rt.model_control import ModelControl
from weaksam_rt.model_repository import JOURNAL_NAME, LOCK_NAME

_LOGGER = logging.getLogger(__name__)

Check = Callable[[int], None]
"""Called with the version; raises ``WeakSamError`` where it does not answer as it should."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """What is under way, and all that is needed to undo or finish it."""

    action: Literal["release", "rollback"]
    model: str
    """The engine."""
    version: int
    """Of the pipelines, when done."""
    engine_version: int
    old_engine_version: int
    pipelines: Mapping[str, int]
    """The pipelines that switch, and their versions before."""
    configs: Mapping[str, str]
    """``config.pbtxt`` of the engine and the pipelines as they were before."""
    started_at: str

    @property
    def is_new(self) -> bool:
        """The version's folders are of this release: undoing it removes them."""
        return self.action == "release"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseReport:
    """A finished release."""

    release: Release
    seconds: Mapping[str, float]
    """By step."""
    removed: tuple[int, ...]
    """Old versions that were not kept."""


def publish(
    repository: Path,
    artifact: ModelArtifact,
    control: ModelControl,
    *,
    check_engine: Check,
    watch: Check,
    keep: int = 3,
    on_step: Callable[[str], None] = lambda step: None,
) -> ReleaseReport:
    """Make ``artifact`` the engine that is served, without a request failing.

    Args:
        repository: Live; served by the server of ``control``.
        artifact: Verified against its source and on its task.
        control: The server.
        check_engine: Called while the old version serves and the new engine is loaded beside it.
        watch: Called after the switch, for as long as the new version is on probation.
        keep: Versions that stay on disk, at least 2.
        on_step: Called with the name of each step when it is done.

    Raises:
        ReleaseError: A check failed or a version did not load; everything is as it was.
        ArtifactError: The artifact does not fit the repository; nothing was touched.
    """
    if keep < 2:
        raise ValueError(f"keep is {keep}, expected at least 2")
    with _locked(repository):
        _recover(repository, control)
        plan = plan_version(repository, artifact)
        release = Release(
            action="release",
            model=artifact.model,
            version=plan.version,
            engine_version=plan.version,
            old_engine_version=plan.live_engine_version,
            pipelines=plan.pipelines,
            configs=_configs(repository, artifact.model, plan.pipelines),
            started_at=utc_now(),
        )

        def stage() -> None:
            write_engine_version(repository, plan)
            on_step("write engine")
            write_pipeline_versions(repository, plan)

        return _run(
            repository, release, control,
            stage=stage, check_engine=check_engine, watch=watch, keep=keep, on_step=on_step,
        )  # fmt: skip


def roll_back(
    repository: Path,
    model: str,
    control: ModelControl,
    *,
    to: int | None = None,
    watch: Check = lambda version: None,
    on_step: Callable[[str], None] = lambda step: None,
) -> ReleaseReport:
    """Serve an earlier version of the pipelines that call ``model``, from the folders kept.

    Args:
        repository: Live.
        model: The engine.
        control: The server.
        to: The version; None: the one that the last release replaced.
        watch: Called after the switch.
        on_step: Called with the name of each step when it is done.

    Raises:
        ReleaseError: There is no such version, or it does not load; everything is as it was.
    """
    with _locked(repository):
        _recover(repository, control)
        pipelines = {p: live_version(repository, p) for p in pipelines_of(repository, model)}
        version = _version_before(repository, model) if to is None else to
        for pipeline, live in pipelines.items():
            kept = version_folders(repository, pipeline)
            if version not in kept or version == live:
                others = [v for v in kept if v != live] or "none"
                raise ReleaseError(
                    f"{pipeline} cannot be rolled back to version {version}: {live} is live, kept "
                    f"are {others}"
                )
        engines = {pipeline_file(repository, p, version).members[model] for p in pipelines}
        old = engine_versions_needed(repository, model)
        if len(engines) != 1 or len(old) != 1:
            raise ReleaseError(f"no single version of {model} belongs to version {version}")
        release = Release(
            action="rollback",
            model=model,
            version=version,
            engine_version=engines.pop(),
            old_engine_version=old[0],
            pipelines=pipelines,
            configs=_configs(repository, model, pipelines),
            started_at=utc_now(),
        )
        return _run(
            repository, release, control,
            stage=lambda: None, check_engine=lambda version: None, watch=watch, keep=None,
            on_step=on_step,
        )  # fmt: skip


def recover(repository: Path, control: ModelControl | None) -> str | None:
    """Undo or finish a release whose process died; None: there is none, or it still runs.

    Args:
        repository: Live.
        control: Its server; None: no server runs.

    Returns:
        What was done, in one line.
    """
    if not (repository / JOURNAL_NAME).is_file():
        return None
    try:
        with _locked(repository):
            return _recover(repository, control)
    except _LockedError:
        return None


# ---------------------------------------------------------------------------------------------
# The steps
# ---------------------------------------------------------------------------------------------


def _run(
    repository: Path,
    release: Release,
    control: ModelControl,
    *,
    stage: Callable[[], None],
    check_engine: Check,
    watch: Check,
    keep: int | None,
    on_step: Callable[[str], None],
) -> ReleaseReport:
    _check_server(release, control)
    seconds: dict[str, float] = {}
    steps: dict[str, Callable[[], None]] = {
        "journal": lambda: _write_journal(repository, release),
        "write pipelines": stage,
        "allow engine": lambda: _allow_both_engines(repository, release),
        "load engine": lambda: control.load(release.model),
        "check engine": lambda: check_engine(release.engine_version),
        "switch": lambda: _switch(repository, release, control),
        "watch": lambda: watch(release.version),
        "commit": lambda: _commit(repository, release),
    }
    try:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name] = round(time.perf_counter() - start, 3)
            on_step(name)
    except BaseException as error:
        _undo(repository, release, control)
        if isinstance(error, WeakSamError):
            raise ReleaseError(
                f"version {release.version} was not released: {error}; version "
                f"{', '.join(map(str, set(release.pipelines.values())))} is served as before"
            ) from error
        raise
    start = time.perf_counter()
    try:
        removed = _finish(repository, release, control, keep=keep, on_step=on_step)
    except ServerUnavailableError as error:
        raise ReleaseError(
            f"version {release.version} is live, and the version before could not be cleared away "
            f"yet: {error}; `weaksam serve --allow-releases` or the next release does it"
        ) from error
    seconds["finish"] = round(time.perf_counter() - start, 3)
    return ReleaseReport(release=release, seconds=seconds, removed=tuple(removed))


def _check_server(release: Release, control: ModelControl) -> None:
    """Is this the repository's server, and may its models be changed? Nothing is changed yet."""
    for pipeline, version in release.pipelines.items():
        ready = control.ready_versions(pipeline)
        if ready != {version}:
            raise ReleaseError(
                f"the server at {control.address} serves {pipeline} in versions "
                f"{sorted(ready) or 'none'}, the repository says {version}: is it another one's?"
            )
    control.load(release.model)  # nothing changed on disk: nothing is loaded


def _allow_both_engines(repository: Path, release: Release) -> None:
    versions = sorted({release.old_engine_version, release.engine_version})
    text = engine_config(repository, release.model, versions, release.engine_version)
    write_config(repository, release.model, text)


def _switch(repository: Path, release: Release, control: ModelControl) -> None:
    for pipeline in release.pipelines:
        control.load(pipeline, pipeline_config(repository, pipeline, release.version))


def _commit(repository: Path, release: Release) -> None:
    for pipeline in release.pipelines:
        text = pipeline_config(repository, pipeline, release.version)
        write_config(repository, pipeline, text)


def _is_committed(repository: Path, release: Release) -> bool:
    return all(live_version(repository, p) == release.version for p in release.pipelines)


def _finish(
    repository: Path,
    release: Release,
    control: ModelControl | None,
    *,
    keep: int | None,
    on_step: Callable[[str], None] = lambda step: None,
) -> list[int]:
    """What is left after the commit: the old engine goes, once nothing calls it."""
    entry = {
        "version": release.version,
        "action": release.action,
        "model": release.model,
        "replaced": dict(release.pipelines),
        "at": release.started_at,
    }
    if entry not in history(repository):
        append_history(repository, entry)
    on_step("history")
    if control is not None:
        for pipeline, version in release.pipelines.items():
            if release.version not in control.ready_versions(pipeline):  # found after a kill
                control.load(pipeline, read_config(repository, pipeline))
            control.wait_until_gone(pipeline, version)
    _settle_engine(repository, release.model, control)
    on_step("unload engine")
    removed = [] if keep is None else prune(repository, release.model, keep)
    on_step("prune")
    (repository / JOURNAL_NAME).unlink()
    return removed


def _undo(repository: Path, release: Release, control: ModelControl | None) -> None:
    """Everything as it was before ``release``, whatever of it had been done."""
    for pipeline in release.pipelines:
        write_config(repository, pipeline, release.configs[pipeline])
    if control is not None:
        try:
            _take_back(release, control)
        except ServerUnavailableError as error:
            _LOGGER.warning("%s; when it starts again it serves the version before", error)
            control = None
    write_config(repository, release.model, release.configs[release.model])
    if control is not None:
        control.load(release.model)
    if release.is_new:
        for model in (*release.pipelines, release.model):
            remove_version(repository, model, release.version)
    (repository / JOURNAL_NAME).unlink(missing_ok=True)


def _take_back(release: Release, control: ModelControl) -> None:
    for pipeline, version in release.pipelines.items():
        if control.ready_versions(pipeline) != {version}:
            control.load(pipeline, release.configs[pipeline])
        control.wait_until_gone(pipeline, release.version)


def _settle_engine(repository: Path, model: str, control: ModelControl | None) -> None:
    """Leave loaded and named what the live pipelines call, nothing else."""
    needed = engine_versions_needed(repository, model)
    if live_versions(repository, model) != needed:
        write_config(repository, model, engine_config(repository, model, needed, needed[-1]))
        if control is not None:
            control.load(model)


# ---------------------------------------------------------------------------------------------
# Journal and lock
# ---------------------------------------------------------------------------------------------


def _recover(repository: Path, control: ModelControl | None) -> str | None:
    release = _read_journal(repository)
    if release is None:
        remove_unfinished(repository)
        return None
    what = f"{release.action} of version {release.version} ({release.started_at})"
    if _is_committed(repository, release):
        _finish(repository, release, control, keep=None)
        done = f"finished the interrupted {what}"
    else:
        _undo(repository, release, control)
        done = f"undid the interrupted {what}"
    remove_unfinished(repository)
    _LOGGER.warning("%s", done)
    return done


def _write_journal(repository: Path, release: Release) -> None:
    write_json(repository / JOURNAL_NAME, asdict(release))


def _read_journal(repository: Path) -> Release | None:
    path = repository / JOURNAL_NAME
    if not path.is_file():
        return None
    try:
        return Release(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path} is damaged ({error}); check the configs' version_policy and remove it"
        ) from error


class _LockedError(ReleaseError):
    """Another process is at work."""


@contextmanager
def _locked(repository: Path) -> Iterator[None]:
    """Hold the repository's lock; the kernel gives it back when the process dies."""
    if not repository.is_dir():
        raise ArtifactError(f"{repository} is not a folder")
    with (repository / LOCK_NAME).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _LockedError(
                f"another release into {repository} is under way; wait for it"
            ) from error
        yield


def _configs(repository: Path, model: str, pipelines: Mapping[str, int]) -> dict[str, str]:
    return {name: read_config(repository, name) for name in (model, *pipelines)}


def _version_before(repository: Path, model: str) -> int:
    """The version that the last release of ``model`` replaced."""
    entries: list[dict[str, Any]] = history(repository)
    releases = [e for e in entries if e["model"] == model and e["action"] == "release"]
    if not releases:
        raise ReleaseError(f"no release of {model} is on record; name a version to go back to")
    return max(int(version) for version in releases[-1]["replaced"].values())
