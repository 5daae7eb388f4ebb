"""Bring Pascal VOC and COCO into the one form that all stages read:
``python -m training.convert_data voc|coco --help``.

Images are linked, not copied. The output is a folder with ``images/`` and ``instances.json``.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.progress import track

from training.data.voc import (
    VOC_CLASSES,
    VocAnnotation,
    read_voc_annotation,
    read_voc_masks,
    read_voc_split,
)
from training.merge_data import link_image
from weaksam_rt.boxes import box_xywh_from_xyxy
from weaksam_rt.files import write_json
from weaksam_rt.masks import encode_rle

_LOGGER = logging.getLogger(__name__)


def convert_voc(
    devkit: Path,
    output: Path,
    *,
    year: int = 2007,
    split: str = "trainval",
    masks: bool = False,
) -> None:
    """Convert a split of ``VOCdevkit``.

    Difficult objects become crowd boxes: they give an image no tag, need not be found, and are not
    wrong to find. Image ids are the digits of the image's name.

    Args:
        devkit: The folder ``VOCdevkit`` with ``VOC<year>/{Annotations,ImageSets,JPEGImages}``.
        output: New folder.
        year: Of the challenge.
        split: A list in ``ImageSets/Main``, for example trainval or test; with ``masks`` in
            ``ImageSets/Segmentation``, where the published mask AP of VOC 2012 is of ``val``.
        masks: Give the objects their masks of ``SegmentationObject``; objects without any are left
            out.

    Raises:
        ValueError: A file of the split is missing or damaged, or an object has an unknown class.
    """
    root = devkit / f"VOC{year}"
    kind = "Segmentation" if masks else "Main"
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    num_unmasked = 0
    for name in track(
        read_voc_split(root / "ImageSets" / kind / f"{split}.txt"),
        description="images",
        transient=True,
    ):
        found = read_voc_annotation(root / "Annotations" / f"{name}.xml")
        source = root / "JPEGImages" / found.file_name
        if not source.is_file():
            raise ValueError(f"{source} is missing; {split} of VOC{year} needs it")
        image_id = int("".join(c for c in name if c.isdigit()))
        height, width = found.image_size
        images.append(
            {"id": image_id, "file_name": found.file_name, "height": height, "width": width}
        )
        objects = _voc_objects(found, name)
        if masks:
            path = root / "SegmentationObject" / f"{name}.png"
            objects = _with_masks(objects, read_voc_masks(path, found.image_size, len(objects)))
            num_unmasked += len(found.boxes) - len(objects)
        for annotation in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
        link_image(source, output / "images" / found.file_name)
    categories = [{"id": i, "name": name} for i, name in enumerate(VOC_CLASSES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(output / "instances.json", content)
    if num_unmasked:
        _LOGGER.warning("left out %d objects without a mask", num_unmasked)
    _LOGGER.info("%d images, %d objects in %s", len(images), len(annotations), output)


def convert_coco(root: Path, output: Path, *, split: str = "train2017") -> None:
    """Convert a split of COCO; images, ids, masks and the official category ids stay as they are.

    The folder of images is linked as a whole. Objects with a box of no area (COCO has a few) are
    left out.

    Args:
        root: Folder with ``annotations/instances_<split>.json`` and ``<split>/``.
        output: New folder.
        split: For example train2014, val2014, train2017 or val2017.

    Raises:
        ValueError: A file of the split is missing or damaged.
    """
    path = root / "annotations" / f"instances_{split}.json"
    try:
        content = json.loads(path.read_text())
        entries, objects = content["images"], content["annotations"]
        categories = content["categories"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no COCO annotation file: {error!r}") from error
    there = {file.name for file in (root / split).iterdir()} if (root / split).is_dir() else set()
    missing = [entry["file_name"] for entry in entries if entry["file_name"] not in there]
    if missing:
        raise ValueError(
            f"{root / split / missing[0]} is missing, and {len(missing) - 1} more images of {split}"
        )
    annotations = [entry for entry in objects if min(entry["bbox"][2:]) > 0]
    if len(annotations) < len(objects):
        _LOGGER.warning("left out %d objects without area", len(objects) - len(annotations))
    keys = ("id", "file_name", "height", "width")
    images = [{key: entry[key] for key in keys} for entry in entries]
    link_image(root / split, output / "images")
    write_json(
        output / "instances.json",
        {"images": images, "annotations": annotations, "categories": categories},
    )
    _LOGGER.info("%d images, %d objects in %s", len(images), len(annotations), output)


def _voc_objects(found: VocAnnotation, name: str) -> list[dict[str, Any]]:
    if unknown := [c for c in found.names if c not in VOC_CLASSES]:
        raise ValueError(f"{name} has an object of the class {unknown[0]!r}, which VOC has not")
    boxes_xywh = box_xywh_from_xyxy(found.boxes).tolist()
    return [
        {
            "category_id": VOC_CLASSES.index(class_name) + 1,
            "bbox": box_xywh,
            "area": box_xywh[2] * box_xywh[3],
            "iscrowd": int(is_difficult),
        }
        for class_name, box_xywh, is_difficult in zip(
            found.names, boxes_xywh, found.is_difficult.tolist(), strict=True
        )
    ]


def _with_masks(objects: list[dict[str, Any]], masks: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Those that have a mask, with it."""
    size = list(masks.shape[1:])
    return [
        {
            **entry,
            "segmentation": {"size": size, "counts": counts.decode("ascii")},
            "area": int(mask.sum()),
        }
        for entry, mask, counts in zip(objects, masks, encode_rle(masks), strict=True)
        if mask.any()
    ]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tyro.extras.subcommand_cli_from_dict({"voc": convert_voc, "coco": convert_coco})
