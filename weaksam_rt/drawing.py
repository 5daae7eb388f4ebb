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
        captions: n texts, written at the box's top left corner; empty: none.
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
        if captions[i]:
            _caption(drawing, (left, top), captions[i], color, font)
    return canvas


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


def _caption(
    drawing: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    color: Color,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    left, top, right, bottom = drawing.textbbox((0, 0), text, font=font)
    height, padding = bottom - top, 3
    x, y = corner[0], max(0.0, corner[1] - height - 2 * padding)
    drawing.rectangle((x, y, x + right - left + 2 * padding, y + height + 2 * padding), fill=color)
    drawing.text((x + padding - left, y + padding - top), text, fill=(255, 255, 255), font=font)
