"""Activation maps to packed prompts: NumPy, the CUDA kernels, and the ways they replace.

Run ``python -m benchmarks.prompt_kernels``. One image has two tags: 2 coarse and 2 fine maps
(kernel 17) and 24 cross-attention maps (kernel 129) of 14x14 nodes, on 375x500 pixels. Printed are
the compiled kernels' resources, the bytes that must move, the CPU's times, and on a machine with a
GPU the kernels beside the same steps in PyTorch.
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
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from training.engine.stage import git_commit
from weaksam_rt.class_activation_map import CROSS_PEAKS, PeakConfig
from weaksam_rt.preprocessing import longest_side_frame
from weaksam_rt.prompt_clustering import ClusteringConfig, MapBatch, cluster_prompts, prompt_batch
from weaksam_rt.prompt_clustering._low_res_peaks import low_res_peaks, normalized_corners
from weaksam_rt.prompt_clustering._plan import full_capacity, plan_prompts, read_prompts
from weaksam_rt.prompt_clustering._prebuilt import read_manifest
from weaksam_rt.prompt_clustering._reference import batch_peaks, normalized_maps
from weaksam_rt.prompt_clustering.build import resource_table
from weaksam_rt.prompt_clustering.device_arrays import host_array
from weaksam_rt.types import PromptSource

_IMAGE_SIZE = (375, 500)
_NUM_CAM, _NUM_CROSS = 4, 24
_NUM_MAPS = _NUM_CAM + _NUM_CROSS
_CONFIG = ClusteringConfig()
_H100_BYTES_PER_S = 3.35e12
"""Memory bandwidth of an H100 SXM as its data sheet has it; measured where there is a GPU."""


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


def _best_ms(
    run: Callable[[], object], repeats: int, clock: Callable[[], float] = time.process_time
) -> float:
    """Fastest of some runs. The process's own time, of one thread: other work does not count."""
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times) * 1e3


def _resource_lines() -> list[str]:
    manifest = read_manifest()
    if manifest is None:
        raise RuntimeError("run python -m weaksam_rt.prompt_clustering.build")
    return resource_table(manifest)


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
    return _kept(values, values == pooled, config)


def _filtered_peaks(values: NDArray[np.float32], config: PeakConfig) -> NDArray[np.int64]:
    maxima = ndimage.maximum_filter(values, config.kernel_size, mode="constant", cval=-np.inf)
    return _kept(values, values == maxima, config)


def _kept(
    values: NDArray[np.float32], is_maximum: NDArray[np.bool_], config: PeakConfig
) -> NDArray[np.int64]:
    ys, xs = np.nonzero(is_maximum & (values >= config.value_thresh))
    order = np.argsort(-values[ys, xs], kind="stable")[: config.max_candidates]
    kept: list[list[int]] = []
    for x, y in np.stack([xs, ys], axis=1)[order].tolist():
        distance = (config.kernel_size - 1) // 2
        if all(abs(x - other_x) + abs(y - other_y) >= distance for other_x, other_y in kept):
            kept.append([x, y])
    return np.array(kept, np.int64).reshape(-1, 2)


def _check_peaks(
    normalized: NDArray[np.float32], expected: list[NDArray[np.int64]], rules: list[PeakConfig]
) -> None:
    """Raise unless the ways that are timed find the same peaks; max pooling on a few maps."""
    for i, (values, rule) in enumerate(zip(normalized, rules, strict=True)):
        ways = (_filtered_peaks, _pooled_peaks) if i in (0, _NUM_CAM) else (_filtered_peaks,)
        for way in ways:
            if not np.array_equal(way(values, rule), expected[i]):
                raise RuntimeError(f"map {i}: {way.__name__} differs")


