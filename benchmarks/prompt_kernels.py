"""Activation maps to packed prompts: NumPy, the CUDA kernels, and the ways they replace.

``python -m benchmarks prompt_kernels``: one image has two tags, 2 coarse and 2 fine maps (kernel
17) and 24 cross-attention maps (kernel 129) of 14x14 nodes, on 375x500 pixels. Reported are the
compiled kernels' resources, the bytes that must move, the CPU's times of one thread, and on a
machine with a GPU the kernels beside the same steps in PyTorch. Ways that disagree stop the run.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.entry import enter
from benchmarks.machine import measure_peaks, torch_threads
from benchmarks.peaks import highest_apart
from benchmarks.reporting import report
from benchmarks.results import BenchmarkResult, Metric, Recorder, Table
from benchmarks.turns import in_turns, per_item
from weaksam_rt.class_activation_map import CROSS_PEAKS, PeakConfig
from weaksam_rt.preprocessing import longest_side_frame
from weaksam_rt.prompt_clustering import ClusteringConfig, MapBatch, cluster_prompts, prompt_batch
from weaksam_rt.prompt_clustering._low_res_peaks import low_res_peaks, normalized_corners
from weaksam_rt.prompt_clustering._plan import full_capacity, plan_prompts, read_prompts
from weaksam_rt.prompt_clustering._prebuilt import read_manifest
from weaksam_rt.prompt_clustering._reference import batch_peaks, normalized_maps
from weaksam_rt.prompt_clustering.build import resource_rows
from weaksam_rt.prompt_clustering.device_arrays import host_array
from weaksam_rt.types import PromptSource

_IMAGE_SIZE = (375, 500)
_NUM_CAM, _NUM_CROSS = 4, 24
_NUM_MAPS = _NUM_CAM + _NUM_CROSS
_CONFIG = ClusteringConfig()
_H100_BYTES_PER_S = 3.35e12
"""Memory bandwidth of an H100 SXM as its data sheet has it; measured where there is a GPU."""
BATCH, CORNERS, IMAGE = (
    "32 images, 896 maps, from 14x14 nodes to packed prompts",
    "of it min-max normalisation, on the corners of cells",
    "one image, 28 maps",
)
UPSAMPLE, FILTER, POOLING = (
    "a map: upsampling and normalising, which the next two need besides",
    "a map: scipy.ndimage.maximum_filter at 129, of the upsampled map",
    "a map: max_pool2d at 129, of the upsampled map",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptKernelsConfig:
    """How much is measured."""

    repeats: int = 5
    """Blocks of each way; they take turns."""
    samples: int = 3
    """Of one block."""
    launches: int = 100
    """Of one sample on a GPU: the host's part hides behind the kernels."""


def main(
    config: Annotated[PromptKernelsConfig, tyro.conf.arg(name="")] = PromptKernelsConfig(),
    *,
    output: Path | None = None,
) -> None:
    """Measure and report.

    Args:
        config: How much is measured.
        output: Path without suffix; result.json, .md and .html are written there.
    """
    report(measure(config), output)


def measure(config: PromptKernelsConfig) -> BenchmarkResult:
    """The CPU's ways, then the GPU's where there is one."""
    recorder = Recorder(
        what="prompt_kernels",
        title="Activation maps to packed prompts",
        config=asdict(config),
        artifacts=(),
    )
    with torch_threads(1):  # the process's own time is measured
        metrics = _cpu_metrics(config)
    has_gpu = torch.cuda.is_available()
    one, many = _bytes_that_must_move(_batch(1)), _bytes_that_must_move(_batch(64))
    notes = [
        *_cpu_notes(metrics),
        f"Bytes that must move: {one} for one image, {many} for 64; at the "
        f"{_H100_BYTES_PER_S / 1e12} TB/s of an H100's data sheet "
        f"{one / _H100_BYTES_PER_S * 1e6:.3f} and {many / _H100_BYTES_PER_S * 1e6:.2f} us. The "
        f"upsampled maps, never written, would be {_NUM_MAPS * 375 * 500 * 4} bytes an image.",
        *([] if has_gpu else ["No GPU here: the kernels were not timed."]),
    ]
    gpu = _gpu_metrics(config) if has_gpu else []
    return recorder.result([*metrics, *gpu], tables=[_resources()], notes=notes)


