"""What goes into the prompt kernels for a batch of images and what comes out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.preprocessing import ModelFrame
from weaksam_rt.prompt_clustering.device_arrays import AnyArray, DeviceArray, JoinedArrays
from weaksam_rt.types import PointPrompts, PromptSource

MAX_IMAGE_SIDE = 32767
"""Sides of an image in pixels; squared distances fit 32 bits."""
_MAX_PASSES = 32
_MAX_MASK_SIDE = 4096
_MAX_BOXES = 65536
_MAX_MASK_PIXELS = 2**31 - 1
"""Of all masks of a call; a mask has at most one run more than pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MapBatch:
    """Low-resolution activation maps of several images.

    The maps of an image stand together, its coarse ones first, then fine, then cross-attention.
    """

    maps: AnyArray
    """[passes, m, h, w], float32, contiguous; ``as_array`` takes those of other libraries. The
    passes of a map are summed; they share one grid."""
    map_images: NDArray[np.int32]
    """[m], position in ``frames`` of each map's image; never falls."""
    map_sources: NDArray[np.int32]
    """[m], ``PromptSource`` of each map: coarse, fine or cross; never falls within an image."""
    map_classes: NDArray[np.int32]
    """[m], 0-based class of each map; coarse and fine maps of an image have one map a class."""
    frames: tuple[ModelFrame, ...]
    """For each image its size and where it lies in SAM's input."""
    mirrored_passes: tuple[int, ...] = ()
    """Positions of the passes whose maps are mirrored left to right."""

    def __post_init__(self) -> None:
        _check_array("maps", self.maps, np.float32, 4)
        num_passes, num_maps, height, width = self.maps.shape
        if isinstance(self.maps, np.ndarray) and not self.maps.flags.c_contiguous:
            raise ValueError(f"maps must be contiguous, got strides {self.maps.strides}")
        if height < 1 or width < 1:
            raise ValueError(f"maps must have at least one pixel, got {height}x{width}")
        if not 1 <= num_passes <= _MAX_PASSES:
            raise ValueError(f"maps must have 1 to {_MAX_PASSES} passes, got {num_passes}")
        for name in ("map_images", "map_sources", "map_classes"):
            values = getattr(self, name)
            _check_array(name, values, np.int32, 1)
            if len(values) != num_maps:
                raise ValueError(f"{name} must have one entry a map: {num_maps}, got {len(values)}")
        self._check_frames()
        self._check_order()
        if not set(self.mirrored_passes) <= set(range(num_passes)):
            raise ValueError(
                f"mirrored_passes must be in [0, {num_passes}), got {self.mirrored_passes}"
            )

    @property
    def num_images(self) -> int:
        """Number of images; those without maps count."""
        return len(self.frames)

    def _check_frames(self) -> None:
        if len(self.frames) == 0:
            raise ValueError("frames must have at least one image")
        for image, frame in enumerate(self.frames):
            if not all(1 <= side <= MAX_IMAGE_SIDE for side in frame.image_size):
                raise ValueError(
                    f"frames[{image}]: sides must be in [1, {MAX_IMAGE_SIDE}], got image_size "
                    f"{frame.image_size}"
                )

    def _check_order(self) -> None:
        if len(self.map_images) == 0:
            return
        low, high = self.map_images.min(), self.map_images.max()
        if low < 0 or high >= self.num_images:
            raise ValueError(f"map_images must be in [0, {self.num_images}), got {low} to {high}")
        allowed = (PromptSource.COARSE, PromptSource.FINE, PromptSource.CROSS)
        if not np.isin(self.map_sources, allowed).all():
            raise ValueError(f"map_sources must be 1, 2 or 3, got {np.unique(self.map_sources)}")
        place = self.map_images.astype(np.int64) * 4 + self.map_sources
        if (np.diff(place) < 0).any():
            raise ValueError(
                "maps must be in the order of their images and, within one, coarse, fine, cross: "
                f"map {int(np.argmax(np.diff(place) < 0)) + 1} is not"
            )
        is_cam = self.map_sources != PromptSource.CROSS
        keys = np.stack([place[is_cam], self.map_classes[is_cam]], axis=1)
        if len(np.unique(keys, axis=0)) != len(keys):
            raise ValueError("map_classes must differ among the coarse, and the fine, maps")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBatch:
    """Prompts of all images of a batch, without gaps."""

    prompts: PointPrompts
    """Image by image; coarse and fine peaks, then cluster centres."""
    point_offsets: NDArray[np.int32]
    """[b + 1], those of image i are ``prompts`` [point_offsets[i], point_offsets[i + 1])."""
    sam_points: NDArray[np.float32]
    """[s, 2], (x, y) in the model frame, padding points included."""
    sam_labels: NDArray[np.int32]
    """[s]."""
    sam_offsets: NDArray[np.int32]
    """[p + 1], points of SAM's prompt i are [sam_offsets[i], sam_offsets[i + 1])."""
    image_index: NDArray[np.int32]
    """[p], the image of each of SAM's prompts. Of each image: first one prompt for each point,
    then one for each class with several coarse peaks, then the same for fine peaks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskSummary:
    """What proposals need to know of n masks."""

    boxes: NDArray[np.float32]
    """[n, 4], XYXY in pixels of the original image; zeros for an empty mask."""
    stability: NDArray[np.float32]
    """[n], in [0, 1]."""
    areas: NDArray[np.float32]
    """[n], square pixels of the original image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedMasks:
    """n masks at the resolution of their images. Pixels are in COCO's order: down the columns."""

    bits: NDArray[np.uint32] | None
    """[w], 32 pixels a word, the lowest bit first; what is left of a mask's last word is 0. None
    where only the runs were asked for."""
    word_offsets: NDArray[np.int32]
    """[n + 1], words of mask i are [word_offsets[i], word_offsets[i + 1])."""
    runs: NDArray[np.int32]
    """[r], lengths of runs of outside and inside in turn; the first, of outside, may be 0. COCO's
    uncompressed ``counts``."""
    run_offsets: NDArray[np.int32]
    """[n + 1], runs of mask i are [run_offsets[i], run_offsets[i + 1])."""


