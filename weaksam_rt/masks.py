"""Mask logits to masks, boxes, stability scores and COCO run-length encodings."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from weaksam_rt.boxes import box_xyxy_from_xywh
from weaksam_rt.preprocessing import ModelFrame, resize_matrix
from weaksam_rt.types import ImageSize, InstanceMasks

MASK_THRESHOLD = 0.0
"""A pixel with a logit above this is inside."""
STABILITY_OFFSET = 1.0
LOGIT_LIMIT = 1e30
"""Larger logits count as this; NaN is outside its mask."""
_ROWS_AT_A_TIME = 16
"""Of the search for the edges of a mask; the first few usually hold it."""


def image_logits(low_res_logits: NDArray[np.float32], frame: ModelFrame) -> NDArray[np.float32]:
    """Mask logits at the original image's resolution.

    SAM resizes to the model frame, crops the padding and resizes to the image. All three are
    linear along each axis, so they are one matrix per axis.

    Args:
        low_res_logits: [..., m, m] over the model frame.
        frame: Where the image lies in it.

    Returns:
        float32 [..., h, w].
    """
    rows, columns = _image_matrices(low_res_logits.shape[-1], frame)
    return rows @ low_res_logits @ columns.T


def mask_to_box(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The tight box around each mask of [..., h, w], [..., 4]; an empty mask gives zeros.

    Boxes end after the last pixel: one pixel at (0, 0) gives (0, 0, 1, 1). ``segment_anything``'s
    ``batched_mask_to_box`` ends on it: (0, 0, 0, 0).
    """
    left, right = _first_and_last(masks.any(axis=-2))
    top, bottom = _first_and_last(masks.any(axis=-1))
    boxes = np.stack([left, top, right + 1, bottom + 1], axis=-1).astype(np.float32)
    return np.where(masks.any(axis=(-2, -1))[..., None], boxes, np.float32(0))


def boxes_from_logits(
    low_res_logits: NDArray[np.float32], frame: ModelFrame
) -> NDArray[np.float32]:
    """The box around each mask straight from low-resolution logits, without making the mask.

    The edges lie where the row and column maxima of the logits, interpolated linearly between pixel
    centres, cross the threshold: to a fraction of a low-resolution pixel the box of the upsampled
    mask, at a small part of its cost.

    Args:
        low_res_logits: [n, m, m] over the model frame. NaN is outside its mask.
        frame: Where the image lies in it; padding is ignored.

    Returns:
        XYXY in pixels of the original image, [n, 4]; zeros for an empty mask.
    """
    valid = _crop_to_valid(low_res_logits, frame)
    columns, rows = valid.max(axis=-2), valid.max(axis=-1)
    if np.isnan(rows).any():
        valid = np.where(np.isnan(valid), np.float32(-LOGIT_LIMIT), valid)
        columns, rows = valid.max(axis=-2), valid.max(axis=-1)
    stride = frame.model_size / low_res_logits.shape[-1]
    left, right = _crossings(columns.clip(-LOGIT_LIMIT, LOGIT_LIMIT))
    top, bottom = _crossings(rows.clip(-LOGIT_LIMIT, LOGIT_LIMIT))
    boxes = np.stack([left, top, right, bottom], axis=-1) * stride
    height, width = frame.valid_size
    clipped = boxes.clip(0, [width, height, width, height])
    is_empty = rows.max(axis=-1) <= MASK_THRESHOLD
    return np.where(is_empty[:, None], np.float32(0), frame.to_image(clipped))


def full_resolution_boxes(
    low_res_logits: NDArray[np.float32], frame: ModelFrame
) -> NDArray[np.float32]:
    """The box around each mask as it is at the image's resolution, without making the mask.

    A low-resolution value just above the threshold can vanish in resizing, and with it what
    ``boxes_from_logits`` takes for a part of the mask. Here rows and columns of the image are made
    from the outside inwards, a few at a time, until one holds a pixel of the mask.

    Args:
        low_res_logits: [n, m, m] over the model frame.
        frame: Where the image lies in it.

    Returns:
        ``mask_to_box(image_logits(low_res_logits, frame) > MASK_THRESHOLD)``, [n, 4].
    """
    rows, columns = _image_matrices(low_res_logits.shape[-1], frame)
    sideways = low_res_logits.swapaxes(-1, -2)
    top = _first_inside(low_res_logits, rows, columns)
    bottom = len(rows) - _first_inside(low_res_logits, rows[::-1], columns)
    left = _first_inside(sideways, columns, rows)
    right = len(columns) - _first_inside(sideways, columns[::-1], rows)
    boxes = np.stack([left, top, right, bottom], axis=-1).astype(np.float32)
    return np.where((bottom > top)[:, None], boxes, np.float32(0))


