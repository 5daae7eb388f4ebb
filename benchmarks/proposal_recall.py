"""Recall of our proposals beside Selective Search on the same images.

``python -m benchmarks.proposal_recall --data FOLDER --proposals PROPOSALS_FOLDER --name NAME``
writes ``benchmarks/results/proposal_recall_NAME.md``. Selective Search is OpenCV's, fast mode, on
the image scaled to 500 pixels of width at most, as its authors used it; it is given all its boxes,
and as many as ours in its own order. Beside the recalls stand the seconds that an image takes.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from benchmarks.entry import enter
from benchmarks.results import command_line
from training.data.coco import ImageRecord, load_coco_folder
from training.data.results import read_proposals
from training.engine.stage import git_commit, read_manifest
from training.evaluation.recall import IOU_THRESHOLDS, ProposalRecall, proposal_recall
from training.generate_proposals import PROPOSALS_NAME
from weaksam_rt.files import atomic_path, write_json
from weaksam_rt.types import PromptSource, Proposals

_MAX_WIDTH = 500
_RESULTS = Path("benchmarks/results")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One way to propose."""

    label: str
    recall: ProposalRecall
    seconds: float
    """An image."""


def main(data: Path, proposals: Path, name: str, min_side_px: float = 20.0) -> None:
    """Measure and write a Markdown table and a JSON file.

    Args:
        data: Folder with ``images/`` and ``instances.json``; its boxes are the truth.
        proposals: Folder of the stage ``training.generate_proposals`` on the same data.
        name: Names the result files.
        min_side_px: Selective Search boxes narrower or lower than this go, as ours do.
    """
    folder = load_coco_folder(data)
    ours = read_proposals(proposals / PROPOSALS_NAME, folder=folder)
    start = time.perf_counter()
    searched = {
        record.image_id: selective_search(record, min_side_px)
        for record in track(folder.records, description="Selective Search")
    }
    seconds = (time.perf_counter() - start) / max(1, len(folder.records))
    limited = {
        i: first_proposals(found, len(ours[i])) for i, found in searched.items() if i in ours
    }
    manifest = read_manifest(proposals)
    rows = [
        Row(
            label="WeakSAM prompts",
            recall=proposal_recall(folder, ours),
            seconds=seconds_of_stage(manifest, len(ours)),
        ),
        Row(
            label="Selective Search, as many",
            recall=proposal_recall(folder, limited),
            seconds=seconds,
        ),
        Row(
            label="Selective Search, all", recall=proposal_recall(folder, searched), seconds=seconds
        ),
    ]
    command = command_line("proposal_recall", sys.argv[1:])
    with atomic_path(_RESULTS / f"proposal_recall_{name}.md") as temporary:
        temporary.write_text(report(name, command, rows, manifest))
    content = {
        "rows": {row.label: asdict(row.recall) for row in rows},
        "stage": manifest["metrics"],
        "stage_commit": manifest["commit"],
        "seconds_an_image": {row.label: row.seconds for row in rows},
    }
    write_json(_RESULTS / f"proposal_recall_{name}.json", content)


def seconds_of_stage(manifest: Mapping[str, Any], num_images: int) -> float:
    """Wall time of the stage an image, with the workers that it had; of a stage that was killed
    and went on, the manifest knows the last part alone.
    """
    return float(manifest["duration_s"]) / max(1, num_images)


def selective_search(record: ImageRecord, min_side_px: float) -> Proposals:
    """Selective Search's boxes in its own order, large enough, in pixels of the image."""
    scale = min(1.0, _MAX_WIDTH / record.image_size[1])
    image = cv2.cvtColor(record.image(), cv2.COLOR_RGB2BGR)
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(small)
    search.switchToSelectiveSearchFast()
    boxes_xywh = np.asarray(search.process(), dtype=np.float32) / scale
    corners = boxes_xywh[:, :2] + boxes_xywh[:, 2:]
    boxes = np.concatenate([boxes_xywh[:, :2], corners], axis=1)
    return _proposals(boxes[(boxes_xywh[:, 2:] >= min_side_px).all(axis=1)], record)


def first_proposals(found: Proposals, number: int) -> Proposals:
    """The first ``number`` proposals, in their order."""
    return Proposals(
        boxes=found.boxes[:number],
        scores=found.scores[:number],
        sources=found.sources[:number],
        image_size=found.image_size,
    )


def _proposals(boxes: NDArray[np.float32], record: ImageRecord) -> Proposals:
    return Proposals(
        boxes=boxes,
        scores=np.ones(len(boxes), np.float32),
        sources=np.full(len(boxes), PromptSource.GRID, np.int32),
        image_size=record.image_size,
    )


def report(name: str, command: str, rows: Sequence[Row], manifest: Mapping[str, Any]) -> str:
    """The page, as Markdown.

    Args:
        name: Of the data.
        command: What was run.
        rows: Ours first.
        manifest: Of the stage that made ours.
    """
    first = rows[0].recall
    thresholds = " | ".join(f"recall@{t}" for t in IOU_THRESHOLDS)
    lines = [
        f"# Proposal recall: {name}",
        "",
        f"`{command}`, commit {git_commit()[:12]}. {first.num_images} images, {first.num_truth} "
        "objects; one proposal serves one object.",
        "",
        f"| proposals | an image | s an image | {thresholds} |",
        "| --- | ---: | ---: |" + " ---: |" * len(IOU_THRESHOLDS),
    ]
    for row in rows:
        figures = " | ".join(f"{row.recall.recall[t]:.3f}" for t in IOU_THRESHOLDS)
        lines.append(
            f"| {row.label} | {row.recall.mean_proposals:.0f} | {row.seconds:.2f} | {figures} |"
        )
    lines += [
        "",
        f"Seconds are wall time: ours from the manifest of the stage, made at commit "
        f"{manifest['commit'][:12]} with all its prompts and the workers that it had; Selective "
        "Search's were taken here, one image at a time.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    enter(main)
