"""Fetch NVIDIA's load generator ``perf_analyzer`` and its libraries into one folder, without root.

``python -m benchmarks get_perf_analyzer`` takes the binary from the wheel tritonclient 2.51.0 (the
last that carries it), ``libcudart`` from its own wheel and ``libb64`` from the Debian or Ubuntu
archive, and writes a launcher beside them that sets their search path.
"""

import os
import subprocess
import tempfile
import zipfile
from pathlib import Path

from rich.console import Console

from benchmarks.entry import enter

FOLDER = Path("out/perf_analyzer")
_WHEELS = ("tritonclient==2.51.0", "nvidia-cuda-runtime-cu12")
_DEBIAN_PACKAGE = "libb64-0d"
_WANTED = ("perf_analyzer", "libcudart.so.12", "libb64.so.0d")
_LAUNCHER = """#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "$here/lib/perf_analyzer" "$@"
"""


def main(folder: Path = FOLDER, pip: str = "python3 -m pip") -> None:
    """Fetch everything and write ``FOLDER/perf_analyzer``.

    Args:
        folder: Made if needed.
        pip: Command of a pip that can download wheels.
    """
    libraries = folder / "lib"
    libraries.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="weaksam-bench-") as name:
        scratch = Path(name)
        _download_wheels(scratch, pip.split())
        _download_debian_package(scratch)
        found = {path.name: path for path in scratch.rglob("*") if path.name in _WANTED}
        for wanted in _WANTED:
            if wanted not in found:
                raise FileNotFoundError(f"{wanted} is in none of the packages that were fetched")
            (libraries / wanted).write_bytes(found[wanted].read_bytes())
            (libraries / wanted).chmod(0o755)
    launcher = folder / "perf_analyzer"
    launcher.write_text(_LAUNCHER)
    launcher.chmod(0o755)
    run = subprocess.run([launcher.resolve(), "--version"], capture_output=True, text=True)
    Console().print(f"{launcher}: {run.stdout.strip() or run.stderr.strip()}", markup=False)


def _download_wheels(scratch: Path, pip: list[str]) -> None:
    for wheel in _WHEELS:
        subprocess.run(
            [
                *pip, "download", "--quiet", "--no-deps", "--only-binary=:all:",
                "--platform", "manylinux1_x86_64", "--platform", "manylinux2014_x86_64",
                "--dest", str(scratch), wheel,
            ],
            check=True,
        )  # fmt: skip
    for path in scratch.glob("*.whl"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(scratch / path.stem)


def _download_debian_package(scratch: Path) -> None:
    subprocess.run(["apt-get", "download", "--quiet", _DEBIAN_PACKAGE], cwd=scratch, check=True)
    (package,) = scratch.glob(f"{_DEBIAN_PACKAGE}_*.deb")
    subprocess.run(["dpkg", "-x", str(package), str(scratch / "debian")], check=True)
    for path in (scratch / "debian").rglob("libb64.so.0d"):
        if path.is_symlink():  # to the file with the full version
            target = Path(os.path.realpath(path))
            path.unlink()
            path.write_bytes(target.read_bytes())


if __name__ == "__main__":
    enter(main)