def stability_scores(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """IoU between the masks above ``+STABILITY_OFFSET`` and above ``-STABILITY_OFFSET``.

    Args:
        logits: [..., h, w], of the valid region only.

    Returns:
        [...], in [0, 1]; 0 where both masks are empty.

    Source:
        ``segment_anything.utils.amg.calculate_stability_score``.
    """
    inner = _num_pixels(logits > MASK_THRESHOLD + STABILITY_OFFSET)
    outer = _num_pixels(logits > MASK_THRESHOLD - STABILITY_OFFSET)
    return (inner / np.maximum(outer, 1)).astype(np.float32)


def full_resolution_stability(
    low_res_logits: NDArray[np.float32], frame: ModelFrame
) -> NDArray[np.float32]:
    """``stability_scores`` of [n, m, m] at the image's resolution, as ``segment_anything``'s
    generator has them; one mask at a time, since each takes as much memory as the image.
    """
    scores = np.zeros(len(low_res_logits), dtype=np.float32)
    for mask in range(len(scores)):
        one = slice(mask, mask + 1)
        scores[one] = stability_scores(image_logits(low_res_logits[one], frame))
    return scores


def low_res_stability(
    low_res_logits: NDArray[np.float32], frame: ModelFrame
) -> NDArray[np.float32]:
    """``stability_scores`` of [..., m, m] over the model frame, padding left out."""
    return stability_scores(_crop_to_valid(low_res_logits, frame))


def low_res_areas(low_res_logits: NDArray[np.float32], frame: ModelFrame) -> NDArray[np.float32]:
    """Square pixels of the original image inside each mask of [n, m, m], [n]."""
    stride = frame.model_size / low_res_logits.shape[-1]
    inside = _crop_to_valid(low_res_logits, frame) > MASK_THRESHOLD
    height, width = (
        stride / (valid / full)
        for valid, full in zip(frame.valid_size, frame.image_size, strict=True)
    )
    return (_num_pixels(inside) * (width * height)).astype(np.float32)


def encode_rle(masks: NDArray[np.bool_]) -> tuple[bytes, ...]:
    """COCO's compressed run-length ``counts`` of each mask of [n, h, w]."""
    if len(masks) == 0:
        return ()
    column_major = np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8)
    return tuple(rle["counts"] for rle in coco_mask.encode(column_major))


def compress_runs(runs: NDArray[np.int32], image_size: ImageSize) -> bytes:
    """COCO's compressed ``counts`` of a mask from its run lengths down the columns, the first of
    outside.
    """
    rle = {"counts": runs.tolist(), "size": list(image_size)}
    counts: bytes = coco_mask.frPyObjects(rle, *image_size)["counts"]
    return counts


def decode_rle(counts: Sequence[bytes], image_size: ImageSize) -> NDArray[np.bool_]:
    """Masks [n, h, w] from COCO's compressed ``counts``."""
    if len(counts) == 0:
        return np.zeros((0, *image_size), dtype=bool)
    rles = [{"counts": c, "size": list(image_size)} for c in counts]
    return coco_mask.decode(rles).transpose(2, 0, 1).astype(bool)


def masks_in_boxes(
    logits: NDArray[np.float32], boxes: NDArray[np.float32], image_size: ImageSize
) -> InstanceMasks:
    """Masks that a detector gives on a grid over each box, in the image.

    Logits are interpolated between the centres of the grid's cells and repeated beyond the outer
    ones. A pixel whose centre lies outside the box is outside the mask.

    Args:
        logits: [n, m, m].
        boxes: [n, 4], XYXY in pixels; may reach beyond the image.
        image_size: (height, width).

    Source:
        detectron2's ``paste_masks_in_image``; it interpolates probabilities towards 0 at the
        border of the box, where this one repeats.
    """
    counts: list[bytes] = []
    for mask_logits, (left, top, right, bottom) in zip(logits, boxes.tolist(), strict=True):
        rows, along_y = _grid_samples(top, bottom, image_size[0], len(mask_logits))
        columns, along_x = _grid_samples(left, right, image_size[1], len(mask_logits))
        mask = np.zeros((1, *image_size), dtype=bool)
        mask[0, rows, columns] = along_y @ mask_logits @ along_x.T > MASK_THRESHOLD
        counts += encode_rle(mask)  # one at a time: many full masks would not fit
    return InstanceMasks(rle_counts=tuple(counts), image_size=image_size)


def _grid_samples(
    low: float, high: float, num_pixels: int, num_cells: int
) -> tuple[slice, NDArray[np.float32]]:
    """The pixels whose centres lie in [low, high], and the weights of the cells in each of them."""
    first, last = (min(max(math.ceil(edge - 0.5), 0), num_pixels) for edge in (low, high))
    centres = np.arange(first, last) + 0.5
    positions = (centres - low) / max(high - low, 1e-6) * num_cells - 0.5
    positions = positions.clip(0, num_cells - 1)
    weights = 1 - np.abs(positions[:, None] - np.arange(num_cells))
    return slice(first, last), weights.clip(min=0).astype(np.float32)


def rle_areas(masks: InstanceMasks) -> NDArray[np.float32]:
    """Pixels of each mask, [n]."""
    if len(masks) == 0:
        return np.zeros(0, np.float32)
    return np.asarray(coco_mask.area(_rles(masks)), dtype=np.float32)


