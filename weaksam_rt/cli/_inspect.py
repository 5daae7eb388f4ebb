"""``weaksam models`` and ``weaksam check``: what is served, and whether it can be."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from weaksam_rt.artifacts import (
    MANIFEST_NAME,
    ModelArtifact,
    load_artifact,
    passport_changes,
)
from weaksam_rt.cli._connection import Connection
from weaksam_rt.client import EngineSummary
from weaksam_rt.errors import ArtifactError, WeakSamError
from weaksam_rt.live_repository import live_versions, version_folders
from weaksam_rt.model_repository import CONFIG_NAME
from weaksam_rt.repository_check import check_model_repository
from weaksam_rt.server import check_installation

_DEFAULT_CONNECTION = Connection()


def models(
    folder: Annotated[Path | None, tyro.conf.Positional] = None,
    *,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    connection: Annotated[Connection, tyro.conf.arg(name="")] = _DEFAULT_CONNECTION,
) -> int:
    """List what a running server serves, or what a folder holds: version, precision, agreement with
    PyTorch, AP50, age, and what changed since the version before.

    Args:
        folder: Folder of exported models or a model repository; without it the server is asked.
        as_json: Print JSON instead of a table.
        connection: Where the server is.
    """
    if folder is not None:
        is_repository = any(folder.glob(f"*/{CONFIG_NAME}"))
        return (_list_repository if is_repository else _list_artifacts)(folder, as_json)
    with connection.client() as client:
        served = client.models()
    if as_json:
        print(json.dumps([asdict(model) for model in served], indent=2))
        return 0
    table = Table("model", "version", "state", "precision", "parity", "AP50", "age", "changed")
    for model in served:
        if not model.is_ready and model.reason == "unloaded":
            continue  # Triton remembers what it once had
        state = "[green]ready" if model.is_ready else f"[red]{model.reason or 'not ready'}"
        table.add_row(model.name, model.version, state, *_cells(model.summary))
    Console().print(table)
    return 0


def check(folder: Annotated[Path | None, tyro.conf.Positional] = None) -> int:
    """Check that this machine can serve, and that a folder of models can be served.

    Names every problem and what to do about it. Exits with 1 if there is one.

    Args:
        folder: Folder of exported models or a Triton model repository.
    """
    console = Console()
    problems = list(check_installation())
    if folder is not None:
        problems += _problems_of(folder)
    for problem in problems:
        console.print(f"[red]problem[/] {problem}", highlight=False)
    if not problems:
        what = "this machine can serve" if folder is None else f"{folder} can be served here"
        console.print(f"[green]ok[/] {what}")
    return int(bool(problems))


def _artifacts(folder: Path) -> list[ModelArtifact]:
    folders = sorted(path.parent for path in folder.glob(f"*/{MANIFEST_NAME}"))
    if not folders:
        raise ArtifactError(f"{folder} holds no exported models (*/{MANIFEST_NAME})")
    return [load_artifact(path) for path in folders]


def _list_artifacts(folder: Path, as_json: bool) -> int:
    artifacts = _artifacts(folder)
    if as_json:
        print(json.dumps([_described(artifact) for artifact in artifacts], indent=2))
        return 0
    table = Table("model", "engine", "MB", "precision", "parity", "age", "parameters", "commit")
    for artifact in artifacts:
        parameters = ", ".join(f"{k}={_short(v)}" for k, v in asdict(artifact.parameters).items())
        precision, parity, _, age, _ = _cells(_summary(artifact, ()))
        table.add_row(
            artifact.model, artifact.engine, f"{artifact.path.stat().st_size / 1e6:.1f}", precision,
            parity, age, parameters, artifact.passport.commit[:12],
        )  # fmt: skip
    Console().print(table)
    return 0


def _list_repository(folder: Path, as_json: bool) -> int:
    """Every version of every engine on disk, kept ones too, each compared with the one before."""
    table = Table("model", "version", "state", "precision", "parity", "AP50", "age", "changed")
    described = []
    engines = sorted({path.parent.parent.name for path in folder.glob(f"*/*/{MANIFEST_NAME}")})
    for model in engines:
        before: ModelArtifact | None = None
        live = live_versions(folder, model)
        for version in version_folders(folder, model):
            artifact = load_artifact(folder / model / str(version))
            changes = () if before is None else passport_changes(artifact, before)
            before = artifact
            described.append(
                {
                    "version": version,
                    "is_live": version in live,
                    "changes": changes,
                    **_described(artifact),
                }
            )
            state = "[green]live" if version in live else "kept"
            table.add_row(model, str(version), state, *_cells(_summary(artifact, changes)))
    if as_json:
        print(json.dumps(described, indent=2))
    else:
        Console().print(table)
    return 0


def _described(artifact: ModelArtifact) -> dict[str, Any]:
    return {
        "model": artifact.model,
        "engine": artifact.engine,
        "sha256": artifact.sha256,
        "parameters": asdict(artifact.parameters),
        "provenance": artifact.provenance,
    }


def _summary(artifact: ModelArtifact, changes: tuple[str, ...]) -> EngineSummary:
    passport = artifact.passport
    return EngineSummary(
        engine=artifact.engine,
        precision=passport.precision,
        parity=passport.worst_parity,
        ap50=passport.task_metrics.get("ap50"),
        created_at=passport.created_at,
        changes=changes,
    )


def _cells(summary: EngineSummary | None) -> tuple[str, str, str, str, str]:
    """Precision, parity, AP50, age and changes as a table shows them; empty where not known."""
    if summary is None:
        return "", "", "", "", ""
    return (
        summary.precision,
        "" if summary.parity is None else f"{summary.parity:.1g}",
        "" if summary.ap50 is None else f"{100 * summary.ap50:.1f}",
        _age(summary.created_at),
        ", ".join(summary.changes),
    )


def _age(created_at: str) -> str:
    """How long ago, in the largest unit that fits twice."""
    if not created_at:
        return ""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(created_at)).total_seconds()
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _short(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def _problems_of(folder: Path) -> list[str]:
    if any(folder.glob(f"*/{CONFIG_NAME}")):
        return list(check_model_repository(folder))
    try:
        _artifacts(folder)
    except WeakSamError as error:
        return [str(error)]
    return []
