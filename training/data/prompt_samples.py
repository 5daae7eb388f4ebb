"""Training samples of a promptable segmenter: a view of an image, some masks, a prompt for each.

It knows augmentation and how a person would point at an object; it knows no model. All randomness
comes from the generator passed in, so a sample is a function of the data and the seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from training.data.coco import ImageRecord, load_coco_folder
from weaksam_rt.masks import mask_to_box
from weaksam_rt.preprocessing import longest_side_frame

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_MAX_TRIES = 8
_INSIDE = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """How views differ from the pictures they are taken from."""

    whole_probability: float = 0.35
    """Share of views that show the whole picture, in [0, 1]."""
    min_crop: float = 0.4
    """Smallest side of a crop as a share of the picture's, in (0, 1]."""
    shrink_probability: float = 0.15
    """Share of views drawn smaller than the frame, in [0, 1]."""
    min_shrink: float = 0.5
    """Smallest longest side of a shrunk view as a share of the frame, in (0, 1]."""
    jitter: float = 0.3
    """Largest relative change of brightness, contrast and saturation, in [0, 1)."""
    min_area: int = 40
    """Masks with fewer pixels of the frame are not asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptConfig:
    """What kinds of prompts are drawn; what remains to 1 are random interior points."""

    box_probability: float = 0.45
    """Share of box prompts, in [0, 1]."""
    centre_probability: float = 0.25
    """Share of points at the most interior pixel, in [0, 1]."""
    box_jitter: float = 0.06
    """Standard deviation of a box side's shift as a share of the box's side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedImage:
    """A downsized picture with its masks, small enough to keep thousands in memory."""

    image: NDArray[np.uint8]
    """RGB [h, w, 3]."""
    rles: tuple[dict[str, Any], ...]
    """COCO run-length codes at the picture's size, at least one."""
    name: str = ""
    """Of the file, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSample:
    """One view with p prompted objects; the frame is square, the picture at its top left."""

    image: NDArray[np.uint8]
    """RGB [s, s, 3], zero beyond the picture."""
    valid_size: NDArray[np.int32]
    """[2]: (height, width) of the picture in the frame."""
    coverage: NDArray[np.float32]
    """[p, s / 2, s / 2]: the share of each 2x2 cell inside the object, in [0, 1]."""
    point_coords: NDArray[np.float32]
    """[p, 2, 2]: (x, y) in the frame: a point and a padding point, or two corners."""
    point_labels: NDArray[np.int32]
    """[p, 2]: (1, -1) for a point, (2, 3) for a box."""
    name: str = ""
    """Of the picture's file, for messages."""


def load_masked_images(root: Path, longest_side: int) -> list[MaskedImage]:
    """All images of a COCO folder that have at least one mask, downsized.

    Args:
        root: Folder with ``images/`` and ``instances.json``.
        longest_side: Larger pictures are reduced to this, in pixels.
    """
    images = (masked_image(r, longest_side) for r in load_coco_folder(root).records)
    return [image for image in images if image.rles]


def masked_image(record: ImageRecord, longest_side: int) -> MaskedImage:
    """Decode one record and reduce it; crowds and masks that vanish are left out."""
    side = min(longest_side, max(record.image_size))
    height, width = longest_side_frame(record.image_size, side).valid_size
    masks = [
        _resize(m.view(np.uint8) * np.uint8(255), height, width) >= _INSIDE
        for m in _instances(record)
    ]
    return MaskedImage(
        image=_resize(record.image(), height, width),
        rles=tuple(coco_mask.encode(np.asfortranarray(m.view(np.uint8))) for m in masks if m.any()),
        name=record.path.name,
    )


def draw_sample(
    image: MaskedImage,
    *,
    frame_size: int,
    num_prompts: int,
    augment: AugmentConfig,
    prompts: PromptConfig,
    generator: np.random.Generator,
) -> PromptSample:
    """A random view of ``image`` with ``num_prompts`` prompts; objects repeat where there are few.

    Args:
        image: With at least one mask.
        frame_size: Side of the frame in pixels, even.
        num_prompts: At least 1.
        augment: How the view is drawn.
        prompts: How the prompts are drawn.
        generator: The only source of randomness.
    """
    view, soft_masks = _draw_view(image, frame_size, num_prompts, augment, generator)
    chosen = [soft_masks[i % len(soft_masks)] for i in range(num_prompts)]
    insides = [mask >= min(_INSIDE, mask.max()) for mask in chosen]
    drawn = [draw_prompt(inside, prompts, generator) for inside in insides]
    stacked = np.stack(chosen).astype(np.float32) / 255
    half = frame_size // 2
    canvas = np.zeros((frame_size, frame_size, 3), dtype=np.uint8)
    canvas[: view.shape[0], : view.shape[1]] = jitter_colours(view, augment.jitter, generator)
    return PromptSample(
        image=canvas,
        valid_size=np.array(view.shape[:2], dtype=np.int32),
        coverage=stacked.reshape(num_prompts, half, 2, half, 2).mean(axis=(2, 4)),
        point_coords=np.stack([coords for coords, _ in drawn]),
        point_labels=np.stack([labels for _, labels in drawn]),
        name=image.name,
    )


