"""Images in a model's square frame, as they are and as random views for training."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from weaksam_rt.boxes import box_area, clip_boxes
from weaksam_rt.masks import decode_rle, encode_rle
from weaksam_rt.preprocessing import longest_side_frame, resize_for_detector
from weaksam_rt.types import ImageSize, InstanceMasks

_INSIDE = 128
"""Of 255: the least share of a pixel inside a mask that makes it a pixel of the mask."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrueBoxes:
    """What is really there, where the boxes to learn from are pseudo boxes."""

    boxes: NDArray[np.float32]
    """[m, 4], XYXY in the model frame."""
    labels: NDArray[np.int64]
    """[m]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FramedImage:
    """An image in the model frame: longest side scaled to the frame's side, top-left aligned,
    zeros elsewhere.
    """

    pixels: NDArray[np.uint8]
    """RGB [s, s, 3]."""
    valid_size: tuple[int, int]
    """(height, width) of the image inside the frame."""
    boxes: NDArray[np.float32]
    """[n, 4], XYXY in the model frame."""
    labels: NDArray[np.int64]
    """[n]."""
    truth: TrueBoxes | None = None
    """To measure with, never to learn from; moves with the boxes in random views."""
    masks: InstanceMasks | None = None
    """n masks over the frame, run-length coded: thousands of images stay in memory."""
    name: str = ""
    """Of the file, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """How random training views are drawn."""

    min_scale: float = 0.6
    """Smallest side of the image relative to the frame, above 0."""
    max_scale: float = 1.4
    """Largest; what does not fit is cropped at a random place."""
    max_stretch: float = 1.15
    """Width and height are scaled apart by up to this factor, at least 1."""
    min_visible: float = 0.4
    """A box is kept when at least this share of it, in [0, 1], is inside the view."""
    max_gain: float = 0.35
    """Brightness, contrast and colour vary by up to this share, in [0, 1)."""

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= self.max_scale or self.max_stretch < 1:
            raise ValueError(
                f"scales must be positive and ordered and the stretch at least 1, got "
                f"{self.min_scale}, {self.max_scale}, {self.max_stretch}"
            )


def frame_image(
    image: NDArray[np.uint8],
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    frame_side: int,
    masks: NDArray[np.bool_] | None = None,
    name: str = "",
) -> FramedImage:
    """Scale an RGB image [h, w, 3], its boxes (pixels) and masks [n, h, w] into the model frame."""
    pixels, frame = resize_for_detector(image, frame_side)
    return annotate_frame(
        pixels, boxes, labels, image_size=frame.image_size, masks=masks, name=name
    )


def annotate_frame(
    pixels: NDArray[np.uint8],
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    image_size: ImageSize,
    masks: NDArray[np.bool_] | None = None,
    name: str = "",
) -> FramedImage:
    """Bring boxes (pixels) and masks [n, h, w] of an image into the model frame ``pixels``
    [s, s, 3] that shows it.

    Args:
        pixels: Of ``resize_for_detector``; not copied.
        boxes: [n, 4], XYXY, pixels of the image.
        labels: [n].
        image_size: (height, width) of the image.
        masks: Over the image.
        name: Of the file.
    """
    frame_side = pixels.shape[0]
    frame = longest_side_frame(image_size, frame_side)
    height, width = frame.valid_size
    scale = np.array([[width / image_size[1], 0, 0], [0, height / image_size[0], 0]])
    framed_masks = None if masks is None else _warp_masks(masks, scale, (height, width), frame_side)
    return FramedImage(
        pixels=pixels,
        valid_size=frame.valid_size,
        boxes=frame.to_model(boxes),
        labels=labels,
        masks=framed_masks,
        name=name,
    )