def rle_boxes(masks: InstanceMasks) -> NDArray[np.float32]:
    """``mask_to_box`` of each mask, [n, 4]."""
    if len(masks) == 0:
        return np.zeros((0, 4), np.float32)
    return box_xyxy_from_xywh(coco_mask.toBbox(_rles(masks)))


def rle_iou(masks: InstanceMasks, others: InstanceMasks) -> NDArray[np.float32]:
    """IoU of every mask with every other one, [n, m], in [0, 1]; 0 for two empty masks."""
    if len(masks) == 0 or len(others) == 0:
        return np.zeros((len(masks), len(others)), np.float32)
    iou = coco_mask.iou(_rles(masks), _rles(others), [0] * len(others))
    return np.nan_to_num(np.asarray(iou, dtype=np.float32))


def _rles(masks: InstanceMasks) -> list[dict[str, object]]:
    size = list(masks.image_size)
    return [{"counts": counts, "size": size} for counts in masks.rle_counts]


@lru_cache(maxsize=8)  # each call of an image's masks needs them again
def _image_matrices(
    side: int, frame: ModelFrame
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """From ``side`` low-resolution rows to the image's, [h, side], and columns, [w, side]."""
    height, width = frame.valid_size
    to_frame = resize_matrix(frame.model_size, side)
    rows = resize_matrix(frame.image_size[0], height) @ to_frame[:height]
    columns = resize_matrix(frame.image_size[1], width) @ to_frame[:width]
    rows.setflags(write=False)
    columns.setflags(write=False)
    return rows, columns


def _first_inside(
    logits: NDArray[np.float32], rows: NDArray[np.float32], columns: NDArray[np.float32]
) -> NDArray[np.int64]:
    """For each of [n, m, m] the first row of the image with a pixel above the threshold, [n]; the
    number of rows where there is none.

    Args:
        logits: Low-resolution logits.
        rows: [h, m], the image's rows in the order of the search.
        columns: [w, m].
    """
    # A mean of low-resolution values is above the threshold only if one of them is.
    is_high = (logits > MASK_THRESHOLD).any(axis=-1).astype(np.float32)
    is_possible = is_high @ (rows > 0).T.astype(np.float32) > 0
    num_rows = len(rows)
    found = np.full(len(logits), num_rows, np.int64)
    start = np.where(is_possible.any(axis=1), is_possible.argmax(axis=1), num_rows)
    searched = np.flatnonzero(start < num_rows)
    while len(searched):
        index = start[searched, None] + np.arange(_ROWS_AT_A_TIME)
        values = rows[np.minimum(index, num_rows - 1)] @ logits[searched] @ columns.T
        is_inside = (values > MASK_THRESHOLD).any(axis=-1)
        has_inside = is_inside.any(axis=1)
        hits = searched[has_inside]
        found[hits] = start[hits] + is_inside[has_inside].argmax(axis=1)
        searched = searched[~has_inside]
        start[searched] += _ROWS_AT_A_TIME
        searched = searched[start[searched] < num_rows]
    return found


def _num_pixels(masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    # Mask by mask: along axes NumPy counts several times slower.
    flat = masks.reshape(-1, masks.shape[-2] * masks.shape[-1])
    return np.array([np.count_nonzero(m) for m in flat], np.int64).reshape(masks.shape[:-2])


def _crop_to_valid(low_res_logits: NDArray[np.float32], frame: ModelFrame) -> NDArray[np.float32]:
    side = low_res_logits.shape[-1]
    height, width = (max(1, -(-v * side // frame.model_size)) for v in frame.valid_size)
    return low_res_logits[..., :height, :width]


def _first_and_last(is_inside: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    # Of one mask alone NumPy gives scalars; they are made arrays again.
    last = is_inside.shape[-1] - 1 - is_inside[..., ::-1].argmax(axis=-1)
    return np.asarray(is_inside.argmax(axis=-1)), np.asarray(last)


def _crossings(
    profile: NDArray[np.float32],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where each profile of [n, m] first rises above and last falls below the threshold, in cells.

    Cell i spans [i, i + 1]; values sit at the centres. A profile that is inside at the border
    starts or ends there.
    """
    first, last = _first_and_last(profile > MASK_THRESHOLD)
    return _edge(profile, first, -1), _edge(profile, last, +1)


def _edge(
    profile: NDArray[np.float32], inside: NDArray[np.int64], step: int
) -> NDArray[np.float64]:
    rows, size = np.arange(len(profile)), profile.shape[1]
    outside = inside + step
    is_border = (outside < 0) | (outside >= size)
    value_in = profile[rows, inside] - MASK_THRESHOLD
    value_out = profile[rows, outside.clip(0, size - 1)] - MASK_THRESHOLD
    drop = np.where(is_border, 1, np.maximum(value_in - value_out, 1e-12))
    share = np.clip(value_in / drop, 0, 1)
    border = inside + (0 if step < 0 else 1)
    return np.where(is_border, border, inside + 0.5 + step * share)
