"""A model artifact: an engine file and the manifest beside it, checked before anything is
opened.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weaksam_rt.contracts import ModelContract, Parameters, engine_contract, parameters_from_json
from weaksam_rt.errors import ArtifactError, ContractError
from weaksam_rt.files import sha256_of_file, write_json

MANIFEST_NAME = "manifest.json"
_FORMAT = 1


def external_data_path(path: Path) -> Path:
    """Where the weights of an ONNX file at ``path`` lie when they are too large for it."""
    return path.with_name(f"{path.name}.data")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelArtifact:
    """A verified engine on disk."""

    model: str
    """The served model's name."""
    engine: str
    """What runs it: ``onnxruntime``, ``tensorrt``, ``tensorrt-rtx``, ``aot-inductor`` or
    ``aot-inductor-cuda``; a plan of one TensorRT is none of the other."""
    path: Path
    """The engine file."""
    parameters: Parameters
    provenance: dict[str, Any]
    """Source checkpoint, config, commit, versions, parity: what the exporter recorded."""

    @property
    def contract(self) -> ModelContract:
        """The model's contract at these parameters."""
        return engine_contract(self.model, self.parameters)

    @property
    def files(self) -> tuple[Path, ...]:
        """The engine file and, where its weights are too large for it, the file that holds them."""
        weights = external_data_path(self.path)
        return (self.path, weights) if weights.is_file() else (self.path,)


def write_manifest(
    path: Path, *, model: str, engine: str, parameters: Parameters, provenance: dict[str, Any]
) -> ModelArtifact:
    """Write ``manifest.json`` beside the engine file at ``path``; the file must be complete."""
    manifest = {
        "format": _FORMAT,
        "model": model,
        "engine": engine,
        "file": path.name,
        "sha256": sha256_of_file(path),
        "external_data_sha256": _hash_if_there(external_data_path(path)),
        "parameters": asdict(parameters),
        "provenance": provenance,
    }
    write_json(path.parent / MANIFEST_NAME, manifest)
    return load_artifact(path.parent)


def load_artifact(directory: Path) -> ModelArtifact:
    """Read a manifest and verify its engine file by hash, before anything deserialises it.

    Raises:
        ArtifactError: Manifest or file is missing, damaged, foreign, or they do not belong
            together.
    """
    manifest = directory / MANIFEST_NAME
    try:
        content = json.loads(manifest.read_text())
        if content["format"] != _FORMAT:
            raise ArtifactError(
                f"{manifest} has format {content['format']}, this version reads {_FORMAT}; "
                "export the model again"
            )
        path = directory / Path(content["file"]).name
        artifact = ModelArtifact(
            model=content["model"],
            engine=content["engine"],
            path=path,
            parameters=parameters_from_json(content["model"], content["parameters"]),
            provenance=content["provenance"],
        )
        sha256 = content["sha256"]
        data_sha256 = content.get("external_data_sha256")
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{directory} holds no {MANIFEST_NAME}; export the model again"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, ContractError) as error:
        raise ArtifactError(
            f"{manifest} is not a manifest of ours ({error}); export the model again"
        ) from error
    _check_hash(path, sha256)
    if data_sha256 is not None:
        _check_hash(external_data_path(path), data_sha256)
    return artifact


def _hash_if_there(path: Path) -> str | None:
    return sha256_of_file(path) if path.is_file() else None


def _check_hash(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; export the model again")
    found = sha256_of_file(path)
    if found != sha256:
        raise ArtifactError(
            f"{path} is damaged or foreign: SHA-256 is {found[:12]}..., its manifest says "
            f"{sha256[:12]}...; export the model again"
        )
