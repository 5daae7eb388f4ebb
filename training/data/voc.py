"""Annotations of Pascal VOC as they are distributed: one XML file an image, split lists as text."""

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from weaksam_rt.types import ImageSize

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
"""In VOC's own, alphabetical order."""


_BORDER = 255


@dataclass(frozen=True, kw_only=True, slots=True)
class VocAnnotation:
    """The objects of one image."""

    file_name: str
    image_size: ImageSize
    """(height, width) in pixels."""
    boxes: NDArray[np.float32]
    """[n, 4], XYXY, pixels; VOC counts pixels from 1 and includes the last one."""
    names: tuple[str, ...]
    """Class of each box."""
    is_difficult: NDArray[np.bool_]
    """[n]; neither to be found nor wrong to find."""


def read_voc_annotation(path: Path) -> VocAnnotation:
    """Read one file of ``Annotations/``.

    Raises:
        ValueError: The file is missing, damaged, or no VOC annotation.
    """
    try:
        root = ElementTree.parse(path).getroot()
        objects = root.findall("object")
        corners = [
            [float(_text(item, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
            for item in objects
        ]
        return VocAnnotation(
            file_name=_text(root, "filename"),
            image_size=(int(_text(root, "size/height")), int(_text(root, "size/width"))),
            # The first pixel, 1, begins at coordinate 0; the last one ends at its own number.
            boxes=(np.array(corners).reshape(-1, 4) - np.array([1, 1, 0, 0])).astype(np.float32),
            names=tuple(_text(item, "name") for item in objects),
            is_difficult=np.array(
                [item.findtext("difficult", "0").strip() == "1" for item in objects], dtype=bool
            ),
        )
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path} is no VOC annotation: {error}") from error


def read_voc_masks(path: Path, image_size: ImageSize, num_objects: int) -> NDArray[np.bool_]:
    """Read one file of ``SegmentationObject/``: the k-th object of the annotation has the value k,
    0 is background and 255 a border that belongs to none.

    Args:
        path: PNG with a palette.
        image_size: (height, width) that it must have.
        num_objects: Of the annotation.

    Returns:
        [n, h, w]; an object without pixels has none here.

    Raises:
        ValueError: The file is missing, damaged, of another size, or has more objects.
    """
    try:
        with Image.open(path) as image:
            if image.mode != "P" or (image.height, image.width) != image_size:
                raise ValueError(
                    f"mode {image.mode} of {image.height}x{image.width} pixels, expected mode P of "
                    f"{image_size[0]}x{image_size[1]}"
                )
            numbers = np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no VOC segmentation: {error}") from error
    there = numbers[numbers != _BORDER]
    if there.max(initial=0) > num_objects:
        raise ValueError(
            f"{path} has an object {there.max()}, its annotation has {num_objects} objects"
        )
    return np.equal(numbers, np.arange(1, num_objects + 1)[:, None, None])


def read_voc_split(path: Path) -> tuple[str, ...]:
    """Image names of a list in ``ImageSets/Main/``, without endings.

    Raises:
        ValueError: The list is missing, empty, or one of a class (with a second column).
    """
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.txt") if "_" not in p.stem)
        raise ValueError(f"{path} is missing; this tree has the splits {there}")
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    if not rows or any(len(row) != 1 for row in rows):
        raise ValueError(f"{path} is no list of images, one name a line")
    return tuple(name for (name,) in rows)


def _text(item: ElementTree.Element, path: str) -> str:
    text = item.findtext(path)
    if text is None or not text.strip():
        raise ValueError(f"no <{path}>")
    return text.strip()
