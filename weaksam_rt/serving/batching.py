"""Joining requests along the batch axis and taking results apart; NumPy only."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.backends.base import Arrays


def stack_batch(parts: Sequence[Arrays]) -> dict[str, NDArray[Any]]:
    """Join the arrays of several requests, each [b_i, ...], to [sum of b_i, ...].

    A single request is passed through without a copy.

    Args:
        parts: At least one; all with the same names and, behind the batch axis, the same shapes.
    """
    if len(parts) == 1:
        return dict(parts[0])
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def split_batch(arrays: Arrays, sizes: Sequence[int]) -> list[dict[str, NDArray[Any]]]:
    """The inverse of ``stack_batch``: views of ``sizes[i]`` rows each.

    Raises:
        ValueError: An array does not have as many rows as were put in; the engine is wrong.
    """
    for name, array in arrays.items():
        if len(array) != sum(sizes):
            raise ValueError(f"{name} has {len(array)} rows for a batch of {sum(sizes)}")
    borders = pairwise([0, *accumulate(sizes)])
    return [{name: array[start:stop] for name, array in arrays.items()} for start, stop in borders]