def draw_prompt(
    mask: NDArray[np.bool_], config: PromptConfig, generator: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Coordinates [2, 2] and labels [2] of a box or point prompt for a mask that is not empty."""
    kind = generator.random()
    if kind < config.box_probability:
        corners = jitter_box(mask_to_box(mask), config.box_jitter, generator)
        limit = np.array(mask.shape[::-1], dtype=np.float32)
        return np.clip(corners.reshape(2, 2), 0, limit), np.array([2, 3], dtype=np.int32)
    if kind < config.box_probability + config.centre_probability:
        point = most_interior_point(mask)
    else:
        point = random_interior_point(mask, generator)
    coords = np.stack([point, np.zeros(2, dtype=np.float32)])
    return coords, np.array([1, -1], dtype=np.int32)


def most_interior_point(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(x, y) of the pixel farthest from the outside of a mask that is not empty; [2].

    Beyond the picture is outside. Of equals, the first in reading order.
    """
    distance = cv2.distanceTransform(np.pad(mask, 1).view(np.uint8), cv2.DIST_L2, 5)
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return np.array([x - 1, y - 1], dtype=np.float32)


def random_interior_point(
    mask: NDArray[np.bool_], generator: np.random.Generator
) -> NDArray[np.float32]:
    """(x, y) of a pixel of a mask that is not empty, all alike probable; [2]."""
    flat = np.flatnonzero(mask)
    y, x = np.unravel_index(generator.choice(flat), mask.shape)
    return np.array([x, y], dtype=np.float32)


def jitter_box(
    box: NDArray[np.float32], spread: float, generator: np.random.Generator
) -> NDArray[np.float32]:
    """``box`` with each side moved by a normal share of its length, at most three deviations."""
    sides = np.tile(box[2:] - box[:2], 2)
    shift = np.clip(generator.normal(size=4), -3, 3) * spread
    return (box + shift * sides).astype(np.float32)


def jitter_colours(
    image: NDArray[np.uint8], amount: float, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Brightness, contrast and saturation each changed by up to ``amount``."""
    brightness, contrast, saturation = generator.uniform(1 - amount, 1 + amount, size=3)
    pixels = image.astype(np.float32)
    grey = (pixels @ _LUMA)[..., None]
    pixels = grey + (pixels - grey) * np.float32(saturation)
    mean = np.float32(grey.mean())
    pixels = mean * np.float32(brightness) + (pixels - mean) * np.float32(contrast)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _draw_view(
    image: MaskedImage,
    frame_size: int,
    num_masks: int,
    config: AugmentConfig,
    generator: np.random.Generator,
) -> tuple[NDArray[np.uint8], list[NDArray[np.uint8]]]:
    """A view in which masks are visible, and 1 to ``num_masks`` of them, soft, in the frame."""
    for attempt in range(_MAX_TRIES + 1):
        whole = attempt == _MAX_TRIES or generator.random() < config.whole_probability
        shrinks = attempt < _MAX_TRIES and generator.random() < config.shrink_probability
        share = generator.uniform(config.min_shrink, 1) if shrinks else 1.0
        crop = _whole(image) if whole else _random_crop(image, config.min_crop, generator)
        height, width = image.image[crop].shape[:2]
        side = max(1, round(frame_size * share))
        size = longest_side_frame((height, width), side).valid_size
        flip = slice(None, None, -1 if generator.random() < 0.5 else 1)
        # The last try takes whatever there is, so that every image gives a sample.
        level, min_area = (1, 1) if attempt == _MAX_TRIES else (_INSIDE, config.min_area)
        soft: list[NDArray[np.uint8]] = []
        for index in generator.permutation(len(image.rles)):
            cropped = coco_mask.decode(image.rles[index])[crop][:, flip]
            mask = _into_frame(cropped * np.uint8(255), size, frame_size)
            if (mask >= level).sum() >= min_area:
                soft.append(mask)
            if len(soft) == num_masks:
                break
        if soft:
            break
    return _resize(image.image[crop][:, flip], *size), soft


def _whole(image: MaskedImage) -> tuple[slice, slice]:
    return slice(0, image.image.shape[0]), slice(0, image.image.shape[1])


def _random_crop(
    image: MaskedImage, min_crop: float, generator: np.random.Generator
) -> tuple[slice, slice]:
    shares = np.clip(generator.uniform(min_crop, 1) * generator.uniform(0.8, 1.25, 2), min_crop, 1)
    sides = np.array(image.image.shape[:2])
    lengths = np.maximum(np.round(sides * shares), 1).astype(int)
    starts = generator.integers(0, sides - lengths + 1)
    rows, columns = (slice(s, s + n) for s, n in zip(starts, lengths, strict=True))
    return rows, columns


def _into_frame(
    mask: NDArray[np.uint8], size: tuple[int, int], frame_size: int
) -> NDArray[np.uint8]:
    canvas = np.zeros((frame_size, frame_size), dtype=np.uint8)
    canvas[: size[0], : size[1]] = _resize(mask, *size)
    return canvas


def _resize(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    shrinks = height * width < pixels.shape[0] * pixels.shape[1]
    mode = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=mode)
    return np.asarray(resized, dtype=np.uint8)


def _instances(record: ImageRecord) -> Sequence[NDArray[np.bool_]]:
    return [m for m, crowd in zip(record.masks(), record.is_crowd, strict=True) if not crowd]
