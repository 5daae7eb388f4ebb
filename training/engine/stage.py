"""A stage: a folder of outputs with a manifest that says exactly what they were made from.

A finished stage is skipped when its name, config and inputs are unchanged. A folder that holds
another run is never overwritten silently: the error names what differs. An option that came later
and is switched off (None, False, empty) changes nothing.
"""

import dataclasses
import hashlib
import json
import logging
import math
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from weaksam_rt.files import sha256_of_file, write_json

_LOGGER = logging.getLogger(__name__)
_PACKAGES = ("weaksam-rt", "torch", "torchvision", "numpy", "onnx", "onnxruntime")

MANIFEST_NAME = "manifest.json"
_STARTED_NAME = "started.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """An open stage; write outputs into ``directory`` and call ``finish`` once."""

    directory: Path
    identity: Mapping[str, Any]
    """Name, resolved config and input fingerprints: equal identity means equal outputs."""
    finished: bool
    """The outputs are already there, made from the same identity; nothing needs to be done."""
    started_at: float

    def log_metrics(self, *, step: int, **scalars: float) -> None:
        """Append one line to ``metrics.jsonl``."""
        with (self.directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(undefined_as_none({"step": step, **scalars})) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, by ascending step; of a step that was repeated after a
        kill the last one. Empty where nothing was logged.
        """
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        of_step = {}
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # a kill can cut a line; its step was repeated
                continue
            of_step[entry["step"]] = entry
        return [of_step[step] for step in sorted(of_step)]

    def finish(self, *, outputs: Sequence[str], metrics: Mapping[str, Any] | None = None) -> None:
        """Write the manifest: the stage is finished when this file exists.

        Args:
            outputs: File names in ``directory`` that later stages read; they are hashed.
            metrics: What was measured, JSON values; nan is written as null.
        """
        manifest = {
            **self.identity,
            "outputs": {name: sha256_of_file(self.directory / name) for name in outputs},
            "metrics": undefined_as_none(dict(metrics or {})),
            "commit": git_commit(),
            "versions": package_versions(),
            "duration_s": round(time.time() - self.started_at, 1),
        }
        write_json(self.directory / MANIFEST_NAME, manifest)


def open_stage(name: str, directory: Path, *, config: Any, inputs: Mapping[str, Path]) -> Stage:
    """Open the stage ``name`` in ``directory``, new, resumed or already finished.

    Args:
        name: The stage, for example ``train_classifier``.
        directory: Made if needed.
        config: A dataclass (or JSON value) with everything that decides the result, the seed
            included.
        inputs: What the stage reads: data folders, files, or directories of finished stages.

    Raises:
        ValueError: The folder holds outputs of another config or other inputs.
        FileNotFoundError: An input is missing.
    """
    identity = {
        "stage": name,
        "config": _plain(config),
        "inputs": {key: fingerprint(path) for key, path in inputs.items()},
    }
    started = directory / _STARTED_NAME
    if started.exists():
        _check_same_identity(directory, json.loads(started.read_text()), identity)
    else:
        write_json(started, identity)
    finished = _is_finished(directory)
    _LOGGER.info(
        "stage %s: %s in %s", name, "already finished" if finished else "running", directory
    )
    return Stage(directory=directory, identity=identity, finished=finished, started_at=time.time())


def fingerprint(path: Path) -> str:
    """What identifies an input: a finished stage by its outputs, a data folder by its
    annotations, a file by its bytes.

    Raises:
        FileNotFoundError: There is no such input, or it is a folder with neither manifest nor
            annotations.
    """
    if path.is_file():
        return sha256_of_file(path)
    manifest = path / MANIFEST_NAME
    if manifest.is_file():
        outputs = json.loads(manifest.read_text())["outputs"]
        return hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()
    if (path / "instances.json").is_file():
        return sha256_of_file(path / "instances.json")
    raise FileNotFoundError(
        f"{path} is no file, no finished stage (no {MANIFEST_NAME}) "
        "and no data folder (no instances.json)"
    )


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished stage; raises ``FileNotFoundError`` where the stage is not
    finished.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no finished stage; run it first")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def undefined_as_none(value: Any) -> Any:
    """A JSON value with None for every nan, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: undefined_as_none(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [undefined_as_none(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def git_commit() -> str:
    """The commit of the working tree, with ``+changes`` where files differ from it; ``unknown``
    outside git.
    """
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def _is_finished(directory: Path) -> bool:
    if not (directory / MANIFEST_NAME).is_file():
        return False
    outputs = read_manifest(directory)["outputs"]
    return all((directory / name).is_file() for name in outputs)


def _check_same_identity(directory: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    there, now = _flat(found), _flat(wanted)
    differences = [
        f"{key}: {there.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted(there.keys() | now.keys())
        if _active(there.get(key)) != _active(now.get(key))
    ]
    if differences:
        raise ValueError(
            f"{directory} holds another run ({'; '.join(differences)}); "
            "choose another folder or delete this one"
        )


def _active(value: Any) -> Any:
    """``value``, or None for an option that is switched off; 0 is a value."""
    return None if value is False or value == [] else value


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            path: leaf
            for key, inner in value.items()
            for path, leaf in _flat(inner, f"{prefix}.{key}".lstrip(".")).items()
        }
    return {prefix: value}


def _plain(value: Any) -> Any:
    """JSON value of a config: dataclasses, tuples and paths resolved."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value, default=str))


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide results, those installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
