"""Instance masks from tags: the detector's own beside SAM's on the same boxes.

``python -m benchmarks.weak_masks --data VAL --detector MASK_RCNN --sam SAM --pseudo-masks STAGE
--name NAME`` writes ``benchmarks/results/weak_masks_NAME.md`` and ``.json``. Rows have the boxes
of their detector; filled boxes show what masks are worth at all. Of a detector without a mask head
there are SAM's masks, as ``weaksam_detect`` gives them, and no pseudo masks.
"""

import asyncio
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.progress import track

from benchmarks.entry import enter
from benchmarks.results import command_line
from training.data.coco import CocoFolder, load_coco_folder
from training.detect import detect_folder
from training.engine.stage import MANIFEST_NAME, git_commit, read_manifest
from training.evaluate import evaluate, summary
from training.models.detector_adapter import DetectorAdapter
from training.models.sam import load_sam
from training.pseudo_labels.masks import choose_masks, filled_boxes
from training.retrain_detector import load_detector
from training.torch_backend import sam_models
from weaksam_rt.config import DetectionConfig, PipelineConfig
from weaksam_rt.files import atomic_path, write_json
from weaksam_rt.pipeline import WeakSamPipeline
from weaksam_rt.proposals import ProposalConfig
from weaksam_rt.types import Detections

_LOGGER = logging.getLogger(__name__)
_RESULTS = Path("benchmarks/results")
_COLUMNS = ("mask_ap25", "mask_ap50", "mask_ap70", "mask_ap75", "mask_coco_ap", "voc_ap50")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeakMasksConfig:
    """What is compared."""

    data: Path
    """Validation folder with true masks."""
    detector: Path
    """``detector.safetensors``; with a mask head trained on pseudo masks, or without."""
    sam: Path
    """The SAM that made the pseudo masks."""
    name: str
    """Names the result files."""
    pseudo_masks: Path | None = None
    """Finished stage ``training.generate_pseudo_masks``, for its figures."""
    bound: Path | None = None
    """The same detector trained on true masks, or on true boxes where it has no masks."""
    max_images: int | None = None
    """Images, spread evenly over the set; all where not given."""
    score_thresh: float = 0.01
    """Detections below it, in [0, 1], are left out."""
    num_threads: int = 1
    """CPU threads of torch."""


def main(config: Annotated[WeakMasksConfig, tyro.conf.arg(name="")]) -> None:
    """Measure and write the report."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(config.num_threads)
    folder = _spread(load_coco_folder(config.data), config.max_images)
    found = _detect(config.detector, folder, config)
    rows = {"Mask R-CNN on pseudo masks": found} if _has_masks(found) else {}
    rows |= {
        "its boxes, SAM's masks": _prompted(folder, found, config.sam),
        "its boxes, filled": {
            i: replace(d, masks=filled_boxes(d.boxes, d.image_size)) for i, d in found.items()
        },
    }
    if config.bound is not None:
        bound = _detect(config.bound, folder, config)
        if _has_masks(bound):
            rows["Mask R-CNN on true masks"] = bound
        else:
            rows["Faster R-CNN on true boxes, SAM's masks"] = _prompted(folder, bound, config.sam)
    scores = {name: summary(evaluate(folder, detections)) for name, detections in rows.items()}
    _write(config, folder, scores)


def _detect(weights: Path, folder: CocoFolder, config: WeakMasksConfig) -> Mapping[int, Detections]:
    model, class_names = load_detector(weights)
    if class_names != folder.class_names:
        raise ValueError(
            f"{weights} knows {list(class_names)}, the data have {list(folder.class_names)}; give "
            "a detector trained on this data"
        )
    settings = DetectionConfig(score_thresh=config.score_thresh, nms_thresh=0.5)
    return detect_folder(
        DetectorAdapter(model).eval(),
        folder,
        image_size=model.config.image_size,
        config=settings,
    )


def _has_masks(found: Mapping[int, Detections]) -> bool:
    return all(detections.masks is not None for detections in found.values())


def _prompted(
    folder: CocoFolder, found: Mapping[int, Detections], sam: Path
) -> dict[int, Detections]:
    """The same detections with SAM's masks, by the served pipeline."""
    trained = sam_models(load_sam(sam))
    settings = PipelineConfig(proposals=ProposalConfig(max_prompts_per_call=8))
    pipeline = WeakSamPipeline(trained.backend, trained.models, settings)
    result = {}
    for record in track(folder.records, description="SAM"):
        detections = found[record.image_id]
        masks = filled_boxes(detections.boxes[:0], record.image_size)
        if len(detections):
            answer = asyncio.run(pipeline.segment(record.image(), boxes=detections.boxes))
            masks = choose_masks(answer).masks
        result[record.image_id] = replace(detections, masks=masks)
    return result


def _spread(folder: CocoFolder, max_images: int | None) -> CocoFolder:
    if max_images is None or len(folder.records) <= max_images:
        return folder
    chosen = np.linspace(0, len(folder.records) - 1, max_images).round().astype(int)
    return replace(folder, records=tuple(folder.records[i] for i in chosen))


def _write(
    config: WeakMasksConfig, folder: CocoFolder, scores: Mapping[str, Mapping[str, float | None]]
) -> None:
    pseudo = None if config.pseudo_masks is None else read_manifest(config.pseudo_masks)["metrics"]
    header = " | ".join(name.removeprefix("mask_").replace("_", " ") for name in _COLUMNS[:-1])
    lines = [
        f"# Instance masks from tags: {config.name}", "",
        f"`{_command()}` at commit {git_commit()[:12]}; {len(folder.records)} images, detections "
        f"from {config.score_thresh:g} on. Percent. {_training(config.detector)}".rstrip(), "",
        f"| masks | {header} | boxes: AP50 |",
        f"| --- |{' --: |' * len(_COLUMNS)}",
        *(
            f"| {name} | {' | '.join(_percent(row[column]) for column in _COLUMNS)} |"
            for name, row in scores.items()
        ), "", *_pseudo_lines(pseudo),
    ]  # fmt: skip
    path = _RESULTS / f"weak_masks_{config.name}.md"
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines))
    content = {"command": _command(), "num_images": len(folder.records), "scores": scores}
    write_json(path.with_suffix(".json"), {**content, "pseudo_masks": pseudo})
    _LOGGER.info("%s", "\n".join(lines))


def _pseudo_lines(pseudo: Mapping[str, Any] | None) -> list[str]:
    if pseudo is None:
        return []
    measured = pseudo["evaluation_only"] or {}
    return [
        f"Pseudo masks learnt from: {pseudo['num_masks']}, {pseudo['num_empty']} empty. Where the "
        f"pseudo box lies on an object ({measured.get('num_matched', '-')}): mean IoU with its "
        f"true mask {_percent(measured.get('mean_iou'))}; the filled box "
        f"{_percent(measured.get('mean_iou_of_filled_boxes'))}.",
        "",
    ]


def _training(detector: Path) -> str:
    """How the detector was trained, where its manifest lies beside it."""
    if not (detector.parent / MANIFEST_NAME).is_file():
        return ""
    manifest: dict[str, Any] = read_manifest(detector.parent)
    recipe = manifest["config"]
    what = "the mask head alone" if recipe.get("only_masks") else "all of it"
    return (
        f"Trained: {what}, {recipe['epochs']} passes in steps of {recipe['batch_size']} images, "
        f"commit {manifest['commit'][:12]}."
    )


def _command() -> str:
    return command_line("weak_masks", sys.argv[1:])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


if __name__ == "__main__":
    enter(main)
