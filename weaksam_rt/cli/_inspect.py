"""``weaksam models`` and ``weaksam check``: what is served, and whether it can be."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from weaksam_rt.artifacts import MANIFEST_NAME, ModelArtifact, load_artifact
from weaksam_rt.cli._connection import Connection
from weaksam_rt.errors import ArtifactError, WeakSamError
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
    """List the models of a running server, or the exported models in a folder.

    Args:
        folder: Folder of exported models; without it the server is asked.
        as_json: Print JSON instead of a table.
        connection: Where the server is.
    """
    if folder is not None:
        return _list_artifacts(folder, as_json)
    with connection.client() as client:
        served = client.models()
    if as_json:
        print(json.dumps([asdict(model) for model in served], indent=2))
        return 0
    table = Table("model", "version", "state")
    for model in served:
        state = "[green]ready" if model.is_ready else f"[red]{model.reason or 'not ready'}"
        table.add_row(model.name, model.version, state)
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
        described = [
            {
                "model": a.model,
                "engine": a.engine,
                "parameters": asdict(a.parameters),
                "provenance": a.provenance,
            }
            for a in artifacts
        ]
        print(json.dumps(described, indent=2))
        return 0
    table = Table("model", "engine", "MB", "parameters", "commit")
    for artifact in artifacts:
        parameters = ", ".join(f"{k}={_short(v)}" for k, v in asdict(artifact.parameters).items())
        megabytes = f"{artifact.path.stat().st_size / 1e6:.1f}"
        commit = str(artifact.provenance.get("commit", ""))[:12]
        table.add_row(artifact.model, artifact.engine, megabytes, parameters, commit)
    Console().print(table)
    return 0


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
