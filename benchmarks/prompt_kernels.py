"""Activation maps to packed prompts: NumPy, the CUDA kernels, and the ways they replace.

``python -m benchmarks prompt_kernels``: one image has two tags, 2 coarse and 2 fine maps (kernel
17) and 24 cross-attention maps (kernel 129) of 14x14 nodes, on 375x500 pixels. Reported are the
compiled kernels' resources, the bytes that must move, the CPU's times of one thread, and on a
machine with a GPU the kernels beside the same steps in PyTorch; then suppression by class beside
torchvision's. On the CPU ways that disagree stop the run, and so does a kernel that differs from
NumPy. PyTorch's peaks on a GPU, which rounds as it likes, are counted where they differ.

On a GPU inputs and outputs lie there, for all ways: neither upload nor reading back is timed.
PyTorch's way ends with the candidates of each map, since its distance rule and k-means would need
the host; the kernels' times include both, and packing.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torchvision.ops import batched_nms

from benchmarks.entry import enter
from benchmarks.machine import Peaks, measure_peaks, torch_threads
from benchmarks.peaks import highest_apart
from benchmarks.reporting import report
from benchmarks.results import BenchmarkResult, Metric, Recorder, Table
from benchmarks.turns import in_turns, per_item
from weaksam_rt.class_activation_map import CROSS_PEAKS, PeakConfig
from weaksam_rt.preprocessing import longest_side_frame
from weaksam_rt.prompt_clustering import ClusteringConfig, MapBatch, class_nms, prompt_batch
from weaksam_rt.prompt_clustering._low_res_peaks import low_res_peaks, normalized_corners
from weaksam_rt.prompt_clustering._plan import (
    Plan,
    full_capacity,
    plan_nms,
    plan_prompts,
    read_nms,
    read_prompts,
)
from weaksam_rt.prompt_clustering._prebuilt import read_manifest
from weaksam_rt.prompt_clustering._reference import batch_peaks, normalized_maps
from weaksam_rt.prompt_clustering.build import resource_rows
from weaksam_rt.prompt_clustering.device_arrays import host_array
from weaksam_rt.types import PromptSource

if TYPE_CHECKING:
    from weaksam_rt.prompt_clustering._cuda import CudaExecutor

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
_NUM_BOXES, _NUM_CLASSES, _NMS_THRESH = 1000, 20, 0.5
NMS = f"suppression of {_NUM_BOXES} boxes of {_NUM_CLASSES} classes"
NUMPY, TORCHVISION = "NumPy", "torchvision"
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
    peaks = measure_peaks(threads=1)
    with torch_threads(1):  # the process's own time is measured
        metrics = [*_cpu_metrics(config, peaks), *cpu_nms_metrics(config, peaks)]
    bandwidths = [bandwidth_table("one thread of the CPU", metrics, peaks)]
    one, many = _bytes_that_must_move(map_batch(1)), _bytes_that_must_move(map_batch(64))
    notes = [
        *_cpu_notes(metrics),
        f"Bytes that must move: {one} for one image, {many} for 64; at the "
        f"{_H100_BYTES_PER_S / 1e12} TB/s of an H100's data sheet "
        f"{one / _H100_BYTES_PER_S * 1e6:.3f} and {many / _H100_BYTES_PER_S * 1e6:.2f} us. The "
        f"upsampled maps, never written, would be {_NUM_MAPS * 375 * 500 * 4} bytes an image.",
    ]
    if torch.cuda.is_available():
        gpu_peaks = measure_peaks("cuda")
        gpu = _gpu_metrics(config, gpu_peaks)
        bandwidths.append(bandwidth_table("the GPU", gpu, gpu_peaks))
        metrics += gpu
        notes.append(_torch_differences(map_batch(8)))
    else:
        notes.append("No GPU here: the kernels were not timed.")
    return recorder.result(metrics, tables=[*bandwidths, _resources()], notes=notes)


def map_batch(num_images: int, side: int = 14) -> MapBatch:
    """Random maps [1, 28 an image, side, side] in the order of their sources; always the same."""
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


def _with_floor(metric: Metric, num_bytes: int, peaks: Peaks) -> Metric:
    """The metric, in ms or us, with the least time that its bytes take."""
    scale = {"ms": 1e3, "us": 1e6}[metric.unit]
    return replace(
        metric,
        floor=scale * num_bytes / peaks.bytes,
        floor_reason="bytes that must move at the measured copy bandwidth",
    )


def bandwidth_table(where: str, metrics: Sequence[Metric], peaks: Peaks) -> Table:
    """What the metrics with a floor reach of the bandwidth that sets it."""
    reached = {m.name: m.percent_of_floor for m in metrics}
    return Table(
        title=f"Bytes that must move a second, on {where}",
        header=("way", "GB/s", "copy, GB/s"),
        rows=tuple(
            (name, f"{share / 100 * peaks.bytes / 1e9:.3g}", f"{peaks.bytes / 1e9:.3g}")
            for name, share in reached.items()
            if share is not None
        ),
    )


def _pooled_peaks(values: NDArray[np.float32], config: PeakConfig) -> NDArray[np.int64]:
    """The released code's steps: max pooling of every pixel, then the highest candidates."""
    kernel = config.kernel_size
    pooled = F.max_pool2d(torch.from_numpy(values)[None], kernel, 1, kernel // 2)[0].numpy()
    return highest_apart(values, values == pooled, config)


def _filtered_peaks(values: NDArray[np.float32], config: PeakConfig) -> NDArray[np.int64]:
    maxima = ndimage.maximum_filter(values, config.kernel_size, mode="constant", cval=-np.inf)
    return highest_apart(values, values == maxima, config)


def _check_peaks(
    nodes: NDArray[np.float32],
    normalized: NDArray[np.float32],
    expected: list[NDArray[np.int64]],
    rules: list[PeakConfig],
) -> None:
    """Raise unless the ways that are timed find the same peaks; max pooling on a few maps."""
    for i in (0, _NUM_CAM):
        (torchs,) = torch_peaks(torch.from_numpy(nodes[i : i + 1]), rules[i])
        if not np.array_equal(torchs, expected[i]):
            raise RuntimeError(f"map {i}: PyTorch's peaks are {torchs}, ours {expected[i]}")
    for i, (values, rule) in enumerate(zip(normalized, rules, strict=True)):
        ways = (_filtered_peaks, _pooled_peaks) if i in (0, _NUM_CAM) else (_filtered_peaks,)
        for way in ways:
            if not np.array_equal(way(values, rule), expected[i]):
                raise RuntimeError(f"map {i}: {way.__name__} differs")


def _cpu_metrics(config: PromptKernelsConfig, peaks: Peaks) -> list[Metric]:
    """Milliseconds of one thread; the last three are of one map."""
    image, batch = map_batch(1), map_batch(32)
    nodes = host_array("maps", image.maps)[0]
    rules = [_CONFIG.cam_peaks] * _NUM_CAM + [_CONFIG.cross_peaks] * _NUM_CROSS
    found = batch_peaks(
        image, cam_peaks=_CONFIG.cam_peaks, cross_peaks=_CONFIG.cross_peaks,
        find_peaks=low_res_peaks,
    )  # fmt: skip
    normalized = normalized_maps(nodes, _IMAGE_SIZE)
    _check_peaks(nodes, normalized, [one.points for one in found], rules)
    cross, few = normalized[_NUM_CAM:], range(0, _NUM_CROSS, 6)
    all_nodes = host_array("maps", batch.maps)[0]
    timed = partial(in_turns, samples=config.samples, clock=time.process_time)
    many, corners, one = timed(
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
    many = _with_floor(many, _bytes_that_must_move(batch), peaks)
    one = _with_floor(one, _bytes_that_must_move(image), peaks)
    replaced = [per_item(upsample, _NUM_MAPS), per_item(filtering, len(few)), *pooling]
    return [many, corners, one, *replaced]


def _cpu_notes(metrics: list[Metric]) -> list[str]:
    medians = {metric.name: float(np.median(metric.samples)) for metric in metrics}
    ours = medians[IMAGE] / _NUM_MAPS
    return [
        "The CPU's times are those of one thread; what else the machine did does not count.",
        f"A map of one image, clustering and packing included, takes {ours:.3f} ms.",
        *(f"{way}: {medians[way] / ours:.3g} times that." for way in (UPSAMPLE, FILTER, POOLING)),
    ]


def _scored_boxes() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]:
    """Boxes [n, 4] with integer corners, whose overlaps no way rounds differently, scores [n] and
    labels [n].
    """
    rng = np.random.default_rng(0)
    low = rng.integers(0, 300, (_NUM_BOXES, 2))
    boxes = np.concatenate([low, low + rng.integers(20, 120, (_NUM_BOXES, 2))], axis=1)
    scores = rng.permutation(_NUM_BOXES).astype(np.float32) / _NUM_BOXES
    labels = rng.integers(0, _NUM_CLASSES, _NUM_BOXES).astype(np.int32)
    return boxes.astype(np.float32), scores, labels


def _nms_bytes(num_kept: int) -> int:
    """Boxes, scores and labels once, and an index of each box that stays."""
    return sum(array.nbytes for array in _scored_boxes()) + 8 * num_kept


def cpu_nms_metrics(config: PromptKernelsConfig, peaks: Peaks) -> list[Metric]:
    """Milliseconds of one thread; raises where the two keep other boxes."""
    boxes = _scored_boxes()
    tensors = [torch.from_numpy(array) for array in boxes]
    ours = partial(class_nms, *boxes, iou_thresh=_NMS_THRESH, backend="reference")
    theirs = partial(batched_nms, *tensors, _NMS_THRESH)
    kept = ours()
    if not np.array_equal(kept, theirs().numpy()):
        raise RuntimeError(f"{NMS}: torchvision keeps other boxes than NumPy")
    metrics = in_turns(
        {NUMPY: ours, TORCHVISION: theirs},
        repeats=config.repeats, samples=config.samples, kind=NMS, clock=time.process_time,
    )  # fmt: skip
    return [_with_floor(metric, _nms_bytes(len(kept)), peaks) for metric in metrics]


def _torch_candidates(maps: Tensor, rule: PeakConfig) -> tuple[Tensor, Tensor]:
    """The released steps on m maps [m, h, w], where they lie: interpolate, max pooling, top-k.

    Returns:
        Scores and flat pixel positions [m, candidates], best first; a score of 0 is none.
    """
    full = F.interpolate(maps[None], _IMAGE_SIZE, mode="bilinear", align_corners=False)[0]
    low, high = full.amin((1, 2), keepdim=True), full.amax((1, 2), keepdim=True)
    values = (full - low) / (high - low + 1e-8)
    pooled = F.max_pool2d(values[:, None], rule.kernel_size, 1, rule.kernel_size // 2)[:, 0]
    found = torch.where((values == pooled) & (values >= rule.value_thresh), values, 0)
    flat = found.flatten(1)
    # At the image's edges values repeat, and of equal ones top-k takes any; the first is wanted.
    # Scores are at least 0, so their bits have their order.
    keys = (flat.view(torch.int32).long() << 32) - torch.arange(flat.shape[1], device=flat.device)
    positions = keys.topk(rule.max_candidates).indices
    return flat.gather(1, positions), positions


def torch_peaks(maps: Tensor, rule: PeakConfig) -> list[NDArray[np.int64]]:
    """The candidates that keep their distance, [n, 2], (x, y), of each map; on the host."""
    distance = (rule.kernel_size - 1) // 2
    found = []
    for scores, positions in zip(*_torch_candidates(maps, rule), strict=True):
        kept: list[tuple[int, int]] = []
        for score, position in zip(scores.tolist(), positions.tolist(), strict=True):
            y, x = divmod(position, _IMAGE_SIZE[1])
            if score > 0 and all(abs(x - a) + abs(y - b) >= distance for a, b in kept):
                kept.append((x, y))
        found.append(np.array(kept, np.int64).reshape(-1, 2))
    return found


def _torch_batch(images: Sequence[Tensor]) -> None:
    """Candidates of all maps of all images, each [maps, h, w]."""
    for maps in images:
        _torch_candidates(maps[:_NUM_CAM], _CONFIG.cam_peaks)
        _torch_candidates(maps[_NUM_CAM:], _CONFIG.cross_peaks)


def _torch_differences(batch: MapBatch) -> str:
    """In how many maps PyTorch finds other peaks on the GPU than NumPy."""
    expected = batch_peaks(
        batch, cam_peaks=_CONFIG.cam_peaks, cross_peaks=_CONFIG.cross_peaks,
        find_peaks=low_res_peaks,
    )  # fmt: skip
    found = [
        points
        for maps in _on_gpu(batch)
        for part, rule in (
            (maps[:_NUM_CAM], _CONFIG.cam_peaks),
            (maps[_NUM_CAM:], _CONFIG.cross_peaks),
        )
        for points in torch_peaks(part, rule)
    ]
    differing = sum(
        not np.array_equal(points, peaks.points)
        for points, peaks in zip(found, expected, strict=True)
    )
    return f"PyTorch on the GPU finds other peaks than NumPy in {differing} of {len(found)} maps."


def _on_gpu(batch: MapBatch) -> tuple[Tensor, ...]:
    return torch.from_numpy(host_array("maps", batch.maps)[0]).cuda().split(_NUM_MAPS)


Times = dict[str, list[tuple[float, ...]]]
"""Microseconds by way and repeat."""


def _gpu_metrics(config: PromptKernelsConfig, peaks: Peaks) -> list[Metric]:
    """Microseconds of a batch when many are on the stream; kernels and PyTorch in blocks of their
    own, for the executor's context is current in its block.
    """
    # Imported here: it looks for a driver.
    from weaksam_rt.prompt_clustering._cuda import CudaExecutor

    executor = CudaExecutor()
    metrics = []
    for num_images in (1, 8, 64):
        batch = map_batch(num_images)
        times, outputs = kernel_times(executor, plan_prompts(batch, _CONFIG), config)
        ours = read_prompts(outputs, full_capacity(batch, _CONFIG))
        if not np.array_equal(ours.sam_points, prompt_batch(batch, _CONFIG).sam_points):
            raise RuntimeError(f"{num_images} images: the kernels differ from NumPy")
        theirs = partial(_torch_batch, _on_gpu(batch))
        times["PyTorch, without distances and clustering"] = _torch_times(theirs, config, 1)
        metrics += _gpu_metric(f"{num_images} images", times, _bytes_that_must_move(batch), peaks)
    boxes = _scored_boxes()
    times, outputs = kernel_times(executor, plan_nms(*boxes, _NMS_THRESH), config)
    kept = read_nms(outputs)
    if not np.array_equal(kept, class_nms(*boxes, iou_thresh=_NMS_THRESH, backend="reference")):
        raise RuntimeError(f"{NMS}: the kernels differ from NumPy")
    tensors = [torch.from_numpy(array).cuda() for array in boxes]
    theirs = partial(batched_nms, *tensors, _NMS_THRESH)
    times[TORCHVISION] = _torch_times(theirs, config, config.launches)
    return [*metrics, *_gpu_metric(NMS, times, _nms_bytes(len(kept)), peaks)]


def _gpu_metric(what: str, times: Times, num_bytes: int, peaks: Peaks) -> list[Metric]:
    return [
        _with_floor(
            Metric(name=f"on the GPU, {what}: {way}", unit="us", repeats=tuple(blocks)),
            num_bytes,
            peaks,
        )
        for way, blocks in times.items()
    ]


def kernel_times(
    executor: "CudaExecutor", plan: Plan, config: PromptKernelsConfig
) -> tuple[Times, dict[str, NDArray[Any]]]:
    """Times of a plan whose inputs are on the GPU, launched one by one and as a graph, in turns;
    and its outputs.
    """
    times: Times = {"kernels": [], "graph": []}
    with executor.loaded(plan) as loaded:
        for _ in range(config.repeats):
            for way, launch in (("kernels", loaded.launch), ("graph", loaded.launch_graph)):
                block = [
                    _launch_us(launch, executor.synchronize, config.launches)
                    for _ in range(config.samples)
                ]
                times[way].append(tuple(block))
        return times, loaded.outputs()


def _torch_times(
    work: Callable[[], object], config: PromptKernelsConfig, launches: int
) -> list[tuple[float, ...]]:
    return [
        tuple(_launch_us(work, torch.cuda.synchronize, launches) for _ in range(config.samples))
        for _ in range(config.repeats)
    ]


def _launch_us(
    launch: Callable[[], object], synchronize: Callable[[], None], launches: int
) -> float:
    """Time of a batch when many are on the stream; the host's part hides where it is shorter."""
    launch()
    synchronize()
    start = time.perf_counter()
    for _ in range(launches):
        launch()
    synchronize()
    return (time.perf_counter() - start) / launches * 1e6


if __name__ == "__main__":
    enter(main)
