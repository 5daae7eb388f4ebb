"""What each kind of prompt is worth: recall of the proposals of grid, coarse, fine and cross maps,
alone and together.

``python -m benchmarks.map_sources --data FOLDER --classifier FILE --sam FILE --name NAME`` writes
``benchmarks/results/map_sources_NAME.md``. Every image is encoded, and every prompt decoded, once;
the rows differ only in which prompts' boxes are filtered and counted.
"""

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
from rich.progress import track

from benchmarks.entry import enter
from benchmarks.results import command_line
from training.data.coco import CocoFolder
from training.engine.stage import git_commit
from training.evaluation.pointing import PointingCounter
from training.evaluation.recall import IOU_THRESHOLDS, ProposalRecall, RecallCounter
from training.proposer import ImageProposer, ProposerConfig
from training.recipes import RECIPES
from weaksam_rt.files import atomic_path, write_json
from weaksam_rt.proposals import SOURCE_NAMES, PromptedBoxes, SourceName, select_proposals

_RESULTS = Path("benchmarks/results")
_ROWS: tuple[tuple[SourceName, ...], ...] = (
    ("grid",),
    ("coarse",),
    ("fine",),
    ("cross",),
    ("coarse", "fine"),
    ("coarse", "fine", "cross"),
    ("grid", "cross"),
    ("grid", "coarse", "fine"),
    ("grid", "coarse", "fine", "cross"),
)


def main(
    data: Path,
    classifier: Path,
    sam: Path,
    name: str,
    recipe: str = "scenes",
    maps: Literal["served", "published"] = "served",
    num_images: int = 100,
    num_threads: int = 1,
) -> None:
    """Measure and write a Markdown table and a JSON file.

    Args:
        data: Folder with ``images/`` and ``instances.json``; its boxes are the truth.
        classifier: Of ``training.train_classifier``.
        sam: Of ``training.train_sam``, or an official checkpoint.
        name: Names the result files.
        recipe: Whose proposal settings are used, one of ``training.recipes``.
        maps: One square pass and its mirror image, or the published passes.
        num_images: Spread evenly over the data set.
        num_threads: CPU threads of torch.
    """
    settings = replace(RECIPES[recipe]().proposals, maps=maps)
    proposer = ImageProposer(
        ProposerConfig(
            data=data, classifier=classifier, sam=sam, recipe=settings, num_threads=num_threads
        )
    )
    records = proposer.folder.records
    chosen = np.linspace(0, len(records) - 1, min(num_images, len(records))).astype(int)
    recalls = {row: RecallCounter() for row in _ROWS}
    num_prompts = dict.fromkeys(SOURCE_NAMES, 0)
    pointing = PointingCounter()
    start = time.process_time()
    for position in track(chosen, description="prompts"):
        record = records[position]
        prompts, prompted = proposer.prompted(record)
        pointing.add(record, prompts)
        for source, source_name in enumerate(SOURCE_NAMES):
            num_prompts[source_name] += int(np.count_nonzero(prompts.sources == source))
        for row, counter in recalls.items():
            kept = select_proposals(
                only(prompted, row), record.image_size, settings.pipeline.proposals
            )
            counter.add(record, kept.boxes)
    seconds = (time.process_time() - start) / len(chosen)
    results = {row: counter.result() for row, counter in recalls.items()}
    mean_prompts = {source: num / len(chosen) for source, num in num_prompts.items()}
    _write(name, proposer.folder, results, mean_prompts, asdict(pointing.result()), seconds)


def only(prompted: PromptedBoxes, sources: Iterable[SourceName]) -> PromptedBoxes:
    """The boxes of the prompts of ``sources``."""
    wanted = [SOURCE_NAMES.index(source) for source in sources]
    return prompted.subset(np.isin(prompted.sources, wanted))


def _write(
    name: str,
    folder: CocoFolder,
    results: dict[tuple[SourceName, ...], ProposalRecall],
    mean_prompts: dict[SourceName, float],
    pointing: dict[str, float],
    seconds: float,
) -> None:
    thresholds = " | ".join(f"recall@{t}" for t in IOU_THRESHOLDS)
    first = next(iter(results.values()))
    command = command_line("map_sources", sys.argv[1:])
    lines = [
        f"# Proposals by kind of prompt: {name}",
        "",
        f"`{command}`, commit {git_commit()[:12]}. "
        f"{first.num_images} of {len(folder.records)} images, {first.num_truth} objects; one "
        "proposal serves one object.",
        "",
        f"| prompts | points an image | proposals an image | {thresholds} |",
        "| --- | ---: | ---: |" + " ---: |" * len(IOU_THRESHOLDS),
    ]
    for row, result in results.items():
        points = sum(mean_prompts[source] for source in row)
        figures = " | ".join(f"{result.recall[t]:.3f}" for t in IOU_THRESHOLDS)
        lines.append(
            f"| {' + '.join(row)} | {points:.1f} | {result.mean_proposals:.1f} | {figures} |"
        )
    lines += [
        "",
        f"The highest coarse peak of a class lies on an object of it in "
        f"{100 * pointing['coarse']:.0f} % of the images, the highest fine peak in "
        f"{100 * pointing['fine']:.0f} %; {100 * pointing['cross']:.0f} % of the cross points lie "
        f"on an object. {seconds:.2f} CPU seconds an image.",
    ]
    with atomic_path(_RESULTS / f"map_sources_{name}.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    content = {
        "rows": {"+".join(row): asdict(result) for row, result in results.items()},
        "points_an_image": mean_prompts,
        "pointing": pointing,
        "cpu_s_an_image": seconds,
    }
    write_json(_RESULTS / f"map_sources_{name}.json", json.loads(json.dumps(content)))


if __name__ == "__main__":
    enter(main)
