"""Scaled images of a data set in one mapped file: what is not looked at need not be in memory, and
processes can share it.

It knows arrays of pixels; it knows neither data sets nor boxes.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from training.engine.disk_room import check_room
from weaksam_rt.files import atomic_path


def open_pixels(
    path: Path,
    shape: tuple[int, ...],
    fill: Callable[[NDArray[np.uint8]], None],
    *,
    copy_on_write: bool = False,
) -> NDArray[np.uint8]:
    """uint8 of ``shape`` in the file ``path``; a whole file of this shape is used as it is.

    Args:
        path: A ``.npy`` file, whole or absent.
        shape: Without zeros; the first axis counts images.
        fill: Writes all of the array it is given.
        copy_on_write: The result may be written, which torch wants, and never changes the file.
            Without it the result is read-only, and may be larger than the memory.

    Raises:
        OSError: The disk has too little room; nothing is written then.
    """
    if not (path.is_file() and open_memmap(path, mode="r").shape == shape):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        check_room(path.parent, math.prod(shape), what=f"{shape[0]} scaled images", advice="")
        with atomic_path(path) as temporary:
            filled = open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            fill(filled)
            filled.flush()
    return np.asarray(open_memmap(path, mode="c" if copy_on_write else "r"))
