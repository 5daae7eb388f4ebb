"""Contact sheets of images with boxes and masks, to look at what a stage made."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from weaksam_rt.drawing import draw_instances
from weaksam_rt.files import atomic_path
from weaksam_rt.types import Detections

TRUTH_COLOUR = (255, 255, 255)
"""The colour of true boxes."""
_MARGIN_PX = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One cell of a contact sheet."""

    image: NDArray[np.uint8]
    """RGB [h, w, 3]."""
    detections: Detections
    """Drawn in colour with name and score, and with masks where it has some."""
    truth_boxes: NDArray[np.float32]
    """[n, 4], XYXY, drawn thin and white; may be empty."""


def save_contact_sheet(
    path: Path,
    pictures: Sequence[Picture],
    *,
    class_names: Sequence[str],
    num_columns: int = 5,
    cell_px: int = 256,
) -> None:
    """Write ``pictures`` as one image, row by row, each scaled to fit a square of ``cell_px``."""
    num_rows = max(1, -(-len(pictures) // num_columns))
    pitch = cell_px + _MARGIN_PX
    sheet = Image.new("RGB", (num_columns * pitch, num_rows * pitch), (32, 32, 32))
    for index, picture in enumerate(pictures):
        row, column = divmod(index, num_columns)
        cell = draw_picture(picture, class_names=class_names, longest_px=cell_px)
        sheet.paste(cell, (column * pitch, row * pitch))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="JPEG" if path.suffix == ".jpg" else "PNG", quality=85)


def draw_picture(picture: Picture, *, class_names: Sequence[str], longest_px: int) -> Image.Image:
    """The image with its boxes and masks, its longer side scaled to ``longest_px``."""
    image = _with_masks(picture)
    scale = longest_px / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    found = picture.detections
    cell = draw_instances(
        np.asarray(image),
        found.boxes * np.float32(scale),
        [
            f"{class_names[label]} {score:.2f}"
            for label, score in zip(found.labels.tolist(), found.scores.tolist(), strict=True)
        ],
        found.labels.tolist(),
    )
    drawing = ImageDraw.Draw(cell)
    for left, top, right, bottom in (picture.truth_boxes * scale).tolist():
        if right > left and bottom > top:
            drawing.rectangle((left, top, right, bottom), outline=TRUTH_COLOUR)
    return cell


def _with_masks(picture: Picture) -> Image.Image:
    found = picture.detections
    if found.masks is None:
        return Image.fromarray(picture.image)
    no_boxes = np.zeros((0, 4), np.float32)
    return draw_instances(picture.image, no_boxes, (), found.labels.tolist(), found.masks)
