"""Annotated pictures: boxes, labels, masks and points drawn on an image."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from weaksam_rt.masks import decode_rle
from weaksam_rt.types import InstanceMasks

Color = tuple[int, int, int]

PALETTE: tuple[Color, ...] = (
    (230, 80, 40), (40, 130, 230), (50, 170, 80), (200, 60, 180), (240, 170, 30),
    (20, 170, 180), (130, 90, 220), (170, 130, 60), (220, 50, 110), (110, 160, 30),
)  # fmt: skip
"""Colours far apart from each other; class i takes colour i modulo their number."""
_MASK_OPACITY = 0.45
_PADDING = 3
"""Around a caption, in pixels."""


def draw_instances(
    image: NDArray[np.uint8],
    boxes: NDArray[np.float32],
    captions: Sequence[str],
    colors: Sequence[int],
    masks: InstanceMasks | None = None,
) -> Image.Image:
    """Draw instances, the first one on top.

    Args:
        image: RGB uint8 [h, w, 3].
        boxes: [n, 4], XYXY in pixels.
        captions: n texts, written at a corner of the box where none stands yet; empty: none.
        colors: n numbers, taken modulo the palette.
        masks: n masks, blended over the image.
    """
    canvas = Image.fromarray(image if masks is None else _blend(image, masks, colors))
    line_width = max(2, round(max(canvas.size) / 300))
    font = ImageFont.load_default(size=max(11, round(max(canvas.size) / 45)))
    drawing = ImageDraw.Draw(canvas)
    for i in reversed(range(len(boxes))):
        left, top, right, bottom = (float(v) for v in boxes[i])
        color = PALETTE[colors[i] % len(PALETTE)]
        if right > left and bottom > top:
            drawing.rectangle((left, top, right, bottom), outline=color, width=line_width)
    captioned = [i for i in range(len(boxes)) if captions[i]]
    extents = [drawing.textbbox((0, 0), captions[i], font=font) for i in captioned]
    sizes = [
        (float(right - left + 2 * _PADDING), float(bottom - top + 2 * _PADDING))
        for left, top, right, bottom in extents
    ]
    places = caption_places(boxes[captioned], sizes, canvas.size)
    for i, (left, top, _, _), (width, height), (x, y) in zip(
        captioned, extents, sizes, places, strict=True
    ):
        color = PALETTE[colors[i] % len(PALETTE)]
        drawing.rectangle((x, y, x + width, y + height), fill=color)
        corner = x + _PADDING - left, y + _PADDING - top
        drawing.text(corner, captions[i], fill=(255, 255, 255), font=font)
    return canvas


def caption_places(
    boxes: NDArray[np.float32],
    sizes: Sequence[tuple[float, float]],
    canvas_size: tuple[int, int],
) -> list[tuple[float, float]]:
    """Where captions stand: outside or inside at the box's upper edge, else at its lower one,
    flush left or right, at the first place where they cover none before; where there is none,
    outside at the upper left.

    Args:
        boxes: [n, 4], XYXY in pixels; the first ones choose first.
        sizes: n widths and heights of captions.
        canvas_size: (width, height) of the picture, which captions do not leave.

    Returns:
        n upper left corners (x, y).
    """
    places: list[tuple[float, float]] = []
    taken: list[tuple[float, float, float, float]] = []
    for (left, top, right, bottom), (width, height) in zip(boxes.tolist(), sizes, strict=True):
        corners = [
            (
                min(max(x, 0.0), max(canvas_size[0] - width, 0.0)),
                min(max(y, 0.0), max(canvas_size[1] - height, 0.0)),
            )
            for y in (top - height, top, bottom - height, bottom)
            for x in (left, right - width)
        ]
        is_free = [
            not any(
                x < t_right and t_left < x + width and y < t_bottom and t_top < y + height
                for t_left, t_top, t_right, t_bottom in taken
            )
            for x, y in corners
        ]
        x, y = corners[is_free.index(True) if True in is_free else 0]
        places.append((x, y))
        taken.append((x, y, x + width, y + height))
    return places


def draw_points(
    canvas: Image.Image, points: NDArray[np.float32], colors: Sequence[Color]
) -> Image.Image:
    """Draw points (x, y) [n, 2] on ``canvas`` as ringed dots; returns ``canvas``."""
    drawing = ImageDraw.Draw(canvas)
    radius = max(3, round(max(canvas.size) / 150))
    for (x, y), color in zip(points, colors, strict=True):
        extent = (x - radius, y - radius, x + radius, y + radius)
        drawing.ellipse(extent, fill=color, outline=(255, 255, 255), width=max(1, radius // 3))
    return canvas


def _blend(
    image: NDArray[np.uint8], masks: InstanceMasks, colors: Sequence[int]
) -> NDArray[np.uint8]:
    blended = image.astype(np.float32)
    for i in reversed(range(len(masks))):
        mask = decode_rle(masks.rle_counts[i : i + 1], masks.image_size)[0]
        color = np.array(PALETTE[colors[i] % len(PALETTE)], np.float32)
        blended[mask] = (1 - _MASK_OPACITY) * blended[mask] + _MASK_OPACITY * color
    return blended.astype(np.uint8)
