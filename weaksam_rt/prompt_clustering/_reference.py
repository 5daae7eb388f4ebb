"""From activation maps to packed prompts, and from mask logits to boxes, in NumPy: the definition
that every faster implementation must repeat.

Integers and selections are repeated exactly. So are the floats of maps and peaks, because each
operation is a float32 operation of its own; boxes of masks agree to a tolerance.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.boxes import Boxes, batched_nms
from weaksam_rt.class_activation_map import PeakConfig, Peaks, normalize_maps, peak_points
from weaksam_rt.masks import (
    LOGIT_LIMIT,
    MASK_THRESHOLD,
    boxes_from_logits,
    low_res_areas,
    low_res_stability,
)
from weaksam_rt.preprocessing import ModelFrame, upsample_maps
from weaksam_rt.prompt_clustering.batch import EncodedMasks, MapBatch, MaskSummary, PromptBatch
from weaksam_rt.prompt_clustering.device_arrays import host_array
from weaksam_rt.prompts import FOREGROUND, PADDING, class_prompts
from weaksam_rt.types import NO_CLASS, ImageSize, PointPrompts, PromptSource

PeakFinder = Callable[[NDArray[np.float32], ImageSize, PeakConfig], list[Peaks]]
"""Peaks of each of m low-resolution maps [m, h, w]."""
MaskUpsampler = Callable[[NDArray[np.float32], ModelFrame], NDArray[np.bool_]]
"""Finite logits [m, m] to the pixels of the image inside the mask, [w * h], down the columns."""

_MAX_ITERATIONS = 300
_NUM_FIRST_CENTRES = 4
NUM_STARTS = 2 * _NUM_FIRST_CENTRES
"""Of k-means: two rules of seeding, each from some first centres."""


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
    nodes = sum_passes(host_array("maps", batch.maps), batch.mirrored_passes)
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
    packed = [_pack_image(prompts, frame) for prompts, frame in zip(images, frames, strict=True)]
    lengths = [of_image.lengths for of_image in packed]
    return PromptBatch(
        prompts=PointPrompts.concatenate(list(images)),
        point_offsets=_offsets([len(p) for p in images]),
        sam_points=np.concatenate([of_image.points for of_image in packed]),
        sam_labels=np.concatenate([of_image.labels for of_image in packed]),
        sam_offsets=_offsets(np.concatenate(lengths)),
        image_index=np.repeat(np.arange(len(images)), [len(n) for n in lengths]).astype(np.int32),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _PackedImage:
    """SAM's prompts of one image, one after the other."""

    points: NDArray[np.float32]
    """[s, 2], (x, y) in the model frame."""
    labels: NDArray[np.int32]
    """[s]."""
    lengths: NDArray[np.int64]
    """[p], points of each prompt."""


def _pack_image(prompts: PointPrompts, frame: ModelFrame) -> _PackedImage:
    # ``prompts.sam_prompts``, all at once: a point and the padding point at (0, 0).
    singles = np.zeros((len(prompts), 2, 2), np.float32)
    singles[:, 0] = frame.to_model(prompts.points)
    together = [
        prompt
        for source in (PromptSource.COARSE, PromptSource.FINE)
        for prompt in class_prompts(_of_source(prompts, source))
    ]
    pair = np.array([FOREGROUND, PADDING], np.int32)
    return _PackedImage(
        points=np.concatenate(
            [singles.reshape(-1, 2), *(frame.to_model(p.points) for p in together)]
        ),
        labels=np.concatenate([np.tile(pair, len(prompts)), *(p.labels for p in together)]),
        lengths=np.array([2] * len(prompts) + [len(p.points) for p in together], np.int64),
    )


def _of_source(prompts: PointPrompts, source: PromptSource) -> PointPrompts:
    members = prompts.sources == source
    return PointPrompts(
        points=prompts.points[members],
        scores=prompts.scores[members],
        class_ids=prompts.class_ids[members],
        sources=prompts.sources[members],
    )


def _offsets(counts: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int32]:
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
    summary = MaskSummary(
        boxes=np.zeros((len(logits), 4), np.float32),
        stability=np.zeros(len(logits), np.float32),
        areas=np.zeros(len(logits), np.float32),
    )
    for image, frame in enumerate(frames):
        members = np.flatnonzero(mask_images == image)
        if len(members) == 0:
            continue
        # Of one image, as a rule: not copied.
        of_image = logits if len(members) == len(logits) else logits[members]
        summary.boxes[members] = boxes_from_logits(of_image, frame)
        summary.stability[members] = low_res_stability(of_image, frame)
        summary.areas[members] = low_res_areas(of_image, frame)
    return summary


