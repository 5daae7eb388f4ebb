"""Compiles the prompt kernels for every architecture into ``prebuilt/``.

Run ``python -m weaksam_rt.prompt_clustering.build`` after a change of ``csrc/``. It needs NVRTC
(``pip install 'weaksam-rt[cuda]'``) and no GPU, and prints what each kernel needs.
"""

from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from weaksam_rt.prompt_clustering._prebuilt import FOLDER, build_prebuilt


def resource_rows(manifest: dict[str, Any]) -> list[tuple[str, ...]]:
    """By kernel and GPU: registers of a thread, static shared bytes of a block, spilled bytes of a
    thread; the first row is the header.

    Args:
        manifest: Of ``build_prebuilt``.
    """
    of_gpus = {n: e for n, e in manifest["architectures"].items() if n.startswith("sm_")}
    rows = [("kernel", *of_gpus)]
    for kernel in next(iter(of_gpus.values()))["kernels"]:
        needs = [entry["kernels"][kernel] for entry in of_gpus.values()]
        cells = (
            f"{n['registers']}, {n['static_shared_bytes']}, {n['spilled_bytes']}" for n in needs
        )
        rows.append((kernel, *cells))
    sizes = (f"{entry['bytes'] / 1024:.0f} KiB" for entry in of_gpus.values())
    return [*rows, ("cubin", *sizes)]


def main(folder: Path = FOLDER) -> None:
    """Build, and print a table.

    Args:
        folder: Where the files go.
    """
    manifest = build_prebuilt(folder)
    header, *rows = resource_rows(manifest)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