def _batch(num_images: int, side: int = 14) -> MapBatch:
    rng = np.random.default_rng(0)
    sources = [PromptSource.COARSE] * 2 + [PromptSource.FINE] * 2 + [PromptSource.CROSS] * 24
    return MapBatch(
        maps=rng.random((1, num_images * _NUM_MAPS, side, side), dtype=np.float32),
        map_images=np.repeat(np.arange(num_images, dtype=np.int32), _NUM_MAPS),
        map_sources=np.tile(np.array(sources, np.int32), num_images),
        map_classes=np.tile(np.arange(_NUM_MAPS, dtype=np.int32) % 2, num_images),
        frames=(longest_side_frame(_IMAGE_SIZE, 1024),) * num_images,
    )


def _resources() -> Table:
    manifest = read_manifest()
    if manifest is None:
        raise RuntimeError("run python -m weaksam_rt.prompt_clustering.build")
    header, *rows = resource_rows(manifest)
    return Table(
        title="Compiled by NVRTC: registers of a thread, static shared bytes of a block, spilled "
        "bytes of a thread; dynamic shared memory is 16 bytes a node for find_peaks",
        header=header,
        rows=tuple(rows),
    )


def _bytes_that_must_move(batch: MapBatch) -> int:
    """The maps once, the prompts once; everything between may stay in caches."""
    prompts = prompt_batch(batch, _CONFIG)
    arrays = [
        prompts.prompts.points, prompts.prompts.scores, prompts.prompts.class_ids,
        prompts.prompts.sources, prompts.point_offsets, prompts.sam_points, prompts.sam_labels,
        prompts.sam_offsets, prompts.image_index,
    ]  # fmt: skip
    return batch.maps.nbytes + sum(array.nbytes for array in arrays)


