"""Recall of our proposals beside Selective Search on the same images.

``python -m benchmarks.proposal_recall --data FOLDER --proposals PROPOSALS_FOLDER --name NAME``
writes ``benchmarks/results/proposal_recall_NAME.md``. Selective Search is OpenCV's, fast mode, on
the image scaled to 500 pixels of width at most, as its authors used it; it is given all its boxes,
and as many as ours in its own order.
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from benchmarks.entry import enter
from benchmarks.results import command_line
from training.data.coco import CocoFolder, ImageRecord, load_coco_folder
from training.data.results import read_proposals
from training.engine.stage import git_commit, read_manifest
from training.evaluation.recall import IOU_THRESHOLDS, ProposalRecall, proposal_recall
from training.generate_proposals import PROPOSALS_NAME
from weaksam_rt.files import atomic_path, write_json
from weaksam_rt.types import PromptSource, Proposals

_MAX_WIDTH = 500
_RESULTS = Path("benchmarks/results")


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
    rows = {
        "WeakSAM prompts": proposal_recall(folder, ours),
        "Selective Search, as many": proposal_recall(folder, limited),
        "Selective Search, all": proposal_recall(folder, searched),
    }
    _write(name, folder, rows, read_manifest(proposals)["metrics"], seconds)


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


def _write(
    name: str,
    folder: CocoFolder,
    rows: dict[str, ProposalRecall],
    stage_metrics: dict[str, float],
    search_seconds: float,
) -> None:
    thresholds = " | ".join(f"recall@{t}" for t in IOU_THRESHOLDS)
    command = command_line("proposal_recall", sys.argv[1:])
    lines = [
        f"# Proposal recall: {name}",
        "",
        f"`{command}`, "
        f"commit {git_commit()[:12]}. {len(folder.records)} images, "
        f"{next(iter(rows.values())).num_truth} objects; one proposal serves one object.",
        "",
        f"| proposals | an image | {thresholds} |",
        "| --- | ---: |" + " ---: |" * len(IOU_THRESHOLDS),
    ]
    for label, result in rows.items():
        figures = " | ".join(f"{result.recall[t]:.3f}" for t in IOU_THRESHOLDS)
        lines.append(f"| {label} | {result.mean_proposals:.0f} | {figures} |")
    lines += ["", f"Selective Search takes {search_seconds:.2f} s an image on this machine."]
    with atomic_path(_RESULTS / f"proposal_recall_{name}.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    content = {
        "rows": {label: asdict(result) for label, result in rows.items()},
        "stage": stage_metrics,
        "selective_search_s": search_seconds,
    }
    write_json(_RESULTS / f"proposal_recall_{name}.json", content)


if __name__ == "__main__":
    enter(main)