def inside_down_columns(logits: NDArray[np.float32], frame: ModelFrame) -> NDArray[np.bool_]:
    """Which pixels of the image are inside a mask, [w * h], down the columns.

    The logits are resized to the model frame, which is cut to its valid part and resized to the
    image, as SAM does; a pixel above ``MASK_THRESHOLD`` is inside.
    """
    height, width = frame.valid_size
    in_frame = upsample_maps(logits, (frame.model_size, frame.model_size))
    in_image = upsample_maps(in_frame[:height, :width], frame.image_size)
    return (in_image > MASK_THRESHOLD).T.ravel()


def encode_masks(
    logits: NDArray[np.float32],
    mask_images: NDArray[np.int32],
    frames: Sequence[ModelFrame],
    *,
    with_bits: bool = True,
    upsample: MaskUpsampler = inside_down_columns,
) -> EncodedMasks:
    """Masks at the resolution of their images, as bits and as run lengths.

    Args:
        logits: [n, m, m] over the model frame. NaN is outside; values beyond 1e30 count as 1e30.
        mask_images: [n], position of each mask's image in ``frames``.
        frames: For each image its frame.
        with_bits: Whether the bits are wanted too.
        upsample: ``inside_down_columns``, or a faster one.
    """
    bits, runs = [np.zeros(0, np.uint32)], [np.zeros(0, np.int32)]
    for mask, image in zip(logits, mask_images, strict=True):
        is_inside = upsample(_usable_logits(mask), frames[image])
        if with_bits:
            bits.append(_packed_bits(is_inside))
        changes = np.flatnonzero(is_inside[1:] != is_inside[:-1]) + 1
        first = [0, 0] if is_inside[0] else [0]
        runs.append(np.diff(np.concatenate([first, changes, [len(is_inside)]])).astype(np.int32))
    return EncodedMasks(
        bits=np.concatenate(bits) if with_bits else None,
        word_offsets=_offsets(_mask_words(mask_images, frames)),
        runs=np.concatenate(runs),
        run_offsets=_offsets([len(lengths) for lengths in runs[1:]]),
    )


def _packed_bits(is_inside: NDArray[np.bool_]) -> NDArray[np.uint32]:
    padding = np.zeros(-len(is_inside) % 32, bool)
    packed = np.packbits(np.concatenate([is_inside, padding]), bitorder="little")
    return packed.view("<u4").astype(np.uint32)


