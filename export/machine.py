"""The machine that an engine is made on, for its passport."""

import shutil
import subprocess

import torch

from training.engine.stage import package_versions


def machine_versions() -> dict[str, str]:
    """Packages that decide results and, where a GPU is at hand, CUDA, driver and its capability."""
    versions = package_versions()
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        versions |= {"cuda": str(torch.version.cuda), "compute_capability": f"{major}.{minor}"}
        if driver := _driver_version():
            versions["driver"] = driver
    return versions


def _driver_version() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.split("\n")[0].strip() or None if run.returncode == 0 else None
