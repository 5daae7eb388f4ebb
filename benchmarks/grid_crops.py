"""What a grid of prompts finds more in crops of the image: recall of its proposals, and the time.

``python -m benchmarks grid_crops --data FOLDER --sam FILE --name NAME`` writes
``benchmarks/results/grid_crops_NAME.md``. Every row prompts the same images; nothing but the grid
is prompted, and the recipe decides the rest.
"""

import asyncio
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from benchmarks.entry import enter
from benchmarks.results import command_line
from training.data.coco import ImageRecord, load_coco_folder
from training.engine.stage import git_commit
from training.evaluation.recall import IOU_THRESHOLDS, ProposalRecall, RecallCounter
from training.models.sam import load_sam
from training.recipes import RECIPES
from training.torch_backend import sam_models
from weaksam_rt.files import atomic_path, write_json
from weaksam_rt.pipeline import WeakSamPipeline
from weaksam_rt.proposals import select_proposals
from weaksam_rt.types import PointPrompts

_RESULTS = Path("benchmarks/results")


@dataclass(frozen=True, kw_only=True, slots=True)
class GridRow:
    """One way to prompt."""

    points_per_side: int
    crops_per_side: tuple[int, ...] = ()

    def __str__(self) -> str:
        crops = " and ".join(f"{n}x{n}" for n in self.crops_per_side)
        points = f"{self.points_per_side}x{self.points_per_side} points"
        return f"{points}, and in {crops} crops" if crops else points


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    recall: ProposalRecall
    num_prompts: int
    """Of an image."""
    cpu_s: float
    """Of an image."""


ROWS = (
    GridRow(points_per_side=16),
    GridRow(points_per_side=32),
    GridRow(points_per_side=16, crops_per_side=(2,)),
    GridRow(points_per_side=16, crops_per_side=(3,)),
    GridRow(points_per_side=16, crops_per_side=(2, 3)),
)


def main(
    data: Path,
    sam: Path,
    name: str,
    recipe: str = "aquarium",
    num_images: int = 40,
    num_threads: int = 1,
) -> None:
    """Measure and write a Markdown table and a JSON file.

    Args:
        data: Folder with ``images/`` and ``instances.json``; its boxes are the truth.
        sam: Of ``training.train_sam``, or an official checkpoint.
        name: Names the result files.
        recipe: Whose proposal settings are used, one of ``training.recipes``.
        num_images: Spread evenly over the data set.
        num_threads: CPU threads of torch.
    """
    torch.set_num_threads(num_threads)
    folder = load_coco_folder(data)
    chosen = np.linspace(0, len(folder.records) - 1, min(num_images, len(folder.records)))
    records = [folder.records[int(position)] for position in chosen]
    results = {str(row): measure(row, records, sam, recipe) for row in ROWS}
    _write(name, results, len(folder.records))


def measure(row: GridRow, records: list[ImageRecord], sam: Path, recipe: str) -> _Measured:
    """Prompt ``records`` as ``row`` says."""
    settings = RECIPES[recipe]().proposals
    proposals = replace(settings.pipeline.proposals, sources=("grid",), **asdict(row))
    trained = sam_models(load_sam(sam), mixed_precision=settings.mixed_precision)
    pipeline = WeakSamPipeline(
        trained.backend, trained.models, replace(settings.pipeline, proposals=proposals)
    )
    counter, no_peaks, num_prompts = RecallCounter(), PointPrompts.concatenate([]), 0
    start = time.process_time()
    for record in track(records, description=str(row), transient=True):
        prompts, prompted = asyncio.run(pipeline.prompted_boxes(record.image(), peaks=no_peaks))
        kept = select_proposals(prompted, record.image_size, proposals)
        counter.add(record, kept.boxes)
        num_prompts += len(prompts)
    return _Measured(
        recall=counter.result(),
        num_prompts=num_prompts // len(records),
        cpu_s=(time.process_time() - start) / len(records),
    )


def _write(name: str, results: dict[str, _Measured], num_records: int) -> None:
    thresholds = " | ".join(f"recall@{t}" for t in IOU_THRESHOLDS)
    first = next(iter(results.values())).recall
    lines = [
        f"# Grid prompts in crops: {name}",
        "",
        f"`{command_line('grid_crops', sys.argv[1:])}`, commit {git_commit()[:12]}. "
        f"{first.num_images} of {num_records} images, {first.num_truth} objects; one proposal "
        "serves one object.",
        "",
        f"| grid | prompts | proposals an image | {thresholds} | CPU s an image |",
        "| --- | ---: | ---: |" + " ---: |" * (len(IOU_THRESHOLDS) + 1),
    ]
    for row, found in results.items():
        figures = " | ".join(f"{found.recall.recall[t]:.3f}" for t in IOU_THRESHOLDS)
        lines.append(
            f"| {row} | {found.num_prompts} | {found.recall.mean_proposals:.1f} | {figures} | "
            f"{found.cpu_s:.2f} |"
        )
    with atomic_path(_RESULTS / f"grid_crops_{name}.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    write_json(
        _RESULTS / f"grid_crops_{name}.json",
        {"rows": {row: asdict(found) for row, found in results.items()}},
    )


if __name__ == "__main__":
    enter(main)