def _cpu_lines(repeats: int) -> list[str]:
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
    upsample = _best_ms(partial(normalized_maps, nodes, _IMAGE_SIZE), repeats) / _NUM_MAPS
    pooling = _best_ms(partial(_pooled_peaks, cross[0], CROSS_PEAKS), 1)
    filtering = _best_ms(lambda: [_filtered_peaks(cross[i], CROSS_PEAKS) for i in few], 3)
    filtering /= len(few)
    one = _best_ms(partial(prompt_batch, image, _CONFIG), repeats)
    some = max(3, repeats // 3)
    many = _best_ms(partial(prompt_batch, batch, _CONFIG), some)
    many_wall = _best_ms(partial(prompt_batch, batch, _CONFIG), some, time.perf_counter)
    all_nodes = host_array("maps", batch.maps)[0]
    normalise = _best_ms(partial(normalized_corners, all_nodes, _IMAGE_SIZE), some)
    ours = one / _NUM_MAPS
    return [
        "| on the CPU, time of one thread | ms | times ours |",
        "| --- | ---: | ---: |",
        f"| 32 images, 896 maps, from 14x14 nodes to packed prompts | {many:.0f} | |",
        f"| of it min-max normalisation, on the corners of cells | {normalise:.0f} | |",
        f"| the same 32 images by the clock, with what else the machine did | {many_wall:.0f} | |",
        f"| one image, 28 maps | {one:.2f} | |",
        f"| a map of it, clustering and packing included | {ours:.3f} | 1 |",
        f"| a map: `scipy.ndimage.maximum_filter` at 129, of the upsampled map | {filtering:.2f} "
        f"| {filtering / ours:.0f} |",
        f"| a map: `max_pool2d` at 129, of the upsampled map | {pooling:.0f} "
        f"| {pooling / ours:.0f} |",
        f"| a map: upsampling and normalising, which both need besides | {upsample:.2f} "
        f"| {upsample / ours:.1f} |",
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


def _gpu_lines(repeats: int) -> list[str]:
    # Imported here: it looks for a driver.
    from weaksam_rt.prompt_clustering._cuda import CudaExecutor

    executor = CudaExecutor()
    bandwidth = _copy_bytes_per_s()
    lines = [
        f"`{torch.cuda.get_device_name()}`, measured copy bandwidth {bandwidth / 1e12:.2f} TB/s.",
        "",
        "| images | kernels, us | as a graph, us | PyTorch, us | times | floor, us | GB/s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for num_images in (1, 8, 64):
        batch = _batch(num_images)
        room = full_capacity(batch, max_candidates=25)
        plan = plan_prompts(
            batch,
            cam_peaks=_CONFIG.cam_peaks,
            cross_peaks=_CONFIG.cross_peaks,
            points_per_cluster=_CONFIG.points_per_cluster,
        )
        with executor.loaded(plan) as loaded:
            kernels_us = _launch_us(loaded.launch, executor.synchronize, repeats)
            with loaded.captured() as launch:
                graph_us = _launch_us(launch, executor.synchronize, repeats)
            ours = read_prompts(loaded.outputs(), room)
        expected = prompt_batch(batch, _CONFIG)
        if not np.array_equal(ours.sam_points, expected.sam_points):
            raise RuntimeError(f"{num_images} images: the kernels differ from NumPy")
        on_gpu = torch.from_numpy(host_array("maps", batch.maps)[0]).cuda().split(_NUM_MAPS)
        torch_us = 1e3 * _best_ms(partial(_torch_batch, on_gpu), 3, time.perf_counter)
        num_bytes = _bytes_that_must_move(batch)
        lines.append(
            f"| {num_images} | {kernels_us:.1f} | {graph_us:.1f} | {torch_us:.0f} | "
            f"{torch_us / graph_us:.0f} | {num_bytes / bandwidth * 1e6:.3f} | "
            f"{num_bytes / graph_us / 1e3:.2f} |"
        )
    return lines


def _torch_batch(images: tuple[Tensor, ...]) -> None:
    for maps in images:
        _torch_prompts(maps)


def _launch_us(launch: Callable[[], None], synchronize: Callable[[], None], repeats: int) -> float:
    """Time of a batch when many are on the stream; the host's part hides where it is shorter."""
    for _ in range(3):
        launch()
    synchronize()
    start = time.perf_counter()
    for _ in range(10 * repeats):
        launch()
    synchronize()
    return (time.perf_counter() - start) / (10 * repeats) * 1e6


def _copy_bytes_per_s() -> float:
    source = torch.empty(2**28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def main(repeats: int = 15, output: Path | None = None) -> None:
    """Print the tables; with ``output``, also write them.

    Args:
        repeats: Runs of the fast paths; the fastest is reported.
        output: Markdown file.
    """
    torch.set_num_threads(1)
    one, many = _bytes_that_must_move(_batch(1)), _bytes_that_must_move(_batch(64))
    has_gpu = torch.cuda.is_available()
    lines = [
        "# Activation maps to packed prompts",
        "",
        f"`python -m benchmarks.prompt_kernels`, commit {git_commit()[:12]}; "
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"NumPy {np.__version__}; fastest of {repeats}; load average {os.getloadavg()[0]:.1f}.",
        "",
        f"Bytes that must move: {one} for one image, {many} for 64; at the "
        f"{_H100_BYTES_PER_S / 1e12} TB/s of an H100's data sheet "
        f"{one / _H100_BYTES_PER_S * 1e6:.3f} and {many / _H100_BYTES_PER_S * 1e6:.2f} us. The "
        f"upsampled maps, never written, would be {_NUM_MAPS * 375 * 500 * 4} bytes an image.",
        "",
        "Compiled by NVRTC: registers of a thread, static shared bytes of a block, spilled bytes "
        "of a thread. Dynamic shared memory: 16 bytes a node for `find_peaks`.",
        "",
        *_resource_lines(),
        "",
        *_cpu_lines(repeats),
        "",
        *(_gpu_lines(repeats) if has_gpu else ["No GPU here: the kernels were not timed."]),
    ]
    text = "\n".join(lines) + "\n"
    Console(width=200).print(text, markup=False)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)


if __name__ == "__main__":
    tyro.cli(main)
