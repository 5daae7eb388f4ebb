"""Stage: tagged images to class-agnostic proposals, through the pipeline that is served.

    python -m training.generate_proposals --data DIR --output RUN \
        --classifier classifier.safetensors --sam sam.safetensors

writes ``proposals.json`` (COCO results with ``source``) and ``report/index.html``. One small file
per finished image is kept in ``parts/``, so a killed run goes on where it was.
"""

import asyncio
import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.logging import RichHandler

from training.data.coco import CocoFolder, ImageRecord, load_coco_folder
from training.data.proposal_parts import ImagePart, read_part, write_part
from training.data.results import write_proposals
from training.engine.progress import stage_progress
from training.engine.stage import Stage, open_stage
from training.evaluation.pointing import pointing_accuracy
from training.evaluation.proposal_report import write_report
from training.evaluation.recall import proposal_recall
from training.models.sam import load_sam
from training.models.vit_adapter import load_classifier
from training.torch_backend import TrainedModels, proposal_models
from weaksam_rt.config import PipelineConfig
from weaksam_rt.files import write_json
from weaksam_rt.pipeline import ProposalResult, WeakSamPipeline
from weaksam_rt.types import PointPrompts, PromptSource

_LOGGER = logging.getLogger(__name__)
PROPOSALS_NAME = "proposals.json"
_PARTS = "parts"
_SKIPPED_NAME = "skipped.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProposalRecipe:
    """Everything that decides the proposals besides models and data."""

    tags: Literal["given", "predicted"] = "given"
    """``given``: the images' own tags, for training. ``predicted``: the classes that the classifier
    sees, for images whose tags must not be known."""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """Settings of the served pipeline."""
    mixed_precision: bool = False
    """SAM in bfloat16: on CPUs with matrix units about twice as fast, with boxes that differ by
    fractions of a pixel from the served ones."""
    skip_bad: bool = False
    """Leave unreadable images out and list them in ``skipped.json`` instead of stopping."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateProposalsConfig:
    """Class-agnostic proposals for every image of a COCO-format folder."""

    output: Path
    """Folder of the stage; a killed run goes on with the images that are not done."""
    data: Path
    """Folder with ``images/`` and ``instances.json``. Boxes are used for the report only."""
    classifier: Path
    """``classifier.safetensors`` of ``train_classifier``."""
    sam: Path
    """A SAM of ``train_sam``, or an official checkpoint."""
    recipe: ProposalRecipe = field(default_factory=ProposalRecipe)
    """Everything that decides the result."""
    num_report_images: int = 12
    """Images shown in the report, spread evenly over the set; 0: no report."""
    device: str = "cpu"
    """Torch device of the models."""
    num_threads: int = 2
    """CPU threads of torch."""


def generate_proposals(config: GenerateProposalsConfig) -> None:
    """Make, or go on making, the proposals; nothing is done where they are complete."""
    torch.set_num_threads(config.num_threads)
    stage = open_stage(
        "generate_proposals",
        config.output,
        config=config.recipe,
        inputs={"data": config.data, "classifier": config.classifier, "sam": config.sam},
    )
    if stage.finished:
        return
    classifier = load_classifier(config.classifier)
    folder = load_coco_folder(config.data, classifier.class_names)
    trained = proposal_models(
        classifier,
        load_sam(config.sam),
        config.recipe.pipeline.clustering,
        device=config.device,
        mixed_precision=config.recipe.mixed_precision,
    )
    parts, skipped = _propose_all(stage, folder, trained, config.recipe)
    proposals = {image_id: part.proposals for image_id, part in parts.items()}
    write_proposals(stage.directory / PROPOSALS_NAME, proposals)
    write_json(stage.directory / _SKIPPED_NAME, skipped)
    done = [record for record in folder.records if record.image_id in parts]
    if config.num_report_images and done:
        chosen = np.linspace(0, len(done) - 1, min(config.num_report_images, len(done)))
        sample = [done[i] for i in chosen.astype(int)]
        write_report(stage.directory / "report", folder, sample, parts, trained)
    metrics = {**_metrics(folder, parts), "num_skipped": float(len(skipped))}
    stage.finish(outputs=[PROPOSALS_NAME, _SKIPPED_NAME], metrics=metrics)
    _LOGGER.info("%s", metrics)


def _propose_all(
    stage: Stage, folder: CocoFolder, trained: TrainedModels, recipe: ProposalRecipe
) -> tuple[dict[int, ImagePart], dict[str, str]]:
    """Parts by image id, and reasons by name of the images left out."""
    pipeline = WeakSamPipeline(trained.backend, trained.models, recipe.pipeline)
    parts: dict[int, ImagePart] = {}
    skipped: dict[str, str] = {}
    with stage_progress() as progress:
        task = progress.add_task("generate_proposals", total=len(folder.records))
        for record in folder.records:
            path = stage.directory / _PARTS / f"{record.image_id}.npz"
            part = read_part(path, record.image_size)
            if part is None:
                try:
                    image = _read_image(record)
                    tags = _tags(record, folder, recipe)
                except ValueError as error:
                    if not recipe.skip_bad:
                        raise
                    skipped[record.path.name] = str(error)
                    _LOGGER.warning("left out: %s", error)
                    progress.advance(task)
                    continue
                part = _part_of(asyncio.run(pipeline.propose(image, tags)))
                write_part(path, part)
            parts[record.image_id] = part
            progress.advance(task)
    return parts, skipped


def _read_image(record: ImageRecord) -> NDArray[np.uint8]:
    try:
        image = record.image()
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"cannot read {record.path}: {error}; repair or remove it, or leave such images out "
            "with --recipe.skip-bad"
        ) from error
    if image.shape[:2] != record.image_size:
        raise ValueError(
            f"{record.path} is {image.shape[1]}x{image.shape[0]}, instances.json says "
            f"{record.image_size[1]}x{record.image_size[0]} (width x height); correct one of them, "
            "or leave such images out with --recipe.skip-bad"
        )
    return image


def _tags(record: ImageRecord, folder: CocoFolder, recipe: ProposalRecipe) -> list[str] | None:
    if recipe.tags == "predicted":
        return None
    if not record.tags:
        raise ValueError(
            f"{record.path} has no tags; tag it, leave such images out with --recipe.skip-bad, or "
            "let the classifier decide with --recipe.tags predicted"
        )
    return [folder.class_names[tag] for tag in record.tags]


def _part_of(result: ProposalResult) -> ImagePart:
    from_maps = result.prompts.sources != PromptSource.GRID
    prompts = PointPrompts(
        **{
            f.name: getattr(result.prompts, f.name)[from_maps]
            for f in dataclasses.fields(PointPrompts)
        }
    )
    return ImagePart(proposals=result.proposals, prompts=prompts, used_tags=result.used_tags)


def _metrics(folder: CocoFolder, parts: dict[int, ImagePart]) -> dict[str, float]:
    """How good proposals, points and predicted tags are, by the set's own boxes."""
    recall = proposal_recall(folder, {i: part.proposals for i, part in parts.items()})
    pointing = pointing_accuracy(folder, {i: part.prompts for i, part in parts.items()})
    return {
        **{f"recall_{thresh}": value for thresh, value in recall.recall.items()},
        "mean_proposals": recall.mean_proposals,
        "median_proposals": recall.median_proposals,
        "pointing_coarse": pointing.coarse,
        "pointing_fine": pointing.fine,
        "pointing_cross": pointing.cross,
    }


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])
    generate_proposals(tyro.cli(GenerateProposalsConfig))
