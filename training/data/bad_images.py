"""Images that cannot be used: an error that names the file before any work begins, or a listed
skip.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.data.coco import CocoFolder, ImageRecord, of_another_size, unreadable

_LOGGER = logging.getLogger(__name__)
_UPRIGHT_AFTER_TURN = range(5, 9)
"""EXIF orientations that swap width and height."""
_EXIF_ORIENTATION = 274


@dataclass(frozen=True, kw_only=True, slots=True)
class UsableImages:
    """A data set without the images that cannot be read."""

    folder: CocoFolder
    skipped: Mapping[str, str]
    """Why each image was left out, by its folder's and its own name; for the stage's manifest."""


def usable_images(folder: CocoFolder, *, skip_bad: bool) -> UsableImages:
    """Decode every image once, JPEGs at an eighth of their size, and leave out the bad ones.

    A stage calls this first: a damaged file then stops it in its first seconds, not after hours.

    Args:
        folder: The data set.
        skip_bad: Leave bad images out instead of raising.

    Raises:
        ValueError: An image is missing, damaged or of another size, and ``skip_bad`` is not set.
    """
    skipped: dict[str, str] = {}
    kept = []
    for record in folder.records:
        try:
            check_image(record)
        except ValueError as error:
            if not skip_bad:
                raise
            _LOGGER.warning("left out: %s", error)
            skipped[f"{folder.root.name}/{record.path.name}"] = str(error)
        else:
            kept.append(record)
    return UsableImages(folder=replace(folder, records=tuple(kept)), skipped=skipped)


def check_image(record: ImageRecord) -> None:
    """Raise ``ValueError`` that names the file unless it is there, whole, and of its size."""
    try:
        with Image.open(record.path) as image:
            size = (image.height, image.width)
            is_turned = image.getexif().get(_EXIF_ORIENTATION) in _UPRIGHT_AFTER_TURN
            image.draft("RGB", (image.width // 8, image.height // 8))
            image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise unreadable(record.path, error) from error
    if record.image_size not in ({size, size[::-1]} if is_turned else {size}):
        raise of_another_size(record, size)


def read_image(record: ImageRecord) -> NDArray[np.uint8]:
    """RGB uint8 [h, w, 3].

    Raises:
        ValueError: It cannot be read, or has another size than the annotations say.
    """
    image = record.image()
    size = image.shape[0], image.shape[1]
    if size != record.image_size:
        raise of_another_size(record, size)
    return image
