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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from weaksam_rt.artifacts import ModelArtifact, utc_now
from weaksam_rt.contracts import PROMPT_CLUSTERING
from weaksam_rt.errors import (
    ArtifactError,
    ReleaseError,
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
    write_engine_versions,
    write_pipeline_versions,
)
from weaksam_rt.model_control import ModelControl
from weaksam_rt.model_repository import JOURNAL_NAME, LOCK_NAME

_LOGGER = logging.getLogger(__name__)

_WHO_ENDS_IT = "`weaksam serve --allow-releases` or the next release does it"
Check = Callable[[int], None]
"""Called with the version; raises ``WeakSamError`` where it does not answer as it should."""


class Switch(NamedTuple):
    """From one version of a model to another."""

    old: int
    new: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """What is under way, and all that is needed to undo or finish it."""

    action: Literal["release", "rollback"]
    version: int
    """What a release writes; the newest of those that a rollback goes back to."""
    engines: Mapping[str, Switch]
    """The engines that are exchanged: one, or both halves of SAM."""
    pipelines: Mapping[str, Switch]
    """The pipelines that call them."""
    configs: Mapping[str, str]
    """``config.pbtxt`` of engines and pipelines as they were before."""
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
    artifacts: Sequence[ModelArtifact],
    control: ModelControl,
    *,
    check_engine: Check,
    watch: Check,
    keep: int = 3,
    on_step: Callable[[str], None] = lambda step: None,
) -> ReleaseReport:
    """Make ``artifacts`` the engines that are served, without a request failing.

    Args:
        repository: Live; served by the server of ``control``.
        artifacts: One engine, or SAM's encoder and decoder of one checkpoint; verified against
            their source and on their task.
        control: The server.
        check_engine: Called while the old version serves and the new engine is loaded beside it.
        watch: Called after the switch, for as long as the new version is on probation.
        keep: Versions that stay on disk, at least 2.
        on_step: Called with the name of each step when it is done.

    Raises:
        ReleaseError: A check failed or a version did not load; everything is as it was, or will be
            when the server answers again (the message says so).
        ArtifactError: The artifacts do not fit the repository or each other; nothing was touched.
    """
    if keep < 2:
        raise ValueError(f"keep is {keep}, expected at least 2")
    with _locked(repository):
        _recover(repository, control)
        plan = plan_version(repository, artifacts)
        release = Release(
            action="release",
            version=plan.version,
            engines={
                name: Switch(engine.live_version, plan.version)
                for name, engine in plan.engines.items()
            },
            pipelines={
                name: Switch(version, plan.version) for name, version in plan.pipelines.items()
            },
            configs=_configs(repository, [*plan.engines, *plan.pipelines]),
            started_at=utc_now(),
        )

        def stage() -> None:
            write_engine_versions(repository, plan)
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
    """Serve the pipelines that call ``model`` as they were before, from the folders kept.

    Args:
        repository: Live.
        model: The engine.
        control: The server.
        to: A version that one of them has had: each goes back to its newest version that is not
            newer. None: what the last release of ``model`` replaced.
        watch: Called after the switch.
        on_step: Called with the name of each step when it is done.

    Raises:
        ReleaseError: There is no such version, or it does not load; everything is as it was.
    """
    with _locked(repository):
        _recover(repository, control)
        pipelines = _switches_back(repository, model, to)
        engines = _engines_of(repository, pipelines)
        release = Release(
            action="rollback",
            version=max(switch.new for switch in pipelines.values()),
            engines=engines,
            pipelines=pipelines,
            configs=_configs(repository, [*engines, *pipelines]),
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

    Raises:
        ReleaseError: The server does not answer or refuses; the journal stays for another call.
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
        "load engine": lambda: _load_engines(release, control),
        "check engine": lambda: check_engine(release.version),
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
        failures = _undo(repository, release, control)
        old = ", ".join(map(str, _old_versions(release)))
        served = (
            f"version {old} is served as before"
            if not failures
            else f"the server could not be brought back to version {old} yet ({failures[0]}): "
            f"{_WHO_ENDS_IT}, and a server that starts anew serves it"
        )
        if isinstance(error, WeakSamError):
            raise ReleaseError(
                f"version {release.version} was not released: {error}; {served}"
            ) from error
        _LOGGER.warning("version %d was not released; %s", release.version, served)
        raise
    start = time.perf_counter()
    removed = _finish(repository, release, control, keep=keep, on_step=on_step)
    seconds["finish"] = round(time.perf_counter() - start, 3)
    return ReleaseReport(release=release, seconds=seconds, removed=tuple(removed))


def _check_server(release: Release, control: ModelControl) -> None:
    """Is this the repository's server, and may its models be changed? Nothing is changed yet."""
    for pipeline, switch in release.pipelines.items():
        ready = control.ready_versions(pipeline)
        if ready != {switch.old}:
            raise ReleaseError(
                f"the server at {control.address} serves {pipeline} in versions "
                f"{sorted(ready) or 'none'}, the repository says {switch.old}: is it another one's?"
            )
    _load_engines(release, control)  # nothing changed on disk: nothing is loaded


def _load_engines(release: Release, control: ModelControl) -> None:
    for model in release.engines:
        control.load(model)


def _allow_both_engines(repository: Path, release: Release) -> None:
    for model, switch in release.engines.items():
        versions = sorted({*live_versions(repository, model), switch.new})
        write_config(repository, model, engine_config(repository, model, versions, switch.new))


def _switch(repository: Path, release: Release, control: ModelControl) -> None:
    for pipeline, switch in release.pipelines.items():
        control.load(pipeline, pipeline_config(repository, pipeline, switch.new))


def _commit(repository: Path, release: Release) -> None:
    for pipeline, switch in release.pipelines.items():
        write_config(repository, pipeline, pipeline_config(repository, pipeline, switch.new))


def _is_committed(repository: Path, release: Release) -> bool:
    """Half committed counts as not: undoing gives every pipeline its config back."""
    return all(live_version(repository, p) == s.new for p, s in release.pipelines.items())


def _old_versions(release: Release) -> list[int]:
    return sorted({switch.old for switch in release.pipelines.values()})


def _finish(
    repository: Path,
    release: Release,
    control: ModelControl | None,
    *,
    keep: int | None,
    on_step: Callable[[str], None] = lambda step: None,
) -> list[int]:
    """What is left after the commit: the old engine goes, once nothing calls it.

    Raises:
        ReleaseError: The server does not answer, or refuses; the journal stays for ``recover``.
    """
    try:
        return _clear_away(repository, release, control, keep, on_step)
    except WeakSamError as error:
        raise ReleaseError(
            f"version {release.version} is live, and the version before could not be cleared away "
            f"yet: {error}; {_WHO_ENDS_IT}"
        ) from error


def _clear_away(
    repository: Path,
    release: Release,
    control: ModelControl | None,
    keep: int | None,
    on_step: Callable[[str], None],
) -> list[int]:
    entry = {
        "version": release.version,
        "action": release.action,
        "models": list(release.engines),
        "replaced": {pipeline: switch.old for pipeline, switch in release.pipelines.items()},
        "at": release.started_at,
    }
    if entry not in history(repository):
        append_history(repository, entry)
    on_step("history")
    if control is not None:
        for pipeline, switch in release.pipelines.items():
            if switch.new not in control.ready_versions(pipeline):  # found after a kill
                control.load(pipeline, read_config(repository, pipeline))
            control.wait_until_gone(pipeline, switch.old)
    for model in release.engines:
        _settle_engine(repository, model, control)
    on_step("unload engine")
    removed = [] if keep is None else prune(repository, list(release.engines), keep)
    on_step("prune")
    (repository / JOURNAL_NAME).unlink()
    return removed


def _undo(repository: Path, release: Release, control: ModelControl | None) -> list[WeakSamError]:
    """Everything as it was before ``release``, whatever of it had been done.

    Returns:
        Why the server is not back; empty: it is, or none runs. Otherwise only the configs are as
        before. The journal stays for ``recover``, and so do the folders that the server may still
        read.
    """
    for pipeline in release.pipelines:
        write_config(repository, pipeline, release.configs[pipeline])
    failures = [] if control is None else _take_back(release, control)
    for model in release.engines:
        write_config(repository, model, release.configs[model])
    # Pipelines that could not be taken back may still call the new engines.
    if control is not None and not failures:
        failures = _failures(release.engines, control.load)
    if failures:
        return failures
    if release.is_new:
        for model in (*release.pipelines, *release.engines):
            remove_version(repository, model, release.version)
    (repository / JOURNAL_NAME).unlink(missing_ok=True)
    return []


def _take_back(release: Release, control: ModelControl) -> list[WeakSamError]:
    """Why pipelines are not back in their old version; empty: all are."""

    def take_back(pipeline: str) -> None:
        switch = release.pipelines[pipeline]
        if control.wanted_versions(pipeline) != {switch.old}:
            control.load(pipeline, release.configs[pipeline])
        control.wait_until_gone(pipeline, switch.new)

    return _failures(release.pipelines, take_back)


def _failures(models: Iterable[str], do: Callable[[str], None]) -> list[WeakSamError]:
    """``do`` for every model, whichever fail; their errors."""
    errors = []
    for model in models:
        try:
            do(model)
        except WeakSamError as error:
            _LOGGER.warning("%s: %s", model, error)
            errors.append(error)
    return errors


def _settle_engine(repository: Path, model: str, control: ModelControl | None) -> None:
    """Leave loaded and named what the live pipelines call, nothing else."""
    needed = engine_versions_needed(repository, model)
    if live_versions(repository, model) != needed:
        write_config(repository, model, engine_config(repository, model, needed, needed[-1]))
    # Asked, not concluded from the disk: a load that took too long is found half done.
    if control is not None and control.wanted_versions(model) != set(needed):
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
    elif failures := _undo(repository, release, control):
        raise ReleaseError(
            f"the interrupted {what} could not be undone yet: {failures[0]}; {_WHO_ENDS_IT}"
        ) from failures[0]
    else:
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
        content = json.loads(path.read_text())
        for kind in ("engines", "pipelines"):
            content[kind] = {name: Switch(*pair) for name, pair in content[kind].items()}
        return Release(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
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


def _configs(repository: Path, models: Sequence[str]) -> dict[str, str]:
    return {name: read_config(repository, name) for name in models}


# ---------------------------------------------------------------------------------------------
# The way back
# ---------------------------------------------------------------------------------------------


def _switches_back(repository: Path, model: str, to: int | None) -> dict[str, Switch]:
    """The pipelines that go back with ``model``, from what is live to what was.

    Raises:
        ReleaseError: There is nothing to go back to.
    """
    pipelines = pipelines_of(repository, model)
    live = {pipeline: live_version(repository, pipeline) for pipeline in pipelines}
    kept = {pipeline: version_folders(repository, pipeline) for pipeline in pipelines}
    if to is None:
        replaced = _replaced_by_last_release(repository, model)
        targets = {p: version for p, version in replaced.items() if p in live}
    elif any(to in versions for versions in kept.values()):
        targets = {p: max((v for v in kept[p] if v <= to), default=to) for p in pipelines}
        targets = {p: version for p, version in targets.items() if version != live[p]}
    else:
        targets = dict.fromkeys(pipelines, to)
    for pipeline, target in targets.items():
        others = [v for v in kept[pipeline] if v != live[pipeline]]
        if target not in others:
            raise ReleaseError(
                f"{pipeline} cannot be rolled back to version {target}: {live[pipeline]} is live, "
                f"kept are {others or 'none'}"
            )
    if not targets:
        raise ReleaseError(f"the pipelines of {model} are at version {to} already: {live}")
    return {p: Switch(live[p], target) for p, target in targets.items()}


def _replaced_by_last_release(repository: Path, model: str) -> dict[str, int]:
    """By pipeline: the version that the last release of ``model`` replaced."""
    entries: list[dict[str, Any]] = history(repository)
    releases = [e for e in entries if model in _models_of(e) and e["action"] == "release"]
    if not releases:
        raise ReleaseError(f"no release of {model} is on record; name a version to go back to")
    return {pipeline: int(version) for pipeline, version in releases[-1]["replaced"].items()}


def _models_of(entry: Mapping[str, Any]) -> list[str]:
    """What an entry of the history released; older entries name one model."""
    return entry["models"] if "models" in entry else [entry["model"]]


def _engines_of(repository: Path, pipelines: Mapping[str, Switch]) -> dict[str, Switch]:
    """Every engine that the pipelines call in another version than before.

    Raises:
        ReleaseError: A pipeline that stays would call another version of one.
    """
    engines: dict[str, Switch] = {}
    for pipeline, switch in pipelines.items():
        now, then = (pipeline_file(repository, pipeline, v).members for v in switch)
        changed = {m: Switch(now[m], then[m]) for m in now.keys() & then.keys()}
        engines |= {m: s for m, s in changed.items() if s.old != s.new and m != PROMPT_CLUSTERING}
    for model, switch in engines.items():
        for pipeline in pipelines_of(repository, model):
            version = pipelines[pipeline].new if pipeline in pipelines else None
            called = pipeline_file(repository, pipeline, version).members[model]
            if called != switch.new:
                raise ReleaseError(
                    f"going back would take {model} to version {switch.new}, and {pipeline} would "
                    f"call its version {called}: roll back the later release of {model} first"
                )
    return engines
