"""Peaks and clustering of 28 activation maps of 375x500, beside the definition.

Run ``python -m benchmarks.peaks``. The maps are those of an image with two tags: 2 coarse and 2
fine maps (kernel 17), 24 cross-attention maps (kernel 129), smooth like a ViT's 14x14 maps resized
to the image. Two more sets are harder: 24x24 maps with noise on top, and plateaus of equal values.
"""

import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console
from torch.nn import functional as F  # noqa: N812

from training.engine.stage import git_commit
from weaksam_rt.class_activation_map import (
    CAM_PEAKS,
    CROSS_PEAKS,
    PeakConfig,
    normalize_maps,
    peak_points,
)
from weaksam_rt.preprocessing import resize_maps
from weaksam_rt.prompt_clustering import cluster_prompts

_IMAGE_SIZE = (375, 500)
_KINDS = (CAM_PEAKS,) * 4 + (CROSS_PEAKS,) * 24


def _smooth(rng: np.random.Generator) -> NDArray[np.float32]:
    return resize_maps(rng.random((28, 14, 14), dtype=np.float32), _IMAGE_SIZE)


def _noisy(rng: np.random.Generator) -> NDArray[np.float32]:
    maps = resize_maps(rng.random((28, 24, 24), dtype=np.float32), _IMAGE_SIZE)
    return maps + 0.02 * rng.random(maps.shape, dtype=np.float32)


def _plateaus(rng: np.random.Generator) -> NDArray[np.float32]:
    return np.round(_smooth(rng) * 16) / 16


def _fast(maps: NDArray[np.float32]) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    peaks = [peak_points(m, kind).points for m, kind in zip(maps, _KINDS, strict=True)]
    return peaks, cluster_prompts(np.concatenate(peaks[4:]), 5)


def _defined_peaks(values: NDArray[np.float32], config: PeakConfig) -> NDArray[np.int64]:
    """The steps of the algorithm as they are written, with torch's max pooling."""
    kernel = config.kernel_size
    pooled = F.max_pool2d(torch.from_numpy(values)[None], kernel, 1, kernel // 2)[0].numpy()
    ys, xs = np.nonzero(values == pooled)
    order = np.argsort(-values[ys, xs], kind="stable")[: config.max_candidates]
    kept: list[list[int]] = []
    for x, y in np.stack([xs, ys], axis=1)[order].tolist():
        if any(abs(x - kx) + abs(y - ky) < (kernel - 1) // 2 for kx, ky in kept):
            continue
        if values[y, x] < config.value_thresh:
            break
        kept.append([x, y])
    return np.array(kept, dtype=np.int64).reshape(-1, 2)


def _median_ms(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


def main(repeats: int = 30, defined_maps: int = 2, output: Path | None = None) -> None:
    """Time both, check that they agree, print a table; with ``output``, also write it.

    Args:
        repeats: Runs of the fast path; the median is reported.
        defined_maps: Maps of each kernel on which the slow definition is run.
        output: Markdown file.
    """
    lines = [
        "# Peaks and clustering of 28 maps of 375x500",
        "",
        f"`python -m benchmarks.peaks`, commit {git_commit()[:12]}; "
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"NumPy {np.__version__}. 4 maps at kernel 17 and 24 at kernel 129, median of {repeats}; "
        f"the definition on {2 * defined_maps} of the maps, with equal peaks.",
        "",
        "| maps | min-max normalisation, ms | peaks and clustering, ms | peaks | "
        "the definition, ms a map |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for make in (_smooth, _noisy, _plateaus):
        raw = make(np.random.default_rng(0))
        maps = normalize_maps(raw)
        peaks, _ = _fast(maps)
        slow = 0.0
        for i in (*range(defined_maps), *range(4, 4 + defined_maps)):
            start = time.perf_counter()
            defined = _defined_peaks(maps[i], _KINDS[i])
            slow += time.perf_counter() - start
            if not np.array_equal(defined, peaks[i]):
                raise RuntimeError(f"map {i}: the fast path differs from the definition")
        normalise = _median_ms(partial(normalize_maps, raw), repeats)
        fast = _median_ms(partial(_fast, maps), repeats)
        lines.append(
            f"| {make.__name__.lstrip('_')} | {normalise:.1f} | {fast:.1f} | "
            f"{sum(map(len, peaks))} | {slow / (2 * defined_maps) * 1e3:.0f} |"
        )
    text = "\n".join(lines) + "\n"
    Console().print(text, markup=False)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)


if __name__ == "__main__":
    tyro.cli(main)
