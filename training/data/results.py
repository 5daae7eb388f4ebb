"""Detections and proposals as COCO results JSON: the file format between the detection stages.

One entry per box: ``image_id``, ``category_id``, ``bbox`` (xywh, pixels), ``score``, and
``segmentation`` (run lengths) where there are masks; proposals have ``category_id`` 0 and a
``source`` (a value of ``PromptSource``). Images without an entry are
empty, not missing.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from training.data.coco import CocoFolder
from weaksam_rt.boxes import box_xywh_from_xyxy, box_xyxy_from_xywh
from weaksam_rt.errors import ArtifactError
from weaksam_rt.files import atomic_path
from weaksam_rt.types import Detections, ImageSize, InstanceMasks, PromptSource, Proposals

PROPOSAL_CATEGORY_ID = 0
"""The category id of a class-agnostic box; no class of a data set has it."""
_COORDINATE_DIGITS = 3
_SCORE_DIGITS = 7


def write_detections(
    path: Path, detections: Mapping[int, Detections], *, folder: CocoFolder
) -> None:
    """Write the detections of many images, atomically.

    Args:
        path: A ``.json`` file.
        detections: By image id; labels are positions in ``folder.class_names``.
        folder: The data set, for its category ids.
    """
    entries = []
    for image_id, found in detections.items():
        for index, (box_xywh, score, label) in enumerate(
            zip(
                _rounded_xywh(found.boxes),
                found.scores.tolist(),
                found.labels.tolist(),
                strict=True,
            )
        ):
            category_id = folder.category_ids[label]
            entry = _entry(image_id, category_id, box_xywh, round(score, _SCORE_DIGITS))
            if found.masks is not None:
                counts = found.masks.rle_counts[index].decode("ascii")
                entry["segmentation"] = {"size": list(found.image_size), "counts": counts}
            entries.append(entry)
    _write_entries(path, entries)


def read_detections(path: Path, *, folder: CocoFolder) -> dict[int, Detections]:
    """The detections of every image of ``folder``, best score first; empty where the file has none.
    Where one entry of the file has a mask, all images have masks.

    Raises:
        ArtifactError: The file is damaged, names an image or category that ``folder`` lacks, or has
            masks for some of its entries only.
    """
    label_of_id = {category_id: label for label, category_id in enumerate(folder.category_ids)}
    found = {}
    by_image = _entries_by_image(path, folder)
    has_masks = any(
        "segmentation" in entry for _, entries in by_image.values() for entry in entries
    )
    for image_id, (size, entries) in by_image.items():
        if unknown := {entry["category_id"] for entry in entries} - set(label_of_id):
            raise ArtifactError(
                f"{path} has category ids {sorted(unknown)}; {folder.root} has "
                f"{sorted(label_of_id)}; choose the data set that the detections were made on"
            )
        scores = np.array([entry["score"] for entry in entries], dtype=np.float32)
        order = np.argsort(-scores, kind="stable")
        labels = np.array([label_of_id[entry["category_id"]] for entry in entries], dtype=np.int64)
        found[image_id] = Detections(
            boxes=_boxes(entries)[order],
            scores=scores[order],
            labels=labels[order],
            image_size=size,
            masks=_masks([entries[i] for i in order], size, path) if has_masks else None,
        )
    return found


def write_proposals(path: Path, proposals: Mapping[int, Proposals]) -> None:
    """Write the class-agnostic boxes of many images, by image id, atomically."""
    entries = []
    for image_id, found in proposals.items():
        for box_xywh, score, source in zip(
            _rounded_xywh(found.boxes), found.scores.tolist(), found.sources.tolist(), strict=True
        ):
            entry = _entry(image_id, PROPOSAL_CATEGORY_ID, box_xywh, round(score, _SCORE_DIGITS))
            entries.append({**entry, "source": source})
    _write_entries(path, entries)


def read_proposals(path: Path, *, folder: CocoFolder) -> dict[int, Proposals]:
    """The proposals of every image of ``folder`` in the file's order; empty where it has none.

    A box without a ``source`` counts as one of the grid.

    Raises:
        ArtifactError: The file is damaged, or names an image that ``folder`` lacks.
    """
    return {
        image_id: Proposals(
            boxes=_boxes(entries),
            scores=np.array([entry["score"] for entry in entries], dtype=np.float32),
            sources=np.array([e.get("source", PromptSource.GRID) for e in entries], dtype=np.int32),
            image_size=size,
        )
        for image_id, (size, entries) in _entries_by_image(path, folder).items()
    }


def _entry(image_id: int, category_id: int, box_xywh: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": box_xywh, "score": score}


def _rounded_xywh(boxes: Any) -> list[list[float]]:
    xywh = box_xywh_from_xyxy(boxes).astype(np.float64)
    rounded: list[list[float]] = xywh.round(_COORDINATE_DIGITS).tolist()
    return rounded


def _boxes(entries: list[dict[str, Any]]) -> Any:
    return box_xyxy_from_xywh(np.array([entry["bbox"] for entry in entries], dtype=np.float32))


def _masks(entries: list[dict[str, Any]], size: ImageSize, path: Path) -> InstanceMasks:
    try:
        counts = tuple(entry["segmentation"]["counts"].encode("ascii") for entry in entries)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path} has a detection without a mask (compressed run lengths) beside others that "
            "have one; run the stage that makes it again"
        ) from error
    return InstanceMasks(rle_counts=counts, image_size=size)


def _write_entries(path: Path, entries: list[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(entries))


def _entries_by_image(
    path: Path, folder: CocoFolder
) -> dict[int, tuple[tuple[int, int], list[dict[str, Any]]]]:
    try:
        entries = json.loads(path.read_text())
        by_image = defaultdict(list)
        for entry in entries:
            by_image[entry["image_id"]].append(entry)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{path} is not a COCO results file ({error!r}); run the stage that makes it again"
        ) from error
    if unknown := set(by_image) - {record.image_id for record in folder.records}:
        raise ArtifactError(
            f"{path} has {len(unknown)} images that {folder.root} lacks, e.g. id {min(unknown)}; "
            "choose the data set that it was made on"
        )
    return {r.image_id: (r.image_size, by_image[r.image_id]) for r in folder.records}