def _pooled_peaks(values: NDArray[np.float32], config: PeakConfig) -> NDArray[np.int64]:
    """The released code's steps: max pooling of every pixel, then the highest candidates."""
    kernel = config.kernel_size
    pooled = F.max_pool2d(torch.from_numpy(values)[None], kernel, 1, kernel // 2)[0].numpy()
    return highest_apart(values, values == pooled, config)


def _filtered_peaks(values: NDArray[np.float32], config: PeakConfig) -> NDArray[np.int64]:
    maxima = ndimage.maximum_filter(values, config.kernel_size, mode="constant", cval=-np.inf)
    return highest_apart(values, values == maxima, config)


def _check_peaks(
    normalized: NDArray[np.float32], expected: list[NDArray[np.int64]], rules: list[PeakConfig]
) -> None:
    """Raise unless the ways that are timed find the same peaks; max pooling on a few maps."""
    for i, (values, rule) in enumerate(zip(normalized, rules, strict=True)):
        ways = (_filtered_peaks, _pooled_peaks) if i in (0, _NUM_CAM) else (_filtered_peaks,)
        for way in ways:
            if not np.array_equal(way(values, rule), expected[i]):
                raise RuntimeError(f"map {i}: {way.__name__} differs")


def _cpu_metrics(config: PromptKernelsConfig) -> list[Metric]:
    """Milliseconds of one thread; the last three are of one map."""
    image, batch = _batch(1), _batch(32)
    nodes = host_array("maps", image.maps)[0]
    rules = [_CONFIG.cam_peaks] * _NUM_CAM + [_CONFIG.cross_peaks] * _NUM_CROSS
    found = batch_peaks(
        image, cam_peaks=_CONFIG.cam_peaks, cross_peaks=_CONFIG.cross_peaks,
        find_peaks=low_res_peaks,
    )  # fmt: skip
    normalized = normalized_maps(nodes, _IMAGE_SIZE)
    _check_peaks(normalized, [peaks.points for peaks in found], rules)
    cross, few = normalized[_NUM_CAM:], range(0, _NUM_CROSS, 6)
    all_nodes = host_array("maps", batch.maps)[0]
    timed = partial(in_turns, samples=config.samples, clock=time.process_time)
    ours = timed(
        {
            BATCH: partial(prompt_batch, batch, _CONFIG),
            CORNERS: partial(normalized_corners, all_nodes, _IMAGE_SIZE),
            IMAGE: partial(prompt_batch, image, _CONFIG),
        },
        repeats=config.repeats,
    )
    upsample, filtering = timed(
        {
            UPSAMPLE: partial(normalized_maps, nodes, _IMAGE_SIZE),
            FILTER: lambda: [_filtered_peaks(cross[i], CROSS_PEAKS) for i in few],
        },
        repeats=config.repeats,
    )
    pooling = timed({POOLING: partial(_pooled_peaks, cross[0], CROSS_PEAKS)}, repeats=1)
    return [*ours, per_item(upsample, _NUM_MAPS), per_item(filtering, len(few)), *pooling]


def _cpu_notes(metrics: list[Metric]) -> list[str]:
    medians = {metric.name: float(np.median(metric.samples)) for metric in metrics}
    ours = medians[IMAGE] / _NUM_MAPS
    return [
        "The CPU's times are those of one thread; what else the machine did does not count.",
        f"A map of one image, clustering and packing included, takes {ours:.3f} ms.",
        *(f"{way}: {medians[way] / ours:.3g} times that." for way in (UPSAMPLE, FILTER, POOLING)),
    ]


def _torch_prompts(maps: Tensor) -> list[NDArray[np.int64]]:
    """The same steps in PyTorch for one image: interpolate, max pooling, top-k, loops."""
    full = F.interpolate(maps[None], _IMAGE_SIZE, mode="bilinear", align_corners=False)[0]
    low, high = full.amin((1, 2), keepdim=True), full.amax((1, 2), keepdim=True)
    full = (full - low) / (high - low + 1e-8)
    peaks = []
    for i, values in enumerate(full):
        rule = _CONFIG.cam_peaks if i < _NUM_CAM else _CONFIG.cross_peaks
        pooled = F.max_pool2d(values[None], rule.kernel_size, 1, rule.kernel_size // 2)[0]
        candidates = torch.where((values == pooled) & (values >= rule.value_thresh), values, 0)
        top = candidates.flatten().topk(rule.max_candidates)
        kept: list[tuple[int, int]] = []
        for score, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            y, x = divmod(index, _IMAGE_SIZE[1])
            distance = (rule.kernel_size - 1) // 2
            if score > 0 and all(abs(x - a) + abs(y - b) >= distance for a, b in kept):
                kept.append((x, y))
        peaks.append(np.array(kept, np.int64).reshape(-1, 2))
    return [*peaks[:_NUM_CAM], cluster_prompts(np.concatenate(peaks[_NUM_CAM:]), 5)]


def _gpu_metrics(config: PromptKernelsConfig) -> list[Metric]:
    """Microseconds of a batch when many are on the stream, beside PyTorch's wall time."""
    # Imported here: it looks for a driver.
    from weaksam_rt.prompt_clustering._cuda import CudaExecutor

    executor = CudaExecutor()
    bandwidth = measure_peaks("cuda").bytes
    metrics = []
    for num_images in (1, 8, 64):
        batch = _batch(num_images)
        floor_us = 1e6 * _bytes_that_must_move(batch) / bandwidth
        room = full_capacity(batch, max_candidates=25)
        plan = plan_prompts(
            batch,
            cam_peaks=_CONFIG.cam_peaks,
            cross_peaks=_CONFIG.cross_peaks,
            points_per_cluster=_CONFIG.points_per_cluster,
        )
        times: dict[str, list[tuple[float, ...]]] = {"kernels": [], "graph": []}
        with executor.loaded(plan) as loaded, loaded.captured() as graph:
            for _ in range(config.repeats):
                for way, launch in (("kernels", loaded.launch), ("graph", graph)):
                    block = [
                        _launch_us(launch, executor.synchronize, config)
                        for _ in range(config.samples)
                    ]
                    times[way].append(tuple(block))
            ours = read_prompts(loaded.outputs(), room)
        # Not in turns with the kernels: the executor's context is current there.
        on_gpu = torch.from_numpy(host_array("maps", batch.maps)[0]).cuda().split(_NUM_MAPS)
        torch_ms = in_turns(
            {"PyTorch": partial(_torch_batch, on_gpu)}, repeats=config.repeats, samples=1
        )
        times["PyTorch"] = [tuple(1e3 * ms for ms in block) for block in torch_ms[0].repeats]
        if not np.array_equal(ours.sam_points, prompt_batch(batch, _CONFIG).sam_points):
            raise RuntimeError(f"{num_images} images: the kernels differ from NumPy")
        metrics += [
            Metric(
                name=f"on the GPU, {num_images} images: {way}",
                unit="us",
                repeats=tuple(blocks),
                floor=floor_us,
                floor_reason="bytes that must move at the measured copy bandwidth",
            )
            for way, blocks in times.items()
        ]
    return metrics


def _torch_batch(images: tuple[Tensor, ...]) -> None:
    for maps in images:
        _torch_prompts(maps)


def _launch_us(
    launch: Callable[[], None], synchronize: Callable[[], None], config: PromptKernelsConfig
) -> float:
    """Time of a batch when many are on the stream; the host's part hides where it is shorter."""
    for _ in range(3):
        launch()
    synchronize()
    start = time.perf_counter()
    for _ in range(config.launches):
        launch()
    synchronize()
    return (time.perf_counter() - start) / config.launches * 1e6


if __name__ == "__main__":
    enter(main)
