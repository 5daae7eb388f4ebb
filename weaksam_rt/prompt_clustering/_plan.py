"""Which kernels run, on what, in which order: pure values, the same on a GPU and on a CPU.

A plan is made before anything is launched, from shapes that the host knows. Its launches follow
each other on one stream; no stage waits for the host.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike, NDArray

from weaksam_rt.class_activation_map import PeakConfig
from weaksam_rt.errors import InferenceError
from weaksam_rt.preprocessing import AxisSamples, ModelFrame, axis_samples
from weaksam_rt.prompt_clustering._reference import NUM_STARTS
from weaksam_rt.prompt_clustering.batch import EncodedMasks, MapBatch, MaskSummary, PromptBatch
from weaksam_rt.prompt_clustering.config import ClusteringConfig
from weaksam_rt.prompt_clustering.device_arrays import AnyArray, host_array
from weaksam_rt.types import PointPrompts, PromptSource

AXIS_SAMPLE = np.dtype([("low", np.int32), ("weight", np.float32)])
PEAK_RULE = np.dtype(
    [
        ("kernel_size", np.int32),
        ("value_thresh", np.float32),
        ("max_candidates", np.int32),
        ("is_l2", np.int32),
    ]
)
BATCH_COUNTS = np.dtype([("points", np.int32), ("prompts", np.int32), ("sam_points", np.int32)])
FRAME_SCALE = np.dtype([("x", np.float64), ("y", np.float64)])
MASK_FRAME = np.dtype(
    [
        (name, np.int32)
        for name in ("valid_height", "valid_width", "model_size", "image_height", "image_width")
    ]
)
MAX_MAP_SIDE = 64
"""Sides of a low-resolution map; a whole map lies in a GPU block's shared memory."""
_THREADS = 256
_MAX_BLOCKS_OF_MASK = 64
_MAX_SAM_POINTS = 2**30 - 1
"""The kernels count coordinates of points in 32 bits."""
_CONFLICT_BYTES = 32 * 2**20
"""Of the part of the matrix of overlaps that is in memory at a time."""
_POINT_OUTPUTS = ("points", "scores", "class_ids", "sources")
_SAM_OUTPUTS = ("point_offsets", "sam_points", "sam_labels", "sam_offsets", "image_index")
_CACHED_PROGRAMS = 64
"""Of each kind; a service sees few shapes again and again."""

Argument = str | tuple[str, ...] | np.generic | NDArray[Any]
"""A buffer by name, a struct of buffers by their names, or a value: a scalar or a 0-d record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Buffer:
    """Memory that kernels share, uninitialised at first."""

    shape: tuple[int, ...]
    dtype: DTypeLike

    @property
    def num_bytes(self) -> int:
        """Of all elements."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One kernel call."""

    kernel: str
    grid: tuple[int, int]
    arguments: tuple[Argument, ...]
    threads: int = _THREADS
    shared_bytes: int = 0
    """Dynamic shared memory of a block."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """What shapes alone decide. The same shapes give the same object, for which an executor may
    keep what it prepared.
    """

    buffers: Mapping[str, Buffer]
    launches: tuple[Launch, ...]
    outputs: tuple[str, ...]
    """What is read back; other buffers stay where they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A program and what it works on."""

    program: Program
    inputs: Mapping[str, AnyArray]
    """In host memory, or where their owner has them on the GPU."""


class KernelLimitError(ValueError):
    """The kernels do not take what the definition would."""


@runtime_checkable
class Executor(Protocol):
    """Runs plans somewhere."""

    def run(self, plan: Plan) -> dict[str, NDArray[Any]]:
        """The plan's outputs, after all launches."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptCapacity:
    """Room in the output buffers of a batch."""

    points: int
    """Point prompts."""
    prompts: int
    """SAM's prompts."""
    sam_points: int
    """Points of SAM's prompts, padding included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _PromptShape:
    """All that the program of a batch depends on."""

    num_passes: int
    num_maps: int
    rows: int
    columns: int
    num_images: int
    num_samples: int
    """Sum of the images' sides."""
    cluster_points: int
    """Cross-attention peaks that the batch can have."""
    per_map: int
    """Peaks that a map can have."""
    mirrored_bits: int
    points_per_cluster: int
    room: PromptCapacity
    with_sam: bool


