"""BYTES tensors: as object arrays of ``bytes``, and as the protocol's raw form.

Raw, every element is its length (uint32, little endian) and then its bytes.
"""

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def bytes_array(items: Sequence[bytes]) -> NDArray[np.object_]:
    """[n], an object array; a plain ``np.array`` would drop trailing zero bytes."""
    array = np.empty(len(items), np.object_)
    array[:] = items
    return array


def raw_from_bytes(array: NDArray[np.object_]) -> bytes:
    """The protocol's form of an object array of any shape, in C order."""
    return b"".join(struct.pack("<I", len(item)) + item for item in array.ravel().tolist())


def bytes_from_raw(raw: bytes) -> NDArray[np.object_]:
    """[n], what ``raw_from_bytes`` was given; the caller reshapes.

    Raises:
        ValueError: The lengths do not add up to the size of ``raw``.
    """
    items = []
    start = 0
    while start < len(raw):
        header = raw[start : start + 4]
        stop = start + 4 + (struct.unpack("<I", header)[0] if len(header) == 4 else 0)
        if len(header) < 4 or stop > len(raw):
            raise ValueError(f"a BYTES tensor of {len(raw)} bytes ends inside an element")
        items.append(raw[start + 4 : stop])
        start = stop
    return bytes_array(items)
