"""Descriptions of all proposals of a data set in one memory-mapped file: what is not looked at need
not be in memory.

It knows rows of numbers and how many bytes they take; it knows no images.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from training.engine.disk_room import check_room
from training.models.wsod_detector import CELLS, RoiDescriptions
from weaksam_rt.files import atomic_path

_BYTES = 2


def row_width(num_features: int, *, with_cells: bool) -> int:
    """Numbers that describe one proposal in one view."""
    return num_features * (3 + (CELLS**2 if with_cells else 0))


def open_store(path: Path, num_rows: int, width: int, fill: Callable[[Tensor], None]) -> Tensor:
    """bfloat16 [num_rows, width] in the file ``path``; a whole file is used as it is.

    Args:
        path: Whole or absent.
        num_rows: At least 1.
        width: Numbers a row.
        fill: Writes the rows of the tensor it is given.

    Raises:
        OSError: The disk has too little room; nothing is written then.
    """
    size = num_rows * width * _BYTES
    if not (path.is_file() and path.stat().st_size == size):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        check_room(
            path.parent,
            size,
            what=f"{num_rows} descriptions of proposals",
            advice=", fewer image sizes, or no DropBlock",
        )
        with atomic_path(path) as temporary:
            rows = _mapped(temporary, num_rows, width)
            fill(rows)
            del rows
    return _mapped(path, num_rows, width)


def as_descriptions(rows: Tensor, map_channels: Sequence[int]) -> RoiDescriptions:
    """Views of rows [n, width]; nothing is read."""
    d = sum(map_channels)
    parts = rows[:, : 3 * d].unflatten(1, (3, d))
    cells = rows[:, 3 * d :].unflatten(1, (CELLS, CELLS, d)) if rows.shape[1] > 3 * d else None
    return RoiDescriptions(
        mean_inside=parts[:, 0], max_inside=parts[:, 1], mean_around=parts[:, 2], cells=cells
    )


def write_descriptions(rows: Tensor, found: RoiDescriptions) -> None:
    """Copy descriptions of n proposals into ``rows`` [n, width]."""
    parts = [found.mean_inside, found.max_inside, found.mean_around]
    if found.cells is not None:
        parts.append(found.cells.flatten(1))
    rows.copy_(torch.cat([part.to(rows) for part in parts], dim=1))


def _mapped(path: Path, num_rows: int, width: int) -> Tensor:
    mapped = torch.from_file(str(path), shared=True, size=num_rows * width, dtype=torch.bfloat16)
    return mapped.unflatten(0, (num_rows, width))