def _mask_words(mask_images: NDArray[np.int32], frames: Sequence[ModelFrame]) -> NDArray[np.int64]:
    """Words of 32 pixels of each mask."""
    areas = np.array([f.image_size[0] * f.image_size[1] for f in frames], np.int64)
    return -(-areas[mask_images] // 32)


def _usable_logits(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    # Not so where one is NaN.
    if logits.min() >= -LOGIT_LIMIT and logits.max() <= LOGIT_LIMIT:
        return logits
    clean = np.where(np.isnan(logits), -np.inf, logits)
    return clean.clip(-LOGIT_LIMIT, LOGIT_LIMIT).astype(np.float32)


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

    Deterministic, so that a GPU can give the same bits. There are 8 starts. The first centre of a
    start is the point of rank 0, n / 4, n / 2 or 3n / 4 by distance from the mean; each next one is
    the point that leaves the least sum of squared distances to the nearest centre (starts 0 to 3),
    or the point farthest from all centres so far (4 to 7). Then follow Lloyd's iterations with
    integer sums and float64 quotients until no point changes cluster; the start with the least sum
    of squared distances gives the answer. All ties go to the lowest index.

    Args:
        points: [n, 2], (x, y), n >= 1.
        num_clusters: At least 1. Fewer centres come back where there are fewer distinct points.

    Returns:
        [at most num_clusters, 2], in the order in which the centres were seeded.
    """
    centres = points[_seeds(points, num_clusters)].astype(np.float64)
    assigned = np.full((NUM_STARTS, len(points)), -1)
    moving = np.arange(NUM_STARTS)
    for _ in range(_MAX_ITERATIONS):
        nearest = _squared_distances(points, centres[moving]).argmin(axis=2)
        has_changed = (nearest != assigned[moving]).any(axis=1)
        moving, nearest = moving[has_changed], nearest[has_changed]
        if len(moving) == 0:
            break
        assigned[moving] = nearest
        centres[moving] = _means(points, nearest, centres[moving])
    return centres[int(_tightness(points, assigned, centres.shape[1]).argmax())].astype(np.int64)


def _seeds(points: NDArray[np.int64], num_clusters: int) -> NDArray[np.int64]:
    """Positions of the points that become the first centres of each start, [starts, k]."""
    num_points = len(points)
    # Integers below 2**53: these floats and their sums, in any order, are exact.
    distances = _squared_distances(points, points.astype(np.float64))
    mean = points.sum(axis=0) / num_points
    by_distance = _squared_distances(points, mean[None])[:, 0].argsort(kind="stable")
    ranks = np.arange(_NUM_FIRST_CENTRES) * num_points // _NUM_FIRST_CENTRES
    first = by_distance[ranks].tolist()
    return np.array(
        [_tightest_seeds(distances, centre, num_clusters) for centre in first]
        + [_farthest_seeds(distances, centre, num_clusters) for centre in first]
    )


def _tightest_seeds(distances: NDArray[np.float64], first: int, most: int) -> list[int]:
    """Each next centre leaves the least sum of distances to the nearest centre."""
    chosen, nearest = [first], distances[first].copy()
    left, left_by_each = nearest.sum(), np.minimum(nearest, distances).sum(axis=1)
    while len(chosen) < most and left > 0:
        best = int(left_by_each.argmin())
        chosen.append(best)
        left = left_by_each[best]
        # Only points that are nearer to the new centre change the sums.
        (closer,) = (distances[best] < nearest).nonzero()
        of_closer, after = distances[closer], distances[best, closer]
        saved = np.minimum(nearest[closer, None], of_closer)
        saved -= np.minimum(after[:, None], of_closer)
        left_by_each -= np.add.reduce(saved, axis=0)
        nearest[closer] = after
    return chosen


def _farthest_seeds(distances: NDArray[np.float64], first: int, most: int) -> list[int]:
    """Each next centre is the point farthest from all before."""
    chosen, nearest = [first], distances[first]
    while len(chosen) < most:
        farthest = int(nearest.argmax())
        if nearest[farthest] == 0:
            break
        chosen.append(farthest)
        nearest = np.minimum(nearest, distances[farthest])
    return chosen


def _means(
    points: NDArray[np.int64], assigned: NDArray[np.int64], centres: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean of each cluster's points; a cluster that lost all its points stays where it was."""
    counts, sums = _counts_and_sums(points, assigned, centres.shape[1])
    return np.where(counts[..., None] > 0, sums / np.maximum(counts, 1)[..., None], centres)


def _counts_and_sums(
    points: NDArray[np.int64], assigned: NDArray[np.int64], num_clusters: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Number [starts, k] and sum [starts, k, 2] of each cluster's points."""
    shape = len(assigned), num_clusters
    cluster = (assigned + np.arange(len(assigned))[:, None] * num_clusters).ravel()
    size = len(assigned) * num_clusters
    sums = [
        np.bincount(cluster, np.tile(points[:, axis], len(assigned)), minlength=size)
        for axis in (0, 1)
    ]
    counts = np.bincount(cluster, minlength=size).astype(np.int64)
    return counts.reshape(shape), np.stack(sums, axis=1).astype(np.float64).reshape(*shape, 2)


def _tightness(
    points: NDArray[np.int64], assigned: NDArray[np.int64], num_clusters: int
) -> NDArray[np.float64]:
    """[starts], what the squared distances from the origin exceed those from the centres by."""
    counts, sums = _counts_and_sums(points, assigned, num_clusters)
    shares = np.square(sums).sum(axis=2) / np.maximum(counts, 1)
    # Added one after the other: ``sum`` adds in an order of its own.
    added: NDArray[np.float64] = shares.cumsum(axis=1)
    return added[:, -1]


def _squared_distances(
    points: NDArray[np.int64], centres: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[..., n, k] of points [n, 2] and centres [..., k, 2]."""
    places = points.astype(np.float64)
    columns: NDArray[np.float64] = places[:, 0, None] - centres[..., None, :, 0]
    rows: NDArray[np.float64] = places[:, 1, None] - centres[..., None, :, 1]
    columns *= columns
    rows *= rows
    columns += rows
    return columns
