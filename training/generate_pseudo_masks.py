"""Pseudo instance masks: prompt SAM with every pseudo box, ``python -m
training.generate_pseudo_masks --help``.

Writes ``instances.json`` in COCO format: the annotations of the pseudo boxes, each with a
``segmentation`` (run lengths) and SAM's ``predicted_iou``; ``pictures.jpg`` shows some. One small
file per finished image is kept in ``parts/``, so a killed run goes on where it was. True masks of
the data set are compared with, never copied.
"""

import asyncio
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.logging import RichHandler

from training.data.bad_images import usable_images
from training.data.coco import CocoFolder, ImageRecord, load_coco_folder
from training.engine.progress import stage_progress
from training.engine.stage import Stage, open_stage
from training.evaluation.pictures import Picture, save_contact_sheet
from training.models.sam import load_sam
from training.pseudo_labels.masks import (
    BoxMasks,
    MaskOutput,
    choose_masks,
    compare_with_truth,
    fill_of_boxes,
)
from training.torch_backend import TrainedModels, sam_models
from weaksam_rt.boxes import box_area, box_intersection
from weaksam_rt.config import PipelineConfig
from weaksam_rt.errors import ArtifactError
from weaksam_rt.files import write_json
from weaksam_rt.pipeline import WeakSamPipeline
from weaksam_rt.proposals import ProposalConfig
from weaksam_rt.types import Detections, InstanceMasks

_LOGGER = logging.getLogger(__name__)

ANNOTATIONS_NAME = "instances.json"
_PARTS = "parts"