def full_capacity(batch: MapBatch, config: ClusteringConfig) -> PromptCapacity:
    """Room for all that the maps of a batch can give."""
    areas = np.array([f.image_size[0] * f.image_size[1] for f in batch.frames], np.int64)
    is_cross = batch.map_sources == PromptSource.CROSS
    candidates = np.where(
        is_cross, config.cross_peaks.max_candidates, config.cam_peaks.max_candidates
    )
    most = np.minimum(candidates, areas[batch.map_images])
    pooled = np.zeros(batch.num_images, np.int64)
    np.add.at(pooled, batch.map_images[is_cross], most[is_cross])
    centres = np.where(pooled > 0, np.maximum(1, pooled // config.points_per_cluster), 0)
    num_cams, cam_points = int((~is_cross).sum()), int(most[~is_cross].sum())
    points = cam_points + int(centres.sum())
    # A coarse or fine map gives at most one prompt of its points together.
    return PromptCapacity(
        points=points, prompts=points + num_cams, sam_points=2 * points + cam_points + num_cams
    )


def plan_prompts(
    batch: MapBatch,
    config: ClusteringConfig,
    *,
    capacity: PromptCapacity | None = None,
    with_sam: bool = True,
) -> Plan:
    """Maps of a batch to packed prompts.

    Args:
        batch: At least one map.
        config: Windows, thresholds, cluster size.
        capacity: Room for the results; by default enough for any.
        with_sam: Whether SAM's prompts are read back, not the point prompts alone.

    Raises:
        KernelLimitError: The maps are too large for the kernels, or too many.
    """
    num_passes, num_maps, rows, columns = batch.maps.shape
    room = capacity or full_capacity(batch, config)
    _check_limits(rows, columns, room)
    most_pixels = max(frame.image_size[0] * frame.image_size[1] for frame in batch.frames)
    candidates = max(config.cam_peaks.max_candidates, config.cross_peaks.max_candidates)
    per_map = min(candidates, most_pixels)
    inputs = _prompt_inputs(batch, config, per_map)
    shape = _PromptShape(
        num_passes=num_passes,
        num_maps=num_maps,
        rows=rows,
        columns=columns,
        num_images=batch.num_images,
        num_samples=sum(sum(frame.image_size) for frame in batch.frames),
        cluster_points=int(host_array("point_starts", inputs["point_starts"])[-1]),
        per_map=per_map,
        mirrored_bits=sum(1 << p for p in set(batch.mirrored_passes)),
        points_per_cluster=config.points_per_cluster,
        room=room,
        with_sam=with_sam,
    )
    return Plan(program=_prompt_program(shape), inputs=inputs)


def _check_limits(rows: int, columns: int, room: PromptCapacity) -> None:
    if max(rows, columns) > MAX_MAP_SIDE:
        raise KernelLimitError(
            f"maps must be at most {MAX_MAP_SIDE} a side for the kernels, got {rows}x{columns}: "
            "use the backend 'reference', or smaller maps"
        )
    if room.sam_points > _MAX_SAM_POINTS:
        raise KernelLimitError(
            f"the batch may have {room.sam_points} points of SAM's prompts, the kernels count "
            f"{_MAX_SAM_POINTS}: send fewer images or lower max_candidates"
        )


@lru_cache(maxsize=_CACHED_PROGRAMS)
def _prompt_program(shape: _PromptShape) -> Program:
    grid_size = (np.int32(shape.rows), np.int32(shape.columns))
    per_map, room = np.int32(shape.per_map), shape.room
    peaks = ("peak_xy", "peak_scores", "peak_counts")
    scratch = tuple(
        f"cluster_{n}" for n in ("xy", "assigned", "nearest", "potentials", "counts", "sums")
    )
    images, maps = (shape.num_images, 1), (shape.num_maps, 1)
    launches = (
        Launch(
            kernel="axis_tables",
            grid=(shape.num_images, 2),
            arguments=("image_sizes", "sample_starts", *grid_size, "samples", "cell_starts"),
        ),
        Launch(
            kernel="find_peaks",
            grid=maps,
            shared_bytes=16 * shape.rows * shape.columns,
            arguments=(
                "maps", np.int32(shape.num_passes), np.uint32(shape.mirrored_bits),
                np.int32(shape.num_maps), *grid_size, "map_images", "map_rules", "rules",
                "image_sizes", "sample_starts", "samples", "cell_starts", per_map, *peaks,
            ),
        ),
        Launch(
            kernel="cluster_peaks",
            grid=(shape.num_images, NUM_STARTS),
            arguments=(
                "map_starts", "map_sources", "peak_xy", "peak_counts", per_map,
                np.int32(shape.points_per_cluster), "point_starts", *scratch, "cluster_means",
                "centre_counts", "tightness",
            ),
        ),
        Launch(
            kernel="choose_clusters",
            grid=images,
            arguments=("point_starts", "cluster_means", "centre_counts", "tightness", "centres"),
        ),
        Launch(
            kernel="count_prompts",
            grid=images,
            arguments=(
                "map_starts", "map_sources", "peak_counts", "centre_counts", "image_counts"
            ),
        ),
        Launch(
            kernel="pack_prompts",
            grid=images,
            arguments=(
                "map_starts", "map_sources", "map_classes", *peaks, per_map,
                "point_starts", "centres", "centre_counts", "image_counts", "frame_scales",
                np.array((room.points, room.prompts, room.sam_points), BATCH_COUNTS),
                (*_POINT_OUTPUTS, *_SAM_OUTPUTS), "totals",
            ),
        ),
    )  # fmt: skip
    return Program(
        buffers=_prompt_buffers(shape),
        launches=launches,
        outputs=(*_POINT_OUTPUTS, *(_SAM_OUTPUTS if shape.with_sam else ()), "totals"),
    )


def _prompt_inputs(batch: MapBatch, config: ClusteringConfig, per_map: int) -> dict[str, AnyArray]:
    sizes = np.array([frame.image_size for frame in batch.frames], np.int32)
    is_cross = batch.map_sources == PromptSource.CROSS
    cross_of_image = np.bincount(batch.map_images[is_cross], minlength=batch.num_images)
    return {
        "maps": batch.maps,
        "map_images": batch.map_images,
        "map_sources": batch.map_sources,
        "map_classes": batch.map_classes,
        "map_starts": _starts(np.bincount(batch.map_images, minlength=batch.num_images)),
        "map_rules": is_cross.astype(np.int32),
        "rules": np.array([_rule(config.cam_peaks), _rule(config.cross_peaks)], PEAK_RULE),
        "image_sizes": sizes,
        "sample_starts": _starts(sizes.ravel())[:-1],
        "point_starts": _starts(cross_of_image * per_map),
        "frame_scales": np.array([_scale(frame) for frame in batch.frames], FRAME_SCALE),
    }


def _prompt_buffers(shape: _PromptShape) -> dict[str, Buffer]:
    num_maps, num_images, room = shape.num_maps, shape.num_images, shape.room
    of_starts = NUM_STARTS * shape.cluster_points

    def ints(*shape: int) -> Buffer:
        return Buffer(shape=shape, dtype=np.int32)

    def floats(*shape: int) -> Buffer:
        return Buffer(shape=shape, dtype=np.float32)

    return {
        "samples": Buffer(shape=(shape.num_samples,), dtype=AXIS_SAMPLE),
        "cell_starts": ints(num_images, shape.rows + shape.columns + 2),
        "peak_xy": ints(num_maps, shape.per_map, 2),
        "peak_scores": floats(num_maps, shape.per_map),
        "peak_counts": ints(num_maps),
        "cluster_xy": ints(of_starts, 2),
        "cluster_assigned": ints(of_starts),
        "cluster_nearest": Buffer(shape=(of_starts,), dtype=np.uint32),
        "cluster_potentials": Buffer(shape=(of_starts,), dtype=np.uint64),
        "cluster_counts": ints(of_starts),
        "cluster_sums": Buffer(shape=(of_starts, 2), dtype=np.uint64),
        "cluster_means": Buffer(shape=(of_starts, 2), dtype=np.float64),
        "tightness": Buffer(shape=(num_images, NUM_STARTS), dtype=np.float64),
        "centres": ints(shape.cluster_points, 2),
        "centre_counts": ints(num_images),
        "image_counts": Buffer(shape=(num_images,), dtype=BATCH_COUNTS),
        "points": floats(room.points, 2),
        "scores": floats(room.points),
        "class_ids": ints(room.points),
        "sources": ints(room.points),
        "point_offsets": ints(num_images + 1),
        "sam_points": floats(room.sam_points, 2),
        "sam_labels": ints(room.sam_points),
        "sam_offsets": ints(room.prompts + 1),
        "image_index": ints(room.prompts),
        "totals": Buffer(shape=(1,), dtype=BATCH_COUNTS),
    }


def _starts(counts: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
    total = int(counts.sum(dtype=np.int64))
    if total > np.iinfo(np.int32).max:
        raise KernelLimitError(
            f"the batch is too large: {total} entries where 2147483647 can be counted: send fewer "
            "images"
        )
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _rule(config: PeakConfig) -> tuple[int, float, int, int]:
    is_l2 = int(config.distance == "l2")
    return config.kernel_size, config.value_thresh, config.max_candidates, is_l2


def _scale(frame: ModelFrame) -> tuple[float, float]:
    return (
        frame.valid_size[1] / frame.image_size[1],
        frame.valid_size[0] / frame.image_size[0],
    )


def read_prompts(outputs: Mapping[str, NDArray[Any]], capacity: PromptCapacity) -> PromptBatch:
    """The prompts that a plan's launches left in its outputs.

    Raises:
        InferenceError: They did not fit; nothing of them was written.
    """
    prompts = read_points(outputs, capacity)
    needed = outputs["totals"][0]
    num_prompts, num_sam_points = int(needed["prompts"]), int(needed["sam_points"])
    return PromptBatch(
        prompts=prompts,
        point_offsets=outputs["point_offsets"],
        sam_points=outputs["sam_points"][:num_sam_points],
        sam_labels=outputs["sam_labels"][:num_sam_points],
        sam_offsets=outputs["sam_offsets"][: num_prompts + 1],
        image_index=outputs["image_index"][:num_prompts],
    )


def read_points(outputs: Mapping[str, NDArray[Any]], capacity: PromptCapacity) -> PointPrompts:
    """The point prompts alone; see ``read_prompts``."""
    needed = outputs["totals"][0]
    for name in ("points", "prompts", "sam_points"):
        room = getattr(capacity, name)
        if needed[name] > room:
            raise InferenceError(
                f"the batch has {needed[name]} {name}, the buffer holds {room}: give the plan a "
                "larger capacity, or none, which is room for all"
            )
    return PointPrompts(**{n: outputs[n][: int(needed["points"])] for n in _POINT_OUTPUTS})


def plan_mask_summary(
    logits: AnyArray, mask_images: NDArray[np.int32], frames: Sequence[ModelFrame]
) -> Plan:
    """Boxes, stability scores and areas of n >= 1 masks."""
    return Plan(
        program=_summary_program(*logits.shape[:2]),
        inputs={"logits": logits, "mask_images": mask_images, "frames": _mask_frames(frames)},
    )


@lru_cache(maxsize=_CACHED_PROGRAMS)
def _summary_program(num_masks: int, side: int) -> Program:
    outputs = ("boxes", "stability", "areas")
    return Program(
        buffers={
            "boxes": Buffer(shape=(num_masks, 4), dtype=np.float32),
            "stability": Buffer(shape=(num_masks,), dtype=np.float32),
            "areas": Buffer(shape=(num_masks,), dtype=np.float32),
        },
        launches=(
            Launch(
                kernel="summarize_masks",
                grid=(num_masks, 1),
                shared_bytes=8 * side,
                arguments=("logits", np.int32(side), "mask_images", "frames", *outputs),
            ),
        ),
        outputs=outputs,
    )


def read_mask_summary(outputs: Mapping[str, NDArray[Any]]) -> MaskSummary:
    """The summary that ``plan_mask_summary`` leaves."""
    return MaskSummary(
        boxes=outputs["boxes"], stability=outputs["stability"], areas=outputs["areas"]
    )


def _mask_frames(frames: Sequence[ModelFrame]) -> NDArray[Any]:
    return np.array([(*f.valid_size, f.model_size, *f.image_size) for f in frames], MASK_FRAME)


def plan_mask_encoding(
    logits: AnyArray,
    mask_images: NDArray[np.int32],
    frames: Sequence[ModelFrame],
    *,
    run_capacity: int,
    with_bits: bool = True,
) -> Plan:
    """Bits and run lengths of n >= 1 masks; all frames have one model size.

    Args:
        logits: [n, m, m].
        mask_images: [n].
        frames: Of the images.
        run_capacity: Room for the runs of all masks.
        with_bits: Whether the bits are read back too.
    """
    num_masks, side = logits.shape[:2]
    areas = np.array([f.image_size[0] * f.image_size[1] for f in frames], np.int64)
    words = -(-areas[mask_images] // 32)
    axes = [
        axis_samples(full, valid)
        for frame in frames
        for full, valid in zip(frame.image_size, frame.valid_size, strict=True)
    ]
    return Plan(
        program=_encoding_program(
            num_masks,
            side,
            num_words=int(words.sum()),
            blocks=min(_MAX_BLOCKS_OF_MASK, -(-int(words.max()) // _THREADS)),
            run_capacity=run_capacity,
            with_bits=with_bits,
        ),
        inputs={
            "logits": logits,
            "mask_images": mask_images,
            "frames": _mask_frames(frames),
            "to_frame": _axis_table([axis_samples(frames[0].model_size, side)]),
            "to_image": _axis_table(axes),
            "sample_starts": _starts(np.array([len(axis.low) for axis in axes]))[:-1],
            "word_offsets": _starts(words),
        },
    )


@lru_cache(maxsize=_CACHED_PROGRAMS)
def _encoding_program(
    num_masks: int, side: int, *, num_words: int, blocks: int, run_capacity: int, with_bits: bool
) -> Program:
    """``blocks`` share a mask."""
    of_masks = ("mask_images", "frames", "word_offsets", "bits")
    return Program(
        buffers={
            "bits": Buffer(shape=(num_words,), dtype=np.uint32),
            "run_counts": Buffer(shape=(num_masks,), dtype=np.int32),
            "runs": Buffer(shape=(run_capacity,), dtype=np.int32),
            "run_offsets": Buffer(shape=(num_masks + 1,), dtype=np.int32),
        },
        launches=(
            Launch(
                kernel="pack_masks",
                grid=(num_masks, blocks),
                arguments=(
                    "logits", np.int32(side), "mask_images", "frames", "to_frame", "to_image",
                    "sample_starts", "word_offsets", "bits",
                ),
            ),
            Launch(kernel="count_runs", grid=(num_masks, 1), arguments=(*of_masks, "run_counts")),
            Launch(
                kernel="write_runs",
                grid=(num_masks, 1),
                shared_bytes=8 * _THREADS,
                arguments=(
                    *of_masks, "run_counts", np.int32(run_capacity), "runs", "run_offsets"
                ),
            ),
        ),
        outputs=(*(("bits",) if with_bits else ()), "runs", "run_offsets"),
    )  # fmt: skip


def _axis_table(axes: Sequence[AxisSamples]) -> NDArray[Any]:
    table = np.empty(sum(len(axis.low) for axis in axes), AXIS_SAMPLE)
    table["low"] = np.concatenate([axis.low for axis in axes])
    table["weight"] = np.concatenate([axis.weight for axis in axes])
    return table


def read_mask_encoding(plan: Plan, outputs: Mapping[str, NDArray[Any]]) -> EncodedMasks:
    """The masks that ``plan_mask_encoding`` leaves.

    Raises:
        InferenceError: The runs did not fit; none was returned.
    """
    needed, room = int(outputs["run_offsets"][-1]), len(outputs["runs"])
    if needed > room:
        raise InferenceError(f"the masks have {needed} runs, the buffer holds {room}")
    return EncodedMasks(
        bits=outputs.get("bits"),
        word_offsets=host_array("word_offsets", plan.inputs["word_offsets"]),
        runs=outputs["runs"][:needed],
        run_offsets=outputs["run_offsets"],
    )


def plan_nms(
    boxes: AnyArray,
    scores: AnyArray,
    labels: AnyArray,
    iou_thresh: float,
    *,
    conflict_bytes: int = _CONFLICT_BYTES,
) -> Plan:
    """Suppression within each label of n >= 1 boxes, with so much memory for their overlaps."""
    return Plan(
        program=_nms_program(len(boxes), iou_thresh, conflict_bytes),
        inputs={"boxes": boxes, "scores": scores, "labels": labels},
    )


@lru_cache(maxsize=_CACHED_PROGRAMS)
def _nms_program(num_boxes: int, iou_thresh: float, conflict_bytes: int) -> Program:
    num_words = -(-num_boxes // 64)
    part = min(num_boxes, max(1, conflict_bytes // (8 * num_words)))
    launches = [
        Launch(
            kernel="nms_order",
            grid=(-(-num_boxes // _THREADS), 1),
            arguments=("scores", np.int32(num_boxes), "order"),
        )
    ]
    for first in range(0, num_boxes, part):
        launches += _nms_part(num_boxes, first, min(part, num_boxes - first), iou_thresh)
    return Program(
        buffers={
            "order": Buffer(shape=(num_boxes,), dtype=np.int32),
            "conflicts": Buffer(shape=(part, num_words), dtype=np.uint64),
            "suppressed": Buffer(shape=(num_words,), dtype=np.uint64),
            "kept": Buffer(shape=(num_boxes,), dtype=np.int32),
            "num_kept": Buffer(shape=(1,), dtype=np.int32),
        },
        launches=tuple(launches),
        outputs=("kept", "num_kept"),
    )


def _nms_part(num_boxes: int, first: int, num_rows: int, iou_thresh: float) -> list[Launch]:
    """Rows [first, first + num_rows) of the matrix of overlaps: made, then walked."""
    num_words = -(-num_boxes // 64)
    rows = (np.int32(num_boxes), np.int32(first), np.int32(num_rows))
    return [
        Launch(
            kernel="nms_conflicts",
            grid=(-(-num_rows * num_words // _THREADS), 1),
            arguments=("boxes", "labels", "order", *rows, np.float32(iou_thresh), "conflicts"),
        ),
        Launch(
            kernel="nms_select",
            grid=(1, 1),
            shared_bytes=8 * num_words,
            arguments=("order", "conflicts", *rows, "suppressed", "kept", "num_kept"),
        ),
    ]


def read_nms(outputs: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    """Indices of the kept boxes, best first."""
    return outputs["kept"][: int(outputs["num_kept"][0])].astype(np.int64)
