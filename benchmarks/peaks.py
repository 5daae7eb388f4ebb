"""Peaks and clustering of 28 activation maps of 375x500, beside the definition.

``python -m benchmarks peaks`` takes the maps of an image with two tags: 2 coarse and 2 fine maps
(kernel 17), 24 cross-attention maps (kernel 129), smooth like a ViT's 14x14 maps resized to the
image. Two more sets are harder: 24x24 maps with noise on top, and plateaus of equal values. Peaks
that differ from the definition's stop the run.
"""

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch.nn import functional as F  # noqa: N812

from benchmarks.entry import enter
from benchmarks.machine import torch_threads
from benchmarks.reporting import report
from benchmarks.results import BenchmarkResult, Metric, Recorder, Table
from benchmarks.turns import in_turns, per_item
from weaksam_rt.class_activation_map import (
    CAM_PEAKS,
    CROSS_PEAKS,
    PeakConfig,
    normalize_maps,
    peak_points,
)
from weaksam_rt.preprocessing import resize_maps
from weaksam_rt.prompt_clustering import cluster_prompts

NORMALISE, PEAKS, DEFINITION = "min-max normalisation", "peaks and clustering", "the definition"
_IMAGE_SIZE = (375, 500)
_NUM_CAM = 4
_KINDS = (CAM_PEAKS,) * _NUM_CAM + (CROSS_PEAKS,) * 24


@dataclass(frozen=True, kw_only=True, slots=True)
class PeaksConfig:
    """How much is measured."""

    repeats: int = 5
    """Of each way; they take turns."""
    samples: int = 6
    """Of one block, each all 28 maps."""
    defined_maps: int = 2
    """Maps of each kernel on which the slow definition is run."""


def main(
    config: Annotated[PeaksConfig, tyro.conf.arg(name="")] = PeaksConfig(),
    *,
    output: Path | None = None,
) -> None:
    """Measure and report.

    Args:
        config: How much is measured.
        output: Path without suffix; result.json, .md and .html are written there.
    """
    report(measure(config), output)


def measure(config: PeaksConfig) -> BenchmarkResult:
    """All kinds of maps, one after the other."""
    recorder = Recorder(
        what="peaks",
        title="Peaks and clustering of 28 maps of 375x500",
        config=asdict(config),
        artifacts=(),
    )
    metrics, rows = [], []
    for make in (_smooth, _noisy, _plateaus):
        kind = make.__name__.lstrip("_")
        raw = make(np.random.default_rng(0))
        with torch_threads(1):  # the process's own time is measured
            metrics += _timed(kind, raw, config)
        peaks, clusters = _peaks(normalize_maps(raw))
        rows.append((kind, str(sum(map(len, peaks))), str(len(clusters))))
    table = Table(title="What was found", header=("maps", "peaks", "clusters"), rows=tuple(rows))
    return recorder.result(metrics, tables=[table], notes=_notes(metrics))


def _timed(kind: str, raw: NDArray[np.float32], config: PeaksConfig) -> list[Metric]:
    """The fast ways in milliseconds of all maps, the definition's of one."""
    maps = normalize_maps(raw)
    found, _ = _peaks(maps)
    chosen = [first + i for first in (0, _NUM_CAM) for i in range(config.defined_maps)]
    for i in chosen:
        if not np.array_equal(_defined_peaks(maps[i], _KINDS[i]), found[i]):
            raise RuntimeError(f"{kind}, map {i}: the fast path differs from the definition")
    fast = in_turns(
        {NORMALISE: partial(normalize_maps, raw), PEAKS: partial(_peaks, maps)},
        repeats=config.repeats, samples=config.samples, kind=kind, clock=time.process_time,
    )  # fmt: skip
    (slow,) = in_turns(
        {DEFINITION: lambda: [_defined_peaks(maps[i], _KINDS[i]) for i in chosen]},
        repeats=1, samples=2, kind=kind, clock=time.process_time,
    )  # fmt: skip
    return [*fast, per_item(slow, len(chosen), name=f"{slow.name}, one map")]


def _notes(metrics: list[Metric]) -> list[str]:
    medians = {metric.name: float(np.median(metric.samples)) for metric in metrics}
    notes = ["Time of one thread; what else the machine did does not count."]
    for kind in dict.fromkeys(name.split(": ")[0] for name in medians):
        one_map = medians[f"{kind}: {PEAKS}"] / len(_KINDS)
        ratio = medians[f"{kind}: {DEFINITION}, one map"] / one_map
        notes.append(f"{kind}: a map by the definition takes {ratio:.0f} times as long.")
    return notes


def _smooth(rng: np.random.Generator) -> NDArray[np.float32]:
    return resize_maps(rng.random((28, 14, 14), dtype=np.float32), _IMAGE_SIZE)


def _noisy(rng: np.random.Generator) -> NDArray[np.float32]:
    maps = resize_maps(rng.random((28, 24, 24), dtype=np.float32), _IMAGE_SIZE)
    return maps + 0.02 * rng.random(maps.shape, dtype=np.float32)


def _plateaus(rng: np.random.Generator) -> NDArray[np.float32]:
    return np.round(_smooth(rng) * 16) / 16


def _peaks(maps: NDArray[np.float32]) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    peaks = [peak_points(m, kind).points for m, kind in zip(maps, _KINDS, strict=True)]
    return peaks, cluster_prompts(np.concatenate(peaks[_NUM_CAM:]), 5)


def _defined_peaks(values: NDArray[np.float32], config: PeakConfig) -> NDArray[np.int64]:
    """The steps of the algorithm as they are written, with torch's max pooling."""
    kernel = config.kernel_size
    pooled = F.max_pool2d(torch.from_numpy(values)[None], kernel, 1, kernel // 2)[0].numpy()
    return highest_apart(values, values == pooled, config)


def highest_apart(
    values: NDArray[np.float32], is_maximum: NDArray[np.bool_], config: PeakConfig
) -> NDArray[np.int64]:
    """The highest of some pixels that keep their distance, [n, 2], (x, y); the rule as written."""
    ys, xs = np.nonzero(is_maximum & (values >= config.value_thresh))
    order = np.argsort(-values[ys, xs], kind="stable")[: config.max_candidates]
    distance = (config.kernel_size - 1) // 2
    kept: list[list[int]] = []
    for x, y in np.stack([xs, ys], axis=1)[order].tolist():
        if all(abs(x - other_x) + abs(y - other_y) >= distance for other_x, other_y in kept):
            kept.append([x, y])
    return np.array(kept, np.int64).reshape(-1, 2)


if __name__ == "__main__":
    enter(main)