def check_image_maps(
    coarse_maps: AnyArray, fine_maps: AnyArray, cross_maps: AnyArray, class_ids: NDArray[np.int32]
) -> None:
    """Raise ``ValueError`` unless the maps [c, h, w] and [m, c, h, w] of one image and its classes
    [c] belong together.
    """
    maps = {"coarse_maps": coarse_maps, "fine_maps": fine_maps, "cross_maps": cross_maps}
    for name, array in maps.items():
        _check_array(name, array, np.float32, 4 if name == "cross_maps" else 3)
    _check_array("class_ids", class_ids, np.int32, 1)
    grids = [array.shape[-2:] for array in maps.values()]
    if not grids[0] == grids[1] == grids[2]:
        raise ValueError(
            "coarse, fine and cross maps must share one grid, got "
            f"{grids[0]}, {grids[1]} and {grids[2]}"
        )
    counts = [len(coarse_maps), len(fine_maps), cross_maps.shape[1]]
    if any(count != len(class_ids) for count in counts):
        raise ValueError(
            f"coarse, fine and cross maps must have one map a class: {len(class_ids)}, got "
            f"{counts[0]}, {counts[1]} and {counts[2]}"
        )


def check_masks(logits: AnyArray, mask_images: NDArray[np.int32], num_images: int) -> None:
    """Raise ``ValueError`` unless logits [n, m, m] and their images [n] belong together."""
    _check_array("logits", logits, np.float32, 3)
    _check_array("mask_images", mask_images, np.int32, 1)
    num_masks, height, width = logits.shape
    if height != width or not 1 <= height <= _MAX_MASK_SIDE:
        raise ValueError(
            f"logits must be square, 1 to {_MAX_MASK_SIDE} a side, got {height}x{width}"
        )
    if len(mask_images) != num_masks:
        raise ValueError(
            f"mask_images must have one entry a mask: {num_masks}, got {len(mask_images)}"
        )
    if num_masks and not 0 <= mask_images.min() <= mask_images.max() < num_images:
        raise ValueError(
            f"mask_images must be in [0, {num_images}), got {mask_images.min()} to "
            f"{mask_images.max()}"
        )


def check_mask_pixels(mask_images: NDArray[np.int32], frames: Sequence[ModelFrame]) -> None:
    """Raise ``ValueError`` unless the masks' pixels can be counted, and the images share a model
    frame.
    """
    areas = np.array([f.image_size[0] * f.image_size[1] for f in frames], np.int64)
    total = int(areas[mask_images].sum()) + len(mask_images)
    if total > _MAX_MASK_PIXELS:
        raise ValueError(
            f"the masks must have at most {_MAX_MASK_PIXELS} pixels together, got {total}: send "
            "fewer masks"
        )
    if len({frame.model_size for frame in frames}) > 1:
        sizes = sorted({frame.model_size for frame in frames})
        raise ValueError(f"frames must share one model_size, got {sizes}")


def check_scored_boxes(
    boxes: AnyArray, scores: AnyArray, labels: AnyArray, iou_thresh: float
) -> None:
    """Raise ``ValueError`` unless boxes [n, 4], scores [n] and labels [n] belong together."""
    _check_array("boxes", boxes, np.float32, 2)
    _check_array("scores", scores, np.float32, 1)
    _check_array("labels", labels, np.int32, 1)
    if boxes.shape[1] != 4 or not len(boxes) == len(scores) == len(labels):
        raise ValueError(
            f"boxes must be [n, 4], scores and labels [n], got {boxes.shape}, {scores.shape} and "
            f"{labels.shape}"
        )
    if len(boxes) > _MAX_BOXES:
        raise ValueError(f"boxes must be at most {_MAX_BOXES}, got {len(boxes)}")
    if not 0 <= iou_thresh <= 1:
        raise ValueError(f"iou_thresh must be in [0, 1], got {iou_thresh}")


def _check_array(name: str, array: AnyArray, dtype: type, ndim: int) -> None:
    is_array = isinstance(array, np.ndarray | DeviceArray | JoinedArrays)
    if not is_array or array.dtype != dtype or array.ndim != ndim:
        got = f"{array.dtype} with {array.ndim}" if is_array else type(array).__name__
        raise ValueError(f"{name} must be {np.dtype(dtype)} with {ndim} axes, got {got}")
