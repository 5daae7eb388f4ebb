"""From activation maps to packed prompts, and from mask logits to boxes, in NumPy: the definition
that every faster implementation must repeat.

Integers and selections are repeated exactly. So are the floats of maps and peaks, because each
operation is a float32 operation of its own; boxes of masks agree to a tolerance.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.boxes import Boxes, batched_nms
from weaksam_rt.class_activation_map import PeakConfig, Peaks, normalize_maps, peak_points
from weaksam_rt.masks import MASK_THRESHOLD, boxes_from_logits, low_res_stability
from weaksam_rt.preprocessing import ModelFrame, upsample_maps
from weaksam_rt.prompt_clustering.batch import MapBatch, MaskSummary, PromptBatch
from weaksam_rt.prompts import SamPrompt, class_prompts, sam_prompts
from weaksam_rt.types import NO_CLASS, ImageSize, PointPrompts, PromptSource

_LOGIT_LIMIT = 1e30
PeakFinder = Callable[[NDArray[np.float32], ImageSize, PeakConfig], list[Peaks]]
"""Peaks of each of m low-resolution maps [m, h, w]."""

_MAX_ITERATIONS = 300


def sum_passes(
    maps: NDArray[np.float32], mirrored_passes: Sequence[int] = ()
) -> NDArray[np.float32]:
    """Sum over passes, in their order, of [passes, ..., h, w]; mirrored ones are turned back."""
    turned = [m[..., ::-1] if p in mirrored_passes else m for p, m in enumerate(maps)]
    total = turned[0].copy()
    with np.errstate(over="ignore", invalid="ignore"):
        for addend in turned[1:]:
            total += addend
    return total


def is_usable(nodes: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which maps of [..., h, w] have finite values only, with finite differences."""
    with np.errstate(over="ignore", invalid="ignore"):
        span = nodes.max(axis=(-2, -1)) - nodes.min(axis=(-2, -1))
    return np.isfinite(nodes).all(axis=(-2, -1)) & np.isfinite(span)


def normalized_maps(nodes: NDArray[np.float32], image_size: ImageSize) -> NDArray[np.float32]:
    """Maps [..., h, w] at image resolution, each normalised to [0, 1]; unusable maps are all 0."""
    finite = np.where(is_usable(nodes)[..., None, None], nodes, np.float32(0))
    return normalize_maps(upsample_maps(finite, image_size))


def map_peaks(nodes: NDArray[np.float32], image_size: ImageSize, config: PeakConfig) -> list[Peaks]:
    """The peaks of each of m low-resolution maps [m, h, w]."""
    # One map at a time: full maps of a batch need much memory.
    return [peak_points(normalized_maps(m[None], image_size)[0], config) for m in nodes]