def random_view(
    framed: FramedImage, config: ViewConfig, generator: np.random.Generator
) -> FramedImage:
    """A scaled, stretched, cropped, mirrored and recoloured view, again top-left aligned."""
    side = framed.pixels.shape[0]
    height, width = framed.valid_size
    scale = np.exp(generator.uniform(np.log(config.min_scale), np.log(config.max_scale)))
    stretch = config.max_stretch ** generator.uniform(-0.5, 0.5)
    scale_x, scale_y = scale * stretch, scale / stretch
    mirrored = generator.random() < 0.5
    offset_x = -generator.uniform(0, max(0.0, width * scale_x - side))
    offset_y = -generator.uniform(0, max(0.0, height * scale_y - side))
    matrix = np.array([[scale_x, 0, offset_x], [0, scale_y, offset_y]])
    if mirrored:
        matrix[0] = [-scale_x, 0, offset_x + width * scale_x]
    size = (
        min(side, max(1, round(height * scale_y + offset_y))),
        min(side, max(1, round(width * scale_x + offset_x))),
    )
    pixels = np.zeros_like(framed.pixels)
    pixels[: size[0], : size[1]] = recolour(
        _warp(framed.pixels[:height, :width], matrix, size), config.max_gain, generator
    )
    boxes, keep = _visible(_transform_boxes(framed.boxes, matrix), size, config.min_visible)
    truth = None
    if framed.truth is not None:
        true_boxes, stays = _visible(
            _transform_boxes(framed.truth.boxes, matrix), size, config.min_visible
        )
        truth = TrueBoxes(boxes=true_boxes, labels=framed.truth.labels[stays])
    masks = None
    if framed.masks is not None:
        kept = [framed.masks.rle_counts[i] for i in np.flatnonzero(keep)]
        masks = _warp_masks(decode_rle(kept, framed.masks.image_size), matrix, size, side)
    return FramedImage(
        pixels=pixels,
        valid_size=size,
        boxes=boxes,
        labels=framed.labels[keep],
        truth=truth,
        masks=masks,
        name=framed.name,
    )


def recolour(
    image: NDArray[np.uint8], max_gain: float, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Vary brightness, contrast and saturation by up to ``max_gain`` each."""
    brightness, contrast, colour = 1 + generator.uniform(-max_gain, max_gain, 3)
    grey = float(image.mean())
    weights = np.array([0.299, 0.587, 0.114])
    mix = colour * np.eye(3) + (1 - colour) * weights[None, :]
    matrix = np.zeros((3, 4))
    matrix[:, :3] = brightness * contrast * mix
    matrix[:, 3] = brightness * (1 - contrast) * grey
    return cv2.transform(image, matrix).astype(np.uint8)


def _warp(
    image: NDArray[np.uint8], matrix: NDArray[np.float64], size: tuple[int, int]
) -> NDArray[np.uint8]:
    return cv2.warpAffine(
        image, _of_pixels(matrix), size[::-1],
        flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE,
    ).astype(np.uint8)  # fmt: skip


def _warp_masks(
    masks: NDArray[np.bool_], matrix: NDArray[np.float64], size: tuple[int, int], side: int
) -> InstanceMasks:
    """Masks [n, h, w] moved into a frame of ``side``, whose part of ``size`` shows the image."""
    warped = np.zeros((len(masks), side, side), dtype=bool)
    for mask, target in zip(masks, warped, strict=True):
        soft = cv2.warpAffine(
            mask.astype(np.uint8) * np.uint8(255), _of_pixels(matrix), size[::-1],
            flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT,
        )  # fmt: skip
        target[: size[0], : size[1]] = soft >= _INSIDE
    return InstanceMasks(rle_counts=encode_rle(warped), image_size=(side, side))


def _of_pixels(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """``matrix`` for OpenCV, whose pixel centres are whole numbers; ours lie at .5."""
    shifted = matrix.copy()
    shifted[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5
    return shifted


def _transform_boxes(
    boxes: NDArray[np.float32], matrix: NDArray[np.float64]
) -> NDArray[np.float32]:
    corners = boxes.reshape(-1, 2, 2) @ matrix[:, :2].T + matrix[:, 2]
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)


def _visible(
    boxes: NDArray[np.float32], size: tuple[int, int], min_visible: float
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The boxes that are to be seen, clipped, and which of all they are."""
    clipped = clip_boxes(boxes, size)
    sides = clipped[:, 2:] - clipped[:, :2]
    keep = (box_area(clipped) >= min_visible * box_area(boxes)) & (
        sides.min(axis=1, initial=1e9) >= 2
    )
    return clipped[keep], keep
