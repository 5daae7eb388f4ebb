"""A model artifact: an engine file and its passport (``manifest.json``), checked before anything
opens the engine.

The passport says what the engine was made from, how well it agrees with its source, and where it
runs. Sizes are compared first, then hashes, so that a truncated file is called truncated.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from weaksam_rt.contracts import (
    ModelContract,
    Parameters,
    engine_contract,
    parameters_from_json,
    parameters_to_json,
)
from weaksam_rt.errors import ArtifactError, ContractError
from weaksam_rt.files import sha256_of_file, write_json

MANIFEST_NAME = "manifest.json"
_FORMAT = 2
_FORMAT_WITHOUT_PASSPORT = 1
_LARGEST_MANIFEST = 4 * 2**20
ONNX_RUNTIME_CUDA = "onnxruntime-cuda"
"""Exporter of ONNX files that were built and tried for ONNX Runtime's CUDA provider."""
METRIC_NAMES = {
    "ap50": "AP50",
    "tag_ap": "tag AP",
    "mask_iou_point": "mask IoU (point)",
    "mask_iou_box": "mask IoU (box)",
}
"""Task metrics by their keys in passports; all are shares of 1, and higher is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Passport:
    """Where an engine comes from and what is known about it. Empty: not recorded."""

    source: Mapping[str, Any] = field(default_factory=dict)
    """The checkpoint: ``file``, ``sha256`` and, where its training stage is known, ``stage``,
    ``config``, ``inputs`` (fingerprints of the data used), ``metrics``, ``commit``."""
    commit: str = ""
    """Of the exporting code; ``+changes`` behind it where files differed."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Packages, and ``cuda``, ``driver``, ``tensorrt`` where they took part."""
    precision: str = ""
    """Of the arithmetic, as in ``fp32``; weights stored otherwise stand behind a slash."""
    compute_capabilities: tuple[str, ...] = ()
    """GPUs that the engine was built for, as in ``8.9``; empty: not tied to any."""
    profiles: tuple[Mapping[str, Any], ...] = ()
    """Optimisation profiles of a built engine."""
    exporter: Mapping[str, Any] = field(default_factory=dict)
    """What made the file and how: name, options, ``seconds``."""
    tolerance: Mapping[str, Any] = field(default_factory=dict)
    """How far the engine was allowed to be from its source."""
    parity: Mapping[str, Any] = field(default_factory=dict)
    """By output: how far it was."""
    task_metrics: Mapping[str, Any] = field(default_factory=dict)
    """Some of ``METRIC_NAMES`` in [0, 1] and the fingerprint of the ``data`` they were measured
    on."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Names in the engine of weights that the exporter renamed, to their names in the
    checkpoint."""
    created_at: str = ""
    """UTC, ISO 8601."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the exporter wanted to say."""

    def __post_init__(self) -> None:
        for name, kind in _FIELD_KINDS.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"passport: {name} is {getattr(self, name)!r}, expected {kind.__name__}"
                )
        if self.created_at:
            _time_of(self.created_at)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Passport":
        """Read back ``to_json``'s values; unknown keys become ``notes``.

        Raises:
            ValueError: A field is of another type, or the time is not a time.
        """
        known = {f.name for f in fields(Passport)}
        values = {key: value for key, value in content.items() if key in known}
        for name in ("compute_capabilities", "profiles"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        others = {key: value for key, value in content.items() if key not in known}
        if others:
            values["notes"] = {**values.get("notes", {}), **others}
        return Passport(**values)

    @property
    def worst_parity(self) -> float | None:
        """The largest ``max_abs_error`` of any output of an exported model, the ``distance`` of a
        built engine; None: not recorded.
        """
        errors = [
            figures[name]
            for figures in self.parity.values()
            for name in ("max_abs_error", "distance")
            if isinstance(figures, Mapping) and name in figures
        ]
        return max(errors, default=None)

    @property
    def created(self) -> datetime | None:
        """``created_at`` as a time with its zone; None: not recorded."""
        return _time_of(self.created_at) if self.created_at else None


_FIELD_KINDS: dict[str, Any] = {
    **dict.fromkeys(("commit", "precision", "created_at"), str),
    **dict.fromkeys(("compute_capabilities", "profiles"), tuple),
    **dict.fromkeys(
        ("source", "versions", "exporter", "tolerance", "parity", "task_metrics", "weights",
         "notes"), Mapping,
    ),
}  # fmt: skip


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
    passport: Passport
    sha256: str
    """Of the engine file."""
    extra_files: tuple[Path, ...] = ()
    """Files beside it that belong to it, as an ONNX file's external data."""

    @property
    def contract(self) -> ModelContract:
        """The model's contract at these parameters."""
        return engine_contract(self.model, self.parameters)

    @property
    def needs_gpu(self) -> bool:
        """It was built for a GPU, and a CPU is no substitute."""
        by_onnx_runtime = self.passport.exporter.get("name") == ONNX_RUNTIME_CUDA
        return by_onnx_runtime or self.engine.startswith(("tensorrt", "aot-inductor-cuda"))

    @property
    def files(self) -> tuple[Path, ...]:
        """The engine file and what belongs to it."""
        return (self.path, *self.extra_files)

    @property
    def provenance(self) -> dict[str, Any]:
        """The passport as plain values."""
        return self.passport.to_json()


def utc_now() -> str:
    """This moment as passports write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_manifest(
    path: Path,
    *,
    model: str,
    engine: str,
    parameters: Parameters,
    provenance: Mapping[str, Any] | Passport,
    extra_files: Sequence[Path] = (),
) -> ModelArtifact:
    """Write ``manifest.json`` beside the engine file at ``path``; the file must be complete.

    Args:
        path: The engine file.
        model: The served model's name.
        engine: What runs it.
        parameters: Of the model's contract.
        provenance: A passport, or its fields; what is no field of it goes to its ``notes``.
            ``created_at`` is now unless given.
        extra_files: Files of the same folder that belong to the engine; an ONNX file's external
            weights are added.

    Raises:
        ValueError: A field of the passport is of another type, or an extra file lies elsewhere.
    """
    for extra in extra_files:
        if extra.parent != path.parent:
            raise ValueError(f"{extra} does not lie beside {path}")
    weights = external_data_path(path)
    if weights.is_file() and weights not in extra_files:
        extra_files = [*extra_files, weights]
    content = provenance.to_json() if isinstance(provenance, Passport) else dict(provenance)
    if not content.get("created_at"):
        content["created_at"] = utc_now()
    manifest = {
        "format": _FORMAT,
        "model": model,
        "engine": engine,
        **_file_record(path),
        "extra_files": [_file_record(extra) for extra in extra_files],
        "parameters": parameters_to_json(parameters),
        "passport": Passport.from_json(content).to_json(),
    }
    write_json(path.parent / MANIFEST_NAME, manifest)
    return load_artifact(path.parent)


def load_artifact(directory: Path) -> ModelArtifact:
    """Read a manifest and verify its files by size and hash, before anything deserialises them.

    Manifests of the first format, which had no passport, are read too.

    Raises:
        ArtifactError: Manifest or file is missing, damaged, foreign, or they do not belong
            together; one line that says which.
    """
    manifest = directory / MANIFEST_NAME
    content = _manifest_content(manifest)
    try:
        engine_file, *extra_files = [
            (directory / Path(record["file"]).name, record)
            for record in (content, *content.get("extra_files", ()))
        ]
        artifact = ModelArtifact(
            model=content["model"],
            engine=content["engine"],
            path=engine_file[0],
            parameters=parameters_from_json(content["model"], content["parameters"]),
            passport=_passport_of(content),
            sha256=content["sha256"],
            extra_files=tuple(path for path, _ in extra_files),
        )
        records = [
            (path, str(record["sha256"]), int(record.get("size_bytes", 0)))
            for path, record in (engine_file, *extra_files)
        ]
    except (ValueError, KeyError, TypeError, AttributeError, ContractError) as error:
        raise ArtifactError(
            f"{manifest} is not a manifest of ours ({_one_line(error)}); export the model again"
        ) from error
    for path, sha256, size_bytes in records:
        _check_file(path, sha256, size_bytes)
    return artifact


def upgrade_manifest(directory: Path, *, created_at: str = "") -> bool:
    """Give a manifest of the first format its passport, in place; the engine is not touched.

    Args:
        directory: An artifact's folder.
        created_at: When the engine was made, UTC and ISO 8601; empty: not known.

    Returns:
        Whether anything had to be done.

    Raises:
        ArtifactError: The artifact cannot be trusted.
        ValueError: ``created_at`` is not a time.
    """
    artifact = load_artifact(directory)
    content = _manifest_content(directory / MANIFEST_NAME)
    if content["format"] == _FORMAT:
        return False
    passport = Passport.from_json({**artifact.passport.to_json(), "created_at": created_at})
    del content["provenance"]
    upgraded = {
        **content,
        "format": _FORMAT,
        **_file_record(artifact.path),
        "extra_files": [],
        "passport": passport.to_json(),
    }
    write_json(directory / MANIFEST_NAME, upgraded)
    return load_artifact(directory).sha256 == artifact.sha256


def refusal_here(
    artifact: ModelArtifact, *, versions: Mapping[str, str], compute_capability: str | None
) -> str | None:
    """Why the engine cannot run on a machine, or None: what its own runtime would say much later.

    Args:
        artifact: Checked already.
        versions: Of the machine's runtimes, by the names that passports use.
        compute_capability: Of the machine's GPU, as in ``8.9``; None: there is none.
    """
    passport = artifact.passport
    name = artifact.path.name
    built_with, found = passport.versions.get(artifact.engine), versions.get(artifact.engine)
    if artifact.engine.startswith("tensorrt") and built_with is not None:
        if found is None:
            return f"{name} needs {artifact.engine} {built_with}, which is not installed here"
        if found.split(".")[:3] != built_with.split(".")[:3]:
            return (
                f"{name} was built with {artifact.engine} {built_with}, this machine has {found}; "
                "build the engine again"
            )
    allowed = passport.compute_capabilities
    if allowed and compute_capability not in allowed:
        has = "no GPU" if compute_capability is None else f"compute capability {compute_capability}"
        return (
            f"{name} was built for compute capability {', '.join(allowed)}, this machine has {has};"
            " build the engine for it"
        )
    return None


def passport_changes(new: ModelArtifact, old: ModelArtifact) -> tuple[str, ...]:
    """What differs between two versions of a model, a few words each; empty: nothing."""
    changes = []
    names = [getattr(a.parameters, "class_names", ()) for a in (new, old)]
    changes += [f"class {name} added" for name in names[0] if name not in names[1]]
    changes += [f"class {name} dropped" for name in names[1] if name not in names[0]]
    if set(names[0]) == set(names[1]) and names[0] != names[1]:
        changes.append("order of classes")
    if new.sha256 == old.sha256:
        return tuple(changes)
    new_weights, old_weights = (a.passport.source.get("sha256") for a in (new, old))
    changes.append("engine" if new_weights == old_weights else "weights")
    for what in ("precision", "commit"):
        before, after = getattr(old.passport, what), getattr(new.passport, what)
        if before != after:
            changes.append(f"{what} {before[:12] or 'unknown'} -> {after[:12] or 'unknown'}")
    for metric, words in METRIC_NAMES.items():
        before, after = (a.passport.task_metrics.get(metric) for a in (old, new))
        if before is not None and after is not None:
            changes.append(f"{words} {100 * before:.1f} -> {100 * after:.1f}")
    return tuple(changes)


def _manifest_content(manifest: Path) -> dict[str, Any]:
    try:
        size = manifest.stat().st_size
        if size > _LARGEST_MANIFEST:
            raise ArtifactError(f"{manifest} has {size:,} bytes: that is no manifest")
        content = json.loads(manifest.read_text())
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{manifest.parent} holds no {MANIFEST_NAME}; export the model again"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{manifest} is not a manifest of ours ({_one_line(error)}); export the model again"
        ) from error
    if not isinstance(content, dict) or "format" not in content:
        raise ArtifactError(
            f"{manifest} is not a manifest of ours (no format); export the model again"
        )
    if content["format"] not in (_FORMAT, _FORMAT_WITHOUT_PASSPORT):
        raise ArtifactError(
            f"{manifest} has format {content['format']!r}, this version reads "
            f"{_FORMAT_WITHOUT_PASSPORT} and {_FORMAT}; export the model again"
        )
    return content


def _passport_of(content: Mapping[str, Any]) -> Passport:
    if content["format"] == _FORMAT:
        return Passport.from_json(content["passport"])
    provenance = dict(content["provenance"])
    if provenance.get("exporter"):  # the first format had one exporter: float32 arithmetic
        half = provenance["exporter"].get("half_weights", False)
        provenance.setdefault("precision", "fp32/fp16 weights" if half else "fp32")
    return Passport.from_json(provenance)


def _file_record(path: Path) -> dict[str, Any]:
    return {
        "file": path.name,
        "size_bytes": path.stat().st_size,
        "sha256": sha256_of_file(path),
    }


def _check_file(path: Path, sha256: str, size_bytes: int) -> None:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; export the model again")
    size = path.stat().st_size
    if size < size_bytes:
        raise ArtifactError(
            f"{path} is truncated: {size:,} bytes, its manifest says {size_bytes:,}; "
            "copy or export the model again"
        )
    found = sha256_of_file(path)
    if found != sha256:
        raise ArtifactError(
            f"{path} is damaged or foreign: SHA-256 is {found[:12]}..., its manifest says "
            f"{sha256[:12]}...; export the model again"
        )


def _time_of(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone; write +00:00 behind it")
    return time


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
