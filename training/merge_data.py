"""Join COCO-format folders, with chosen classes: ``python -m training.merge_data --help``.

The images are linked, not copied. Classes of the same name in different folders become one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from training.data.coco import CocoFolder, ImageRecord, load_coco_folder
from weaksam_rt.boxes import box_xywh_from_xyxy
from weaksam_rt.files import write_json


def merge_data(
    folders: tuple[Path, ...],
    output: Path,
    *,
    classes: tuple[str, ...],
    exclude: tuple[Path, ...] = (),
    negatives: bool = False,
) -> None:
    """Link the images that contain one of ``classes`` and write their annotations.

    Args:
        folders: Folders with ``images/`` and ``instances.json``.
        output: New folder of the same form. Image names get the number of their folder in front.
        classes: Classes to keep, in this order. Each must be in at least one folder.
        exclude: Folders whose images must not be used (matched by file name), for example the
            validation images of another set that shares some.
        negatives: Link the other images instead, those that contain none of ``classes``, for
            ``--negatives`` of the training stages.
    """
    excluded = {record.path.name for path in exclude for record in load_coco_folder(path).records}
    loaded = [load_coco_folder(path) for path in folders]
    known = {name for folder in loaded for name in folder.class_names}
    if unknown := [name for name in classes if name not in known]:
        raise ValueError(f"no folder has the class {unknown[0]!r}; they have {sorted(known)}")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (output / "images").mkdir(parents=True, exist_ok=True)
    for number, folder in enumerate(loaded):
        for record in folder.records:
            kept = _kept(record, folder, classes)
            if bool(kept) == negatives or record.path.name in excluded:
                continue
            name = f"{number}_{record.path.name}"
            link_image(record.path, output / "images" / name)
            height, width = record.image_size
            image_id = len(images) + 1
            images.append({"id": image_id, "file_name": name, "height": height, "width": width})
            for annotation in kept:
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(output / "instances.json", content)


def _kept(record: ImageRecord, folder: CocoFolder, classes: Sequence[str]) -> list[dict[str, Any]]:
    boxes_xywh = box_xywh_from_xyxy(record.boxes)
    has_masks = len(record.segmentations) == len(record.boxes)
    names = [folder.class_names[label] for label in record.labels]
    return [
        {
            "category_id": classes.index(name) + 1,
            "bbox": [float(v) for v in boxes_xywh[i]],
            "area": float(boxes_xywh[i, 2] * boxes_xywh[i, 3]),
            "iscrowd": int(record.is_crowd[i]),
            **({"segmentation": record.segmentations[i]} if has_masks else {}),
        }
        for i, name in enumerate(names)
        if name in classes
    ]


def link_image(source: Path, target: Path) -> None:
    """A symbolic link at ``target`` to the file ``source``; replaces an older one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.symlink_to(source.resolve())


if __name__ == "__main__":
    tyro.cli(merge_data)
