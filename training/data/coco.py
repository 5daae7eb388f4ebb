"""A folder ``images/`` beside an ``instances.json`` in COCO format: the one data format of all
stages.

Boxes and masks are read for evaluation, for the fully-supervised bound and for the class-agnostic
SAM. The weakly-supervised
stages read ``ImageRecord.tags`` and nothing else.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from weaksam_rt.boxes import box_xyxy_from_xywh
from weaksam_rt.masks import decode_rle
from weaksam_rt.types import ImageSize

_LEAVE_OUT = "leave such images out with --skip-bad"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRecord:
    """One image of a data set with what is known about it."""

    image_id: int
    path: Path
    image_size: ImageSize
    """(height, width) in pixels."""
    boxes: NDArray[np.float32]
    """[n, 4], XYXY, pixels."""
    labels: NDArray[np.int64]
    """[n], 0-based positions in ``CocoFolder.class_names``."""
    is_crowd: NDArray[np.bool_]
    """[n]; crowd regions are never positives and never false positives."""
    segmentations: tuple[Any, ...]
    """COCO polygons or RLE, one per instance, or empty where the set has no masks."""
    given_tags: tuple[int, ...] | None = None
    """0-based classes, where the set was tagged and has no boxes to take them from."""

    @property
    def tags(self) -> tuple[int, ...]:
        """The 0-based classes present, ascending: all that the weakly-supervised stages may see."""
        if self.given_tags is not None:
            return self.given_tags
        return tuple(int(label) for label in np.unique(self.labels[~self.is_crowd]))

    @property
    def has_known_boxes(self) -> bool:
        """``boxes`` are those of all objects, none where there is none; not so where the image was
        tagged and nothing else.
        """
        return not self.given_tags or len(self.boxes) > 0

    def image(self) -> NDArray[np.uint8]:
        """RGB uint8 [h, w, 3]; upright where the set's sizes are those of upright images.

        Raises:
            ValueError: The file is missing or damaged; the message names it.
        """
        try:
            with Image.open(self.path) as image:
                upright = ImageOps.exif_transpose(image)
                is_upright = (upright.height, upright.width) == self.image_size
                return np.array((upright if is_upright else image).convert("RGB"))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise unreadable(self.path, error) from error

    def masks(self) -> NDArray[np.bool_]:
        """The instance masks, [n, h, w]; raises ``ValueError`` where the set has none."""
        return decode_rle(self.rle_counts(), self.image_size)

    @property
    def has_masks(self) -> bool:
        """Every instance has its mask, and there is one."""
        return len(self.segmentations) == len(self.boxes) > 0

    def rle_counts(self) -> tuple[bytes, ...]:
        """COCO's compressed run lengths of the instance masks; raises like ``masks``."""
        if len(self.segmentations) != len(self.boxes):
            raise ValueError(
                f"{self.path.name} has {len(self.boxes)} boxes and {len(self.segmentations)} "
                "masks; choose a data set with a mask for each box"
            )
        return tuple(_rle(segmentation, *self.image_size) for segmentation in self.segmentations)


def unreadable(path: Path, error: Exception) -> ValueError:
    """The error of an image that cannot be decoded."""
    return ValueError(f"cannot read {path}: {error}; repair or remove it, or {_LEAVE_OUT}")


def of_another_size(record: ImageRecord, found: ImageSize) -> ValueError:
    """The error of an image of another size than its annotations say."""
    height, width = record.image_size
    return ValueError(
        f"{record.path} is {found[1]}x{found[0]}, the annotations say {width}x{height} (width x "
        f"height); correct one of them, or {_LEAVE_OUT}"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CocoFolder:
    """All records of one folder."""

    root: Path
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    """The file's own category id of each 0-based class."""
    records: tuple[ImageRecord, ...]


def load_coco_folder(
    root: Path, classes: tuple[str, ...] | None = None, *, annotations: Path | None = None
) -> CocoFolder:
    """Read ``root/instances.json``; images stay on disk.

    Args:
        root: Folder with ``images/`` and ``instances.json``.
        classes: Keep the instances of these classes only, labelled in this order. None keeps all,
            in id order.
        annotations: Another annotation file of the same images, for example pseudo boxes.

    An image entry may carry ``tags``, a list of class names: then these are its tags, and it needs
    no annotations (``training.tag_file`` writes such files).

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: A class is not in the file.
    """
    path = annotations or root / "instances.json"
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); write it again") from error
    ids = {c["name"]: c["id"] for c in sorted(content["categories"], key=lambda c: c["id"])}
    names = tuple(ids) if classes is None else classes
    if unknown := set(names) - set(ids):
        raise ValueError(
            f"{path} has no class {sorted(unknown)}, it has {list(ids)}; choose the classes among "
            "them, or annotations that know them"
        )
    label_of_id = {ids[name]: label for label, name in enumerate(names)}
    of_image = defaultdict(list)
    for annotation in content["annotations"]:
        if annotation["category_id"] in label_of_id:
            of_image[annotation["image_id"]].append(annotation)
    _check_belonging(path, content)
    label_of_name = {name: label for label, name in enumerate(names)}
    records = tuple(
        _record(root, image, of_image[image["id"]], label_of_id, label_of_name)
        for image in content["images"]
    )
    return CocoFolder(
        root=root, class_names=names, category_ids=tuple(ids[n] for n in names), records=records
    )


def _check_belonging(path: Path, content: dict[str, Any]) -> None:
    """Every annotation needs its image and its category, every tag its category."""
    images = {image["id"] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    names = {category["name"] for category in content["categories"]}
    for annotation in content["annotations"]:
        for key, known in (("image_id", images), ("category_id", categories)):
            if annotation[key] not in known:
                raise ValueError(
                    f"{path}: annotation {annotation.get('id')} has {key} {annotation[key]}, which "
                    "the file does not list; add it, or remove the annotation"
                )
    for image in content["images"]:
        if unknown := set(image.get("tags", ())) - names:
            raise ValueError(
                f"{path}: {image['file_name']} has the tag {min(unknown)!r}, which is no category "
                f"of the file ({sorted(names)}); add it, or remove the tag"
            )


def _record(
    root: Path,
    image: dict[str, Any],
    annotations: list[dict[str, Any]],
    label_of_id: dict[int, int],
    label_of_name: dict[str, int],
) -> ImageRecord:
    labels = [label_of_id[a["category_id"]] for a in annotations]
    given_tags = None
    if "tags" in image:
        given_tags = tuple(sorted(label_of_name[t] for t in image["tags"] if t in label_of_name))
    return ImageRecord(
        image_id=image["id"],
        path=root / "images" / image["file_name"],
        image_size=(image["height"], image["width"]),
        boxes=box_xyxy_from_xywh(np.array([a["bbox"] for a in annotations], dtype=np.float32)),
        labels=np.array(labels, dtype=np.int64),
        is_crowd=np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool),
        segmentations=tuple(a["segmentation"] for a in annotations if a.get("segmentation")),
        given_tags=given_tags,
    )


def _rle(segmentation: Any, height: int, width: int) -> bytes:
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    counts: bytes | str = rle["counts"]
    return counts.encode() if isinstance(counts, str) else counts
