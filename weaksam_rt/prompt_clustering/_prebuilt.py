"""Kernels compiled beforehand, which the wheel carries: no compiler is needed where they run.

``python -m weaksam_rt.prompt_clustering.build`` writes them. They are used only as long as they
come from the source that lies beside them.
"""

import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from weaksam_rt.errors import ArtifactError
from weaksam_rt.files import atomic_path, write_json
from weaksam_rt.prompt_clustering._nvrtc import (
    ARCHITECTURES,
    CompiledKernels,
    compile_kernels,
    nvrtc_version,
    source_hash,
)

FOLDER = Path(__file__).parent / "prebuilt"
PTX_ARCHITECTURE = "compute_80"
"""Of the PTX, from which a driver makes code for any newer GPU."""
_MANIFEST = "manifest.json"
_LOGGER = logging.getLogger(__name__)


def build_prebuilt(folder: Path = FOLDER) -> dict[str, Any]:
    """Compile for every architecture and write the files; the manifest comes last.

    Args:
        folder: Made if needed.

    Returns:
        The manifest: hash of the source, NVRTC's version and, for each architecture, size and hash
        of the code and what each kernel needs.

    Raises:
        BackendUnavailableError: NVRTC is not installed.
        ArtifactError: NVRTC refused the source, or a kernel spills registers.
    """
    entries: dict[str, Any] = {}
    for architecture in (*ARCHITECTURES, PTX_ARCHITECTURE):
        compiled = compile_kernels(architecture)
        _refuse_spills(architecture, compiled)
        with atomic_path(folder / _file_name(architecture)) as temporary:
            temporary.write_bytes(zlib.compress(compiled.code, 9))
        entries[architecture] = {
            "bytes": len(compiled.code),
            "sha256": sha256(compiled.code).hexdigest(),
            "kernels": {name: asdict(r) for name, r in sorted(compiled.resources.items())},
        }
    manifest = {"source": source_hash(), "nvrtc": nvrtc_version(), "architectures": entries}
    write_json(folder / _MANIFEST, manifest)
    return manifest


def _refuse_spills(architecture: str, compiled: CompiledKernels) -> None:
    spilled = {n: r.spilled_bytes for n, r in compiled.resources.items() if r.spilled_bytes}
    if spilled:
        raise ArtifactError(f"{architecture}: kernels spill registers (bytes a thread): {spilled}")


def _file_name(architecture: str) -> str:
    return f"{architecture}.{'ptx' if architecture == PTX_ARCHITECTURE else 'cubin'}.z"


def read_manifest(folder: Path = FOLDER) -> dict[str, Any] | None:
    """The manifest; None where nothing was built, or from another source than is here."""
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
    except FileNotFoundError:
        return None
    if manifest["source"] != source_hash():
        _LOGGER.info("prebuilt kernels are of another source; they are not used")
        return None
    return manifest


def prebuilt_kernels(architecture: str, folder: Path = FOLDER) -> Iterator[tuple[str, bytes]]:
    """Name and content of what may run on a GPU, the best first; nothing where nothing does.

    Code for a GPU runs on those of the same generation that are newer; PTX on all newer ones.

    Args:
        architecture: Of the GPU, such as ``sm_90``.
        folder: Where they lie.

    Raises:
        ArtifactError: A file is damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return
    entries: Mapping[str, Any] = manifest["architectures"]
    generation, step = _version(architecture)
    fitting = [
        name
        for name in entries
        if name.startswith("sm_") and _version(name)[0] == generation and _version(name)[1] <= step
    ]
    for name in sorted(fitting, key=_version, reverse=True)[:1]:
        yield name, _read(folder, name, entries[name])
    if PTX_ARCHITECTURE in entries and _version(PTX_ARCHITECTURE) <= (generation, step):
        # The driver expects text that ends with a zero byte.
        yield PTX_ARCHITECTURE, _read(folder, PTX_ARCHITECTURE, entries[PTX_ARCHITECTURE]) + b"\0"


def _version(architecture: str) -> tuple[int, int]:
    """Major and minor compute capability: ``sm_120`` is 12.0."""
    found = re.fullmatch(r"(?:sm|compute)_(\d+)(\d)[af]?", architecture)
    if found is None:
        raise ValueError(f"architecture must be such as sm_90, got {architecture!r}")
    return int(found.group(1)), int(found.group(2))


def _read(folder: Path, architecture: str, entry: Mapping[str, Any]) -> bytes:
    path = folder / _file_name(architecture)
    try:
        code = zlib.decompress(path.read_bytes())
    except (OSError, zlib.error) as error:
        raise ArtifactError(
            f"{path} cannot be read ({error}); install the package again"
        ) from error
    if sha256(code).hexdigest() != entry["sha256"]:
        raise ArtifactError(f"{path} differs from its manifest; install the package again")
    return code