def cluster_points(points: NDArray[np.int64], points_per_cluster: int) -> NDArray[np.int64]:
    """Centres of max(1, n // points_per_cluster) clusters of n points; none of none."""
    if len(points) == 0:
        return points
    return kmeans(points, max(1, len(points) // points_per_cluster))


def batch_peaks(
    batch: MapBatch,
    *,
    cam_peaks: PeakConfig,
    cross_peaks: PeakConfig,
    find_peaks: PeakFinder = map_peaks,
) -> list[Peaks]:
    """Peaks of each map of a batch; those of one rule and image size are searched together.

    Args:
        batch: Maps of several images.
        cam_peaks: Rule of coarse and fine maps.
        cross_peaks: Rule of cross-attention maps.
        find_peaks: ``map_peaks``, or a faster one.
    """
    nodes = sum_passes(batch.maps, batch.mirrored_passes)
    is_cross = (batch.map_sources == PromptSource.CROSS).tolist()
    groups = defaultdict(list)
    for position, (image, cross) in enumerate(zip(batch.map_images, is_cross, strict=True)):
        groups[batch.frames[image].image_size, cross].append(position)
    found = {
        position: peaks
        for (size, cross), members in groups.items()
        for position, peaks in zip(
            members,
            find_peaks(nodes[members], size, cross_peaks if cross else cam_peaks),
            strict=True,
        )
    }
    return [found[position] for position in range(len(is_cross))]


def image_prompts(
    batch: MapBatch, image: int, peaks: Sequence[Peaks], points_per_cluster: int
) -> PointPrompts:
    """Point prompts of one image of a batch, from the peaks of all the batch's maps."""
    start, stop = np.searchsorted(batch.map_images, [image, image + 1])
    parts, pooled = [], [np.zeros((0, 2), np.int64)]
    for found, class_id, source in zip(
        peaks[start:stop],
        batch.map_classes[start:stop].tolist(),
        batch.map_sources[start:stop].tolist(),
        strict=True,
    ):
        if source == PromptSource.CROSS:
            pooled.append(found.points)
        elif len(found.points):
            of_map = PromptSource(source)
            parts.append(
                point_prompts(found.points, found.scores, class_id=class_id, source=of_map)
            )
    centres = cluster_points(np.concatenate(pooled), points_per_cluster)
    ones = np.ones(len(centres), np.float32)
    parts.append(point_prompts(centres, ones, class_id=NO_CLASS, source=PromptSource.CROSS))
    return PointPrompts.concatenate(parts)


def point_prompts(
    points: NDArray[np.int64], scores: NDArray[np.float32], *, class_id: int, source: PromptSource
) -> PointPrompts:
    """Points of one class and source."""
    return PointPrompts(
        points=points.astype(np.float32),
        scores=scores.astype(np.float32),
        class_ids=np.full(len(points), class_id, np.int32),
        sources=np.full(len(points), source, np.int32),
    )


def pack_batch(images: Sequence[PointPrompts], frames: Sequence[ModelFrame]) -> PromptBatch:
    """Point prompts of several images to SAM's prompts of the whole batch."""
    prompts = [_sam_prompts_of_image(prompts) for prompts in images]
    flat = [(image, prompt) for image, of_image in enumerate(prompts) for prompt in of_image]
    points = [frames[image].to_model(prompt.points) for image, prompt in flat]
    labels = [prompt.labels for _, prompt in flat]
    return PromptBatch(
        prompts=PointPrompts.concatenate(list(images)),
        point_offsets=_offsets([len(p) for p in images]),
        sam_points=np.concatenate([np.zeros((0, 2), np.float32), *points]),
        sam_labels=np.concatenate([np.zeros(0, np.int32), *labels]),
        sam_offsets=_offsets([len(p) for p in points]),
        image_index=np.array([image for image, _ in flat], np.int32),
    )


def _sam_prompts_of_image(prompts: PointPrompts) -> list[SamPrompt]:
    together = [
        class_prompts(_of_source(prompts, source))
        for source in (PromptSource.COARSE, PromptSource.FINE)
    ]
    return [*sam_prompts(prompts), *together[0], *together[1]]


def _of_source(prompts: PointPrompts, source: PromptSource) -> PointPrompts:
    members = prompts.sources == source
    return PointPrompts(
        points=prompts.points[members],
        scores=prompts.scores[members],
        class_ids=prompts.class_ids[members],
        sources=prompts.sources[members],
    )


def _offsets(counts: Sequence[int]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int32)


def summarize_masks(
    logits: NDArray[np.float32], mask_images: NDArray[np.int32], frames: Sequence[ModelFrame]
) -> MaskSummary:
    """Box, stability score and area of each mask.

    Args:
        logits: [n, m, m] over the model frame. NaN is outside; values beyond 1e30 count as 1e30.
        mask_images: [n], position of each mask's image in ``frames``.
        frames: For each image its frame.
    """
    clean = np.where(np.isnan(logits), -np.inf, logits)
    clean = clean.clip(-_LOGIT_LIMIT, _LOGIT_LIMIT).astype(np.float32)
    summary = MaskSummary(
        boxes=np.zeros((len(logits), 4), np.float32),
        stability=np.zeros(len(logits), np.float32),
        areas=np.zeros(len(logits), np.float32),
    )
    for image, frame in enumerate(frames):
        members = np.flatnonzero(mask_images == image)
        if len(members) == 0:
            continue
        summary.boxes[members] = boxes_from_logits(clean[members], frame)
        summary.stability[members] = low_res_stability(clean[members], frame)
        summary.areas[members] = _mask_areas(clean[members], frame)
    return summary


def _mask_areas(logits: NDArray[np.float32], frame: ModelFrame) -> NDArray[np.float32]:
    side = logits.shape[-1]
    stride = frame.model_size / side
    height, width = (max(1, -(-v * side // frame.model_size)) for v in frame.valid_size)
    inside = np.count_nonzero(logits[:, :height, :width] > MASK_THRESHOLD, axis=(1, 2))
    cell_height, cell_width = (
        stride / (valid / full)
        for valid, full in zip(frame.valid_size, frame.image_size, strict=True)
    )
    return (inside * (cell_width * cell_height)).astype(np.float32)


def class_nms(
    boxes: Boxes, scores: NDArray[np.float32], labels: NDArray[np.int32], iou_thresh: float
) -> NDArray[np.int64]:
    """``batched_nms``; a box with a coordinate that is not finite suppresses nothing."""
    is_finite = np.isfinite(boxes).all(axis=1)
    # Out of everyone's way: an empty box overlaps nothing.
    clean = np.where(is_finite[:, None], boxes, np.float32(0))
    with np.errstate(over="ignore", invalid="ignore"):
        return batched_nms(clean, scores, labels, iou_thresh)


def kmeans(points: NDArray[np.int64], num_clusters: int) -> NDArray[np.int64]:
    """Cluster centres of integer points, truncated to integers.

    Deterministic, so that a GPU can give the same bits: the first centre is the point nearest to
    the mean, each next one the point farthest from all centres so far, ties go to the lowest index;
    then Lloyd's iterations with integer sums and float64 quotients until no point changes cluster.

    Args:
        points: [n, 2], (x, y), n >= 1.
        num_clusters: At least 1. Fewer centres come back where there are fewer distinct points.

    Returns:
        [at most num_clusters, 2], in the order in which the centres were seeded.
    """
    centres = _seed(points, num_clusters)
    assigned = np.full(len(points), -1)
    for _ in range(_MAX_ITERATIONS):
        nearest = _squared_distances(points, centres).argmin(axis=1)
        if (nearest == assigned).all():
            break
        assigned = nearest
        centres = _means(points, assigned, centres)
    return centres.astype(np.int64)


def _seed(points: NDArray[np.int64], num_clusters: int) -> NDArray[np.float64]:
    places = points.astype(np.float64)
    mean = points.sum(axis=0) / len(points)
    chosen = [int(_squared_distances(points, mean[None])[:, 0].argmin())]
    nearest = _squared_distances(points, places[chosen])[:, 0]
    while len(chosen) < num_clusters and nearest.max() > 0:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, _squared_distances(points, places[chosen[-1:]])[:, 0])
    return places[chosen]


def _means(
    points: NDArray[np.int64], assigned: NDArray[np.int64], centres: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean of each cluster's points; a cluster that lost all its points stays where it was."""
    counts = np.bincount(assigned, minlength=len(centres))
    sums = np.stack(
        [np.bincount(assigned, weights=points[:, axis], minlength=len(centres)) for axis in (0, 1)],
        axis=1,
    )
    return np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centres)


def _squared_distances(
    points: NDArray[np.int64], centres: NDArray[np.float64]
) -> NDArray[np.float64]:
    return np.square(points[:, None, :] - centres[None, :, :]).sum(axis=2)
