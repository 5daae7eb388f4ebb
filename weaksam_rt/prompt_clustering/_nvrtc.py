"""The kernels' source compiled by NVRTC, once for each source and architecture. No GPU is needed.

NVRTC is found as a wheel (``pip install 'weaksam-rt[cuda]'``) or in the system's library path.
"""

import ctypes
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from weaksam_rt.errors import ArtifactError, BackendUnavailableError
from weaksam_rt.files import atomic_path

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""What the kernels are compiled for in the tests; others of NVRTC's work too."""
SOURCE_FOLDER = Path(__file__).parent / "csrc"
_MAIN = "kernels.cu"
# Each operation is rounded alone, as NumPy does.
_OPTIONS = ("--std=c++17", "--fmad=false", "--ptxas-options=-v")
_RESOURCE_PATTERNS = {
    "registers": r"Used (\d+) registers",
    "static_shared_bytes": r"(\d+) bytes smem",
    "stack_bytes": r"(\d+) bytes stack frame",
    "spilled_bytes": r"(\d+) bytes spill stores",
}
_LIBRARY_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelResources:
    """What a thread, or a block, of one kernel needs."""

    registers: int
    """Of a thread."""
    static_shared_bytes: int
    """Of a block; dynamic shared memory comes on top."""
    stack_bytes: int
    """Of a thread, in slow local memory."""
    spilled_bytes: int
    """Of a thread: registers that did not fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledKernels:
    """Code and what the assembler said of it."""

    code: bytes
    """A cubin, or PTX."""
    resources: Mapping[str, KernelResources]
    """By the kernel's name; empty for PTX, which is not assembled yet."""


def kernel_cubin(architecture: str, cache_folder: Path | None = None) -> bytes:
    """The kernels as a cubin of one architecture, from the cache or compiled now.

    Args:
        architecture: Such as ``sm_90``.
        cache_folder: By default ``weaksam_rt`` in the user's cache folder (``XDG_CACHE_HOME``).

    Raises:
        BackendUnavailableError: NVRTC is not installed.
        ArtifactError: NVRTC refused the source; the message is its log.
    """
    folder = cache_folder or _user_cache_folder()
    entry = folder / f"prompt_kernels_{_cache_key()}_{architecture}.cubin"
    if entry.is_file():
        return entry.read_bytes()
    cubin = compile_kernels(architecture).code
    # Another process may be writing the same entry: whoever renames last wins, with equal bytes.
    with atomic_path(entry) as temporary:
        temporary.write_bytes(cubin)
    return cubin


def _user_cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "weaksam_rt"


def _headers() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(SOURCE_FOLDER.glob("*.cuh"))}


def source_hash() -> str:
    """Hex SHA-256 of the kernels' source and the options it is compiled with."""
    digest = hashlib.sha256(repr(_OPTIONS).encode())
    for name, content in {_MAIN: (SOURCE_FOLDER / _MAIN).read_bytes(), **_headers()}.items():
        digest.update(f"{name} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


def nvrtc_version() -> str:
    """Such as ``13.0``; it also decides what the code is.

    Raises:
        BackendUnavailableError: NVRTC is not installed.
    """
    library = _nvrtc()
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def _cache_key() -> str:
    return hashlib.sha256(f"{nvrtc_version()} {source_hash()}".encode()).hexdigest()[:16]


def compile_kernels(architecture: str) -> CompiledKernels:
    """Compile now; no cache.

    Args:
        architecture: Such as ``sm_90``, or ``compute_90`` for PTX.

    Raises:
        BackendUnavailableError: NVRTC is not installed.
        ArtifactError: NVRTC refused the source; the message is its log.
    """
    library = _nvrtc()
    program = ctypes.c_void_p()
    headers = _headers()
    strings = ctypes.c_char_p * len(headers)
    _check(
        library,
        library.nvrtcCreateProgram(
            ctypes.byref(program),
            (SOURCE_FOLDER / _MAIN).read_bytes(),
            _MAIN.encode(),
            len(headers),
            strings(*headers.values()),
            strings(*(name.encode() for name in headers)),
        ),
    )
    try:
        options = [o.encode() for o in (*_OPTIONS, f"--gpu-architecture={architecture}")]
        status = library.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*options)
        )
        log = _text(library, "ProgramLog", program).decode(errors="replace").rstrip("\0")
        if status != 0:
            raise ArtifactError(f"NVRTC cannot compile the kernels for {architecture}: {log}")
        if architecture.startswith("compute_"):
            return CompiledKernels(code=_text(library, "PTX", program).rstrip(b"\0"), resources={})
        return CompiledKernels(
            code=_text(library, "CUBIN", program), resources=_resources_from_log(log)
        )
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _resources_from_log(log: str) -> dict[str, KernelResources]:
    """What ptxas reports of each kernel."""
    resources = {}
    for part in log.split("Compiling entry function '")[1:]:
        numbers = {
            name: int(found.group(1)) if (found := re.search(pattern, part)) else 0
            for name, pattern in _RESOURCE_PATTERNS.items()
        }
        resources[part.split("'")[0]] = KernelResources(**numbers)
    return resources


def _text(library: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    content = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, content))
    return content.raw


def _check(library: ctypes.CDLL, status: int) -> None:
    if status != 0:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise ArtifactError(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")


@lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL:
    tried = []
    for candidate in _candidates():
        try:
            return ctypes.CDLL(candidate)
        except OSError as error:
            tried.append(str(error))
    raise BackendUnavailableError(
        "NVRTC is not installed: pip install 'weaksam-rt[cuda]'. Tried: " + "; ".join(tried)
    )


def _candidates() -> Iterator[str]:
    # The wheels share the namespace package ``nvidia``; its folders differ between CUDA versions.
    package = importlib.util.find_spec("nvidia")
    for location in (package and package.submodule_search_locations) or ():
        for pattern in ("cu*/lib/libnvrtc.so.*", "cuda_nvrtc/lib/libnvrtc.so.*"):
            yield from sorted(str(p) for p in Path(location).glob(pattern))
    yield from _LIBRARY_NAMES
