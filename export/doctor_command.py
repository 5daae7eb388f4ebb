"""What the doctor says, as a table and as a report that the ``engines`` command reads."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from export.mixed_precision import KeepFp32
from export.precision_doctor import Diagnosis
from weaksam_rt.errors import ArtifactError
from weaksam_rt.files import write_json


def write_report(path: Path, diagnosis: Diagnosis, facts: Mapping[str, Any]) -> None:
    """One diagnosis as JSON; numbers that are not finite become null."""
    write_json(path, finite_json({**diagnosis.to_json(), **facts}))


def kept_by_report(path: Path, precision: str) -> KeepFp32:
    """What a report proposes to keep in float32.

    Raises:
        ArtifactError: There is no report, or it is about another precision.
    """
    try:
        report = json.loads(path.read_text())
        found, nodes = report["precision"], frozenset(report["keep"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is no report of the precision doctor ({error}); run python -m export doctor"
        ) from error
    if found != precision:
        raise ArtifactError(f"{path} is about {found}, the engine is to be {precision}")
    return KeepFp32(nodes=nodes)


def print_diagnosis(diagnosis: Diagnosis, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """A person's view of it.

    Args:
        diagnosis: What was found.
        metrics: Task metrics by precision; may be empty.
    """
    console = Console()
    console.print(
        f"{diagnosis.model} in {diagnosis.precision}: distance "
        f"{diagnosis.lowered.distance:.2g}, up to {diagnosis.limit:g} is well",
        markup=False,
    )
    table = Table("layer", "operator", "finite", "cosine", "error")
    for finding in diagnosis.findings[:12]:
        table.add_row(
            finding.node,
            finding.op_type,
            "yes" if finding.finite else "NO",
            f"{finding.cosine:.6f}",
            f"{finding.error:.2g}",
        )
    console.print(table)
    if diagnosis.keep:
        console.print(
            f"keep in float32 ({len(diagnosis.keep)} of {diagnosis.num_nodes} nodes, distance then "
            f"{diagnosis.treated.distance:.2g}): {' '.join(diagnosis.keep)}",
            markup=False,
        )
    else:
        console.print("keep in float32: nothing")
    for precision, values in metrics.items():
        cells = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        console.print(f"{precision}: {cells}", markup=False)


def finite_json(value: Any) -> Any:
    """JSON values with null for what is not finite."""
    if isinstance(value, Mapping):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
