"""Stage: tagged images to class-agnostic proposals, through the pipeline that is served.

    python -m training.generate_proposals --data DIR --output RUN \
        --classifier classifier.safetensors --sam sam.safetensors

writes ``proposals.json`` (COCO results with ``source``), ``skipped.json`` and ``report.html``.
Results of finished images are kept in ``shards/``, so a killed run goes on where it was, with any
number of processes:

- ``--num-workers 8``: so many processes on this machine, one GPU each where there are GPUs.
- ``--shard 3/16``: every 16th image from the third (counted from 0) on; whoever finishes last puts
  all results together. The folder is shared, or its ``shards/`` are copied together.
- ``--ray auto --num-workers 32``: so many processes of a Ray cluster; the data are on a disk that
  all machines see.

The result does not depend on any of these.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tyro
from rich.logging import RichHandler

from training.data.coco import CocoFolder, ImageRecord, load_coco_folder
from training.data.proposal_shards import (
    ImagePart,
    ShardIndex,
    ShardWatch,
    ShardWriter,
    Skipped,
    encode_line,
    index_shards,
)
from training.data.results import write_proposals
from training.engine.progress import stage_progress
from training.engine.stage import Stage, open_stage
from training.evaluation.pointing import PointingCounter
from training.evaluation.proposal_report import write_page
from training.evaluation.recall import RecallCounter
from training.models.vit_adapter import load_classifier
from training.proposal_workers import Shard, propose_in_processes, propose_on_ray
from training.proposer import ImageProposer, ProposalRecipe, ProposerConfig, check_tags
from weaksam_rt.files import write_json
from weaksam_rt.types import Proposals

__all__ = [
    "PROPOSALS_NAME",
    "REPORT_NAME",
    "GenerateProposalsConfig",
    "ProposalRecipe",
    "generate_proposals",
]

_LOGGER = logging.getLogger(__name__)
PROPOSALS_NAME = "proposals.json"
REPORT_NAME = "report.html"
_SHARDS = "shards"
_SKIPPED_NAME = "skipped.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateProposalsConfig:
    """Class-agnostic proposals for every image of a COCO-format folder."""

    output: Path
    """Folder of the stage; a killed run goes on with the images that are not done."""
    data: Path
    """Folder with ``images/`` and ``instances.json``. Boxes are used for the report only."""
    classifier: Path
    """``classifier.safetensors`` of ``train_classifier`` or ``convert_classifier``."""
    sam: Path
    """A SAM of ``train_sam``, or an official checkpoint."""
    recipe: ProposalRecipe = field(default_factory=ProposalRecipe)
    """Everything that decides the result."""
    num_workers: int = 1
    """Processes."""
    shard: str | None = None
    """``i/n``: do only every n-th image from the i-th on, i from 0 to n - 1, in this process."""
    ray: str | None = None
    """Address of a Ray cluster whose processes do the work, or ``local`` for one on this
    machine."""
    num_report_images: int = 12
    """Images shown in the report, spread evenly over the set; 0: no report."""
    device: str = "cpu"
    """Torch device of the models; ``cuda`` gives each process of this machine its own GPU."""
    num_threads: int = 2
    """CPU threads of torch, shared by the processes of this machine."""
    skip_bad: bool = False
    """Leave images that cannot be read or have no tags out, and list them in ``skipped.json``,
    instead of stopping."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {self.num_workers}")
        if self.shard is not None and (self.num_workers > 1 or self.ray is not None):
            raise ValueError("--shard is one process; give it without --num-workers and --ray")
        self.own_shard()

    def own_shard(self) -> Shard:
        """The images of this process when it works alone."""
        return Shard() if self.shard is None else Shard.parse(self.shard)

    def proposer(self) -> ProposerConfig:
        """What each process needs; absolute paths, because those of a cluster start elsewhere."""
        return ProposerConfig(
            data=self.data.resolve(),
            classifier=self.classifier.resolve(),
            sam=self.sam.resolve(),
            recipe=self.recipe,
            device=self.device,
            num_threads=max(1, self.num_threads // (1 if self.ray else self.num_workers)),
            skip_bad=self.skip_bad,
        )


def generate_proposals(config: GenerateProposalsConfig) -> None:
    """Make, or go on making, the proposals; nothing is done where they are complete."""
    stage = open_stage(
        "generate_proposals",
        config.output,
        config=config.recipe,
        inputs={"data": config.data, "classifier": config.classifier, "sam": config.sam},
    )
    if stage.finished:
        return
    classes = load_classifier(config.classifier).class_names
    folder = load_coco_folder(config.data, classes)
    if config.recipe.tags == "given" and not config.skip_bad:
        check_tags(folder)
    index = index_shards(stage.directory / _SHARDS)
    todo = [r.image_id for r in folder.records if r.image_id not in index.places]
    _propose_all(config, stage, len(folder.records) - len(todo), todo)
    index = index_shards(stage.directory / _SHARDS)
    missing = sum(
        r.image_id not in index.places and r.image_id not in index.skipped for r in folder.records
    )
    if missing:
        _LOGGER.info("%d images belong to other shards and are not done yet", missing)
        return
    _finish(config, stage, folder, index)


def _propose_all(
    config: GenerateProposalsConfig, stage: Stage, num_done: int, todo: list[int]
) -> None:
    """Add the results of the images with ids ``todo`` (or this process's share) to the shards."""
    if not todo:
        return
    directory = stage.directory / _SHARDS
    with stage_progress() as progress:
        total = num_done + len(todo)
        task = progress.add_task("generate_proposals", total=total, completed=num_done)
        if config.num_workers > 1 and config.ray is None:
            watch = ShardWatch(directory)
            before = watch.count()
            for _ in propose_in_processes(config.proposer(), directory, todo, config.num_workers):
                progress.update(task, completed=num_done + watch.count() - before)
            return
        if config.ray is not None:
            name = "ray"
            lines = propose_on_ray(config.proposer(), todo, config.ray, config.num_workers)
        else:
            name = config.own_shard().name
            proposer = ImageProposer(config.proposer())
            own = config.own_shard().records(proposer.folder.records, todo)
            lines = (encode_line(r.image_id, proposer.propose(r)) for r in own)
            progress.update(task, total=num_done + len(own))
        with ShardWriter(directory, name) as writer:
            for line in lines:
                writer.write(line)
                progress.advance(task)


def _finish(
    config: GenerateProposalsConfig, stage: Stage, folder: CocoFolder, index: ShardIndex
) -> None:
    """Put the results together, one image at a time."""
    skipped, metrics = merge_shards(stage.directory / PROPOSALS_NAME, folder, index)
    write_json(stage.directory / _SKIPPED_NAME, skipped)
    done = [record for record in folder.records if record.image_id in index.places]
    if config.num_report_images and done:
        chosen = np.linspace(0, len(done) - 1, min(config.num_report_images, len(done)))
        proposer = ImageProposer(replace(config.proposer(), num_threads=config.num_threads))
        sample = [proposer.evidence(done[i], _part(index, done[i])) for i in chosen.astype(int)]
        write_page(stage.directory / REPORT_NAME, folder, sample)
    metrics["num_skipped"] = float(len(skipped))
    stage.finish(outputs=[PROPOSALS_NAME, _SKIPPED_NAME], metrics=metrics)
    _LOGGER.info("%s", metrics)


def merge_shards(
    path: Path, folder: CocoFolder, index: ShardIndex
) -> tuple[dict[str, str], dict[str, float]]:
    """Write the proposals of all images in the order of ``folder``; one image is held at a time.

    Args:
        path: The ``.json`` file.
        folder: The data set; its boxes are used for the figures.
        index: Of complete shards.

    Returns:
        Reasons by name of the images left out, and how good proposals, points and predicted tags
        are by the set's own boxes.
    """
    skipped: dict[str, str] = {}
    recall, pointing = RecallCounter(), PointingCounter()

    def results() -> Iterator[tuple[int, Proposals]]:
        for record in folder.records:
            result = index.read(record.image_id, record.image_size)
            if isinstance(result, ImagePart):
                recall.add(record, result.proposals.boxes)
                pointing.add(record, result.prompts)
                yield record.image_id, result.proposals
                continue
            recall.add(record, np.zeros((0, 4), np.float32))
            if result is not None:
                skipped[result.file_name] = result.reason

    write_proposals(path, results())
    return skipped, _metrics(recall, pointing)


def _part(index: ShardIndex, record: ImageRecord) -> ImagePart:
    part = index.read(record.image_id, record.image_size)
    assert part is not None
    assert not isinstance(part, Skipped)
    return part


def _metrics(recall: RecallCounter, pointing: PointingCounter) -> dict[str, float]:
    covered, pointed = recall.result(), pointing.result()
    return {
        **{f"recall_{thresh}": value for thresh, value in covered.recall.items()},
        "mean_proposals": covered.mean_proposals,
        "median_proposals": covered.median_proposals,
        "pointing_coarse": pointed.coarse,
        "pointing_fine": pointed.fine,
        "pointing_cross": pointed.cross,
    }


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])
    generate_proposals(tyro.cli(GenerateProposalsConfig))