@dataclass(frozen=True, kw_only=True, slots=True)
class PseudoMaskRecipe:
    """Everything that decides the masks, besides the boxes and SAM."""

    sam_output: MaskOutput = "single"
    """Which of SAM's masks of a box is learnt from. The paper does not say; see ADR 0015."""
    max_prompts_per_call: int = 8
    """Boxes of one image in one call of SAM's decoder."""
    mixed_precision: bool = False
    """SAM in bfloat16: faster on CPUs with matrix units, masks differ by single pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PseudoMaskConfig:
    """Instance masks for the pseudo boxes of a data set."""

    data: Path
    """Folder with ``images/`` and ``instances.json``; its boxes and masks only measure."""
    annotations: Path
    """Pseudo boxes: ``instances.json`` of ``training.generate_pseudo_labels``."""
    sam: Path
    """A SAM of ``train_sam``, or an official checkpoint."""
    output: Path
    """Folder of this stage."""
    recipe: PseudoMaskRecipe = field(default_factory=PseudoMaskRecipe)
    skip_bad: bool = False
    """Leave unreadable images out, with their boxes, and list them in the manifest."""
    num_pictures: int = 25
    """Images on the contact sheet."""
    device: str = "cpu"
    """Torch device of SAM."""
    num_threads: int = 2
    """CPU threads of torch."""


def generate_pseudo_masks(config: PseudoMaskConfig) -> None:
    """Make, or go on making, the masks; nothing is done where they are complete."""
    torch.set_num_threads(config.num_threads)
    stage = open_stage(
        "generate_pseudo_masks",
        config.output,
        config=config.recipe,
        inputs={"data": config.data, "annotations": config.annotations, "sam": config.sam},
    )
    if stage.finished:
        return
    loaded = load_coco_folder(config.data, annotations=config.annotations)
    usable = usable_images(loaded, skip_bad=config.skip_bad)
    trained = sam_models(
        load_sam(config.sam), device=config.device, mixed_precision=config.recipe.mixed_precision
    )
    found = _mask_all(stage, usable.folder, trained, config.recipe)
    content = json.loads(config.annotations.read_text())
    write_json(stage.directory / ANNOTATIONS_NAME, annotations_with_masks(content, found))
    truth = load_coco_folder(config.data, loaded.class_names)
    metrics = {**statistics(usable.folder, found, truth), "skipped": usable.skipped}
    _save_pictures(stage.directory / "pictures.jpg", usable.folder, found, config.num_pictures)
    _LOGGER.info("%s", json.dumps(metrics, indent=2))
    stage.finish(outputs=[ANNOTATIONS_NAME], metrics=metrics)


def annotations_with_masks(
    content: Mapping[str, Any], found: Mapping[int, BoxMasks]
) -> dict[str, Any]:
    """A COCO annotation file with masks beside the boxes.

    Boxes stay as they are. An annotation with an empty mask goes: what SAM does not see inside a
    box cannot be learnt. Those of images that were left out go too.

    Args:
        content: The annotation file of the boxes.
        found: By image id, in the order of the image's annotations in ``content``.
    """
    of_image = defaultdict(list)
    for annotation in content["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    annotations = []
    for image_id, masks in found.items():
        size = list(masks.masks.image_size)
        for annotation, counts, predicted, box in zip(
            of_image[image_id],
            masks.masks.rle_counts,
            masks.predicted_iou.tolist(),
            masks.mask_boxes,
            strict=True,
        ):
            if box.any():
                segmentation = {"size": size, "counts": counts.decode("ascii")}
                more = {"segmentation": segmentation, "predicted_iou": round(predicted, 4)}
                annotations.append({**annotation, **more})
    images = [image for image in content["images"] if image["id"] in found]
    return {"images": images, "categories": content["categories"], "annotations": annotations}


def statistics(
    folder: CocoFolder, found: Mapping[int, BoxMasks], truth: CocoFolder
) -> dict[str, Any]:
    """What the masks are like, over the set and by class; None where there is nothing to average.

    Args:
        folder: With the pseudo boxes.
        found: By image id.
        truth: The same data set with its own boxes; ``evaluation_only`` is None where it has no
            masks.

    Returns:
        Per group: ``num_masks``; ``num_empty``; ``mean_predicted_iou``; ``mean_fill``, area of the
        mask over that of the box; ``mean_inside``, share of the mask's own box inside the pseudo
        box; and ``evaluation_only``: IoU with the true masks of objects whose boxes were found.
    """
    rows = _rows(folder, found)
    compared = _compared(folder, found, truth)
    by_class = {
        name: _summary(rows[rows[:, 0] == label], _of_label(compared, label))
        for label, name in enumerate(folder.class_names)
    }
    return {**_summary(rows, compared), "by_class": by_class}


def _rows(folder: CocoFolder, found: Mapping[int, BoxMasks]) -> Any:
    """[n, 5]: label, whether empty, predicted IoU, fill, share inside the box."""
    rows = [np.zeros((0, 5))]
    for record in folder.records:
        masks = found[record.image_id]
        inside = np.diag(box_intersection(masks.mask_boxes, record.boxes))
        columns = (
            record.labels,
            ~masks.mask_boxes.any(axis=1),
            masks.predicted_iou,
            fill_of_boxes(record.boxes, masks.masks),
            inside / np.maximum(box_area(masks.mask_boxes), 1e-6),
        )
        rows.append(np.stack([column.astype(np.float64) for column in columns], axis=1))
    return np.concatenate(rows)


def _compared(folder: CocoFolder, found: Mapping[int, BoxMasks], truth: CocoFolder) -> Any:
    """[k, 3]: label, IoU of the pseudo mask, IoU of the filled box; None without true masks."""
    of_image = {record.image_id: record for record in truth.records if record.has_masks}
    if not of_image:
        return None
    rows = [np.zeros((0, 3))]
    for record in folder.records:
        if record.image_id in of_image:
            one = compare_with_truth(
                record.boxes,
                record.labels,
                found[record.image_id].masks,
                of_image[record.image_id],
            )
            rows.append(np.stack([one.labels, one.iou, one.filled_box_iou], axis=1))
    return np.concatenate(rows)


def _of_label(compared: Any, label: int) -> Any:
    return None if compared is None else compared[compared[:, 0] == label]


def _summary(rows: Any, compared: Any) -> dict[str, Any]:
    evaluation = None
    if compared is not None:
        iou = compared[:, 1]
        evaluation = {
            "num_matched": len(iou),
            "mean_iou": _mean(iou),
            "share_iou50": _mean(iou >= 0.5),
            "share_iou75": _mean(iou >= 0.75),
            "mean_iou_of_filled_boxes": _mean(compared[:, 2]),
        }
    seen = rows[rows[:, 1] == 0]
    return {
        "num_masks": len(seen),
        "num_empty": len(rows) - len(seen),
        "mean_predicted_iou": _mean(seen[:, 2]),
        "mean_fill": _mean(seen[:, 3]),
        "mean_inside": _mean(seen[:, 4]),
        "evaluation_only": evaluation,
    }


def _mean(values: Any) -> float | None:
    return float(values.mean()) if len(values) else None


def _mask_all(
    stage: Stage, folder: CocoFolder, trained: TrainedModels, recipe: PseudoMaskRecipe
) -> dict[int, BoxMasks]:
    """Masks by image id, of all images."""
    settings = PipelineConfig(
        proposals=ProposalConfig(max_prompts_per_call=recipe.max_prompts_per_call)
    )
    pipeline = WeakSamPipeline(trained.backend, trained.models, settings)
    found = {}
    with stage_progress() as progress:
        task = progress.add_task("generate_pseudo_masks", total=len(folder.records))
        for record in folder.records:
            path = stage.directory / _PARTS / f"{record.image_id}.json"
            masks = read_part(path, record)
            if masks is None:
                masks = asyncio.run(_mask_image(pipeline, record, recipe))
                write_part(path, masks)
            found[record.image_id] = masks
            progress.advance(task)
    return found


async def _mask_image(
    pipeline: WeakSamPipeline, record: ImageRecord, recipe: PseudoMaskRecipe
) -> BoxMasks:
    if len(record.boxes) == 0:
        return _box_masks(record, (), [], [])
    result = await pipeline.segment(
        record.image(), boxes=record.boxes, multimask=recipe.sam_output == "best_predicted"
    )
    return choose_masks(result)


def write_part(path: Path, masks: BoxMasks) -> None:
    """Write the masks of one image, atomically."""
    content = {
        "counts": [counts.decode("ascii") for counts in masks.masks.rle_counts],
        "predicted_iou": masks.predicted_iou.tolist(),
        "mask_boxes": masks.mask_boxes.tolist(),
    }
    write_json(path, content)


def read_part(path: Path, record: ImageRecord) -> BoxMasks | None:
    """What ``write_part`` wrote, or None where there is no file yet.

    Raises:
        ArtifactError: The file is damaged, or of other boxes.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        counts = tuple(text.encode("ascii") for text in content["counts"])
        if len(counts) != len(record.boxes):
            raise ValueError(f"{len(counts)} masks for {len(record.boxes)} boxes")
        return _box_masks(record, counts, content["predicted_iou"], content["mask_boxes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); delete it to make it again") from error


def _box_masks(
    record: ImageRecord,
    counts: tuple[bytes, ...],
    predicted_iou: Sequence[float],
    mask_boxes: Sequence[Sequence[float]],
) -> BoxMasks:
    return BoxMasks(
        masks=InstanceMasks(rle_counts=counts, image_size=record.image_size),
        predicted_iou=np.array(predicted_iou, np.float32),
        mask_boxes=np.array(mask_boxes, np.float32).reshape(-1, 4),
    )


def _save_pictures(
    path: Path, folder: CocoFolder, found: Mapping[int, BoxMasks], num_pictures: int
) -> None:
    stride = max(1, len(folder.records) // max(1, num_pictures))
    pictures = [
        Picture(
            image=record.image(),
            detections=Detections(
                boxes=record.boxes,
                scores=found[record.image_id].predicted_iou,
                labels=record.labels,
                image_size=record.image_size,
                masks=found[record.image_id].masks,
            ),
            truth_boxes=np.zeros((0, 4), np.float32),
        )
        for record in folder.records[::stride][:num_pictures]
    ]
    save_contact_sheet(path, pictures, class_names=folder.class_names)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])
    generate_pseudo_masks(tyro.cli(PseudoMaskConfig, description=__doc__))
