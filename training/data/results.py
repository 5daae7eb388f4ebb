"""Detections and proposals as COCO results JSON: the file format between the detection stages.

One entry per box: ``image_id``, ``category_id``, ``bbox`` (xywh, pixels), ``score``, and
``segmentation`` (run lengths) where there are masks; proposals have ``category_id`` 0 and a
``source`` (a value of ``PromptSource``). Images without an entry are
empty, not missing.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data.coco import CocoFolder
from weaksam_rt.boxes import box_xywh_from_xyxy, box_xyxy_from_xywh
from weaksam_rt.errors import ArtifactError
from weaksam_rt.files import atomic_path
from weaksam_rt.types import Detections, ImageSize, InstanceMasks, PromptSource, Proposals

PROPOSAL_CATEGORY_ID = 0
"""The category id of a class-agnostic box; no class of a data set has it."""
_SEPARATOR = ",\n"
"""Between images: a line of the file holds one, so that it can be read line by line."""
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


def write_proposals(
    path: Path, proposals: Mapping[int, Proposals] | Iterable[tuple[int, Proposals]]
) -> None:
    """Write the class-agnostic boxes of many images, by image id, atomically.

    Of an iterable of pairs one image at a time is held.
    """
    pairs = proposals.items() if isinstance(proposals, Mapping) else proposals
    with atomic_path(path) as temporary, temporary.open("w") as file:
        file.write("[")
        separator = ""
        for image_id, found in pairs:
            if entries := _proposal_entries(image_id, found):
                file.write(separator + json.dumps(entries)[1:-1])
                separator = _SEPARATOR
        file.write("]")


def _proposal_entries(image_id: int, found: Proposals) -> list[dict[str, Any]]:
    return [
        {
            **_entry(image_id, PROPOSAL_CATEGORY_ID, box_xywh, round(score, _SCORE_DIGITS)),
            "source": source,
        }
        for box_xywh, score, source in zip(
            _rounded_xywh(found.boxes), found.scores.tolist(), found.sources.tolist(), strict=True
        )
    ]


def read_proposals(path: Path, *, folder: CocoFolder) -> dict[int, Proposals]:
    """The proposals of every image of ``folder`` in the file's order; empty where it has none.

    A box without a ``source`` counts as one of the grid. What ``write_proposals`` wrote is read
    image by image, so that only arrays are held; any other layout of the JSON is read at once.

    Raises:
        ArtifactError: The file is damaged, or names an image that ``folder`` lacks.
    """
    rows: dict[int, list[NDArray[np.float32]]] = defaultdict(list)
    try:
        for entries in _parts_of_array(path):
            of_image = defaultdict(list)
            for entry in entries:
                source = entry.get("source", PromptSource.GRID)
                of_image[entry["image_id"]].append((*entry["bbox"], entry["score"], source))
            for image_id, found in of_image.items():
                rows[image_id].append(np.array(found, dtype=np.float32).reshape(-1, 6))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is not a COCO results file ({error!r}); run the stage that makes it again"
        ) from error
    _check_known(path, rows, folder)
    return {
        record.image_id: _proposals_of_rows(rows.pop(record.image_id, []), record.image_size)
        for record in folder.records
    }


def _proposals_of_rows(parts: list[NDArray[np.float32]], size: tuple[int, int]) -> Proposals:
    rows = np.concatenate([np.zeros((0, 6), np.float32), *parts])
    return Proposals(
        boxes=box_xyxy_from_xywh(rows[:, :4]),
        scores=rows[:, 4].copy(),
        sources=rows[:, 5].astype(np.int32),
        image_size=size,
    )


def _parts_of_array(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The entries of a JSON array: line by line where the first line holds whole entries."""
    with path.open() as file:
        first = file.readline()
        opened = _without_end(first)
        try:
            head = json.loads(f"{opened}]")
        except ValueError:
            head = []
        if not head:
            yield json.loads(first + file.read())
            return
        yield head
        for line in file:
            yield json.loads(f"[{_without_end(line)}]")


def _without_end(line: str) -> str:
    return line.strip().removesuffix("]").removesuffix(",")


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


def _check_known(path: Path, by_image: Mapping[int, Any], folder: CocoFolder) -> None:
    if unknown := set(by_image) - {record.image_id for record in folder.records}:
        raise ArtifactError(
            f"{path} has {len(unknown)} images that {folder.root} lacks, e.g. id {min(unknown)}; "
            "choose the data set that it was made on"
        )


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
    _check_known(path, by_image, folder)
    return {r.image_id: (r.image_size, by_image[r.image_id]) for r in folder.records}
