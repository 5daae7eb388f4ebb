"""The whole chain by one command: ``python -m training.run RECIPE ...``, see ``--help``.

Every stage is a folder below ``--output``; finished stages are skipped, a killed one goes on. Only
image-level tags are learnt from; boxes are read to report figures, and by ``--supervised``.
"""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.logging import RichHandler

from training import generate_pseudo_labels, retrain_detector, train_wsod
from training.data.coco import load_coco_folder
from training.distributed import DeviceName, choose_device
from training.engine.stage import read_manifest
from training.generate_proposals import (
    PROPOSALS_NAME,
    GenerateProposalsConfig,
    generate_proposals,
)
from training.generate_pseudo_masks import ANNOTATIONS_NAME as MASKS_NAME
from training.generate_pseudo_masks import PseudoMaskConfig, generate_pseudo_masks
from training.proposer import ProposalRecipe, check_tags
from training.recipes import RECIPES, ChainRecipe
from training.relabel import RelabelConfig, relabel
from training.retraining.roi_drop import RoiDropConfig
from training.train_classifier import WEIGHTS_NAME, TrainClassifierConfig, train_classifier
from weaksam_rt.files import write_json

if TYPE_CHECKING:
    RecipeName = str
else:
    RecipeName = tyro.extras.literal_type_from_choices(RECIPES)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Train the whole chain on tagged images."""

    recipe: tyro.conf.Positional[RecipeName]
    """Settings of all stages; see ``training.recipes``."""
    data: Path
    """Training images: a folder with ``images/`` and ``instances.json``."""
    val: Path
    """Validation images, the same form."""
    output: Path
    """Gets one subfolder for each stage, and ``summary.json``."""
    sam: Path
    """SAM weights: of ``training.train_sam``, or an official checkpoint."""
    trunk_weights: Path
    """ImageNet weights of SqueezeNet 1.0 for the detectors."""
    wsod_trunk_weights: Path | None = None
    """Those of the multiple-instance detector's trunk, where the recipe gives it another one."""
    negatives: Path | None = None
    """Folder of images that show none of the classes; classifier and detector learn to stay silent
    on them."""
    vit_weights: Path | None = None
    """ImageNet weights of the classifier's ViT; None trains it from the beginning."""
    classifier: Path | None = None
    """Use this finished classifier stage instead of training one, for example from another seed."""
    proposals: Path | None = None
    """Folder of another run whose finished proposals are used; they do not depend on the seed of
    what follows."""
    seed: int = 0
    """Of every stage that draws random numbers."""
    val_proposals: bool = True
    """Also make proposals for the validation images, with predicted tags, and evaluate the
    multiple-instance detector on them."""
    rounds: int = 1
    """Times a detector is trained, at least 1; after the first, on pseudo boxes that the one before
    gave the training images."""
    supervised: bool = False
    """Also train the same detector on the true boxes, without RoI drop: the upper bound."""
    masks: bool = False
    """Go on to masks: SAM turns the last round's pseudo boxes into pseudo masks, and Mask R-CNN
    learns from both (instance segmentation from tags). With ``supervised`` also Mask R-CNN on the
    true masks."""
    skip_bad: bool = False
    """Leave unreadable images out and list them in the manifests instead of stopping."""
    measure_drop: bool = False
    """Compare what RoI drop leaves out with the true boxes of ``data``; nothing is learnt from
    them."""
    device: DeviceName = "auto"
    """Where the models of all stages train and run."""
    num_threads: int = 2
    """CPU threads of torch."""
    classifier_workers: int = 0
    """Processes that vary the classifier's images where the recipe has ``rand_augment``; 0: the
    training process does."""
    proposal_workers: int = 1
    """Processes that make proposals, on this machine."""


def run(config: RunConfig, recipe: ChainRecipe) -> dict[str, Any]:
    """Run all stages and write ``summary.json``.

    Args:
        config: Data, weights and folders.
        recipe: Settings of all stages.

    Returns:
        The summary: the metrics of each stage.

    Raises:
        ValueError: See ``checked``.
    """
    return _run(checked(config), recipe)


def checked(config: RunConfig) -> RunConfig:
    """``config`` with its device chosen, if the run can begin: asked before the first stage takes
    its time.

    Raises:
        ValueError: There is no such device, or the data lack what an option needs.
    """
    config = replace(config, device=choose_device(config.device))
    _check_data(config)
    return config


def _run(config: RunConfig, recipe: ChainRecipe) -> dict[str, Any]:
    train_proposals, val_proposals = _proposals(config, recipe)
    wsod = config.output / "wsod"
    train_wsod.main(
        train_wsod.TrainWsodConfig(
            data=config.data,
            proposals=train_proposals / PROPOSALS_NAME,
            output=wsod,
            trunk_weights=config.wsod_trunk_weights or config.trunk_weights,
            val=config.val if config.val_proposals else None,
            val_proposals=val_proposals / PROPOSALS_NAME if config.val_proposals else None,
            recipe=recipe.wsod,
            device=config.device,
            skip_bad=config.skip_bad,
        )
    )
    detections = wsod / train_wsod.DETECTIONS_NAME
    rounds = []
    for number in range(1, config.rounds + 1):
        rounds.append(_round(config, recipe, detections, "" if number == 1 else f"_{number}"))
        if number < config.rounds:
            detections = _relabel(config, rounds[-1].detector, f"_{number + 1}")
    report = {
        "recipe": config.recipe,
        "seed": config.seed,
        "proposals_train": read_manifest(train_proposals)["metrics"],
        "wsod_train": read_manifest(wsod)["metrics"]["train_evaluation_only"],
        "pseudo_labels": [read_manifest(r.pseudo_labels)["metrics"] for r in rounds],
        "detectors": [read_manifest(r.detector)["metrics"]["val"] for r in rounds],
        "detector": read_manifest(rounds[-1].detector)["metrics"]["val"],
        "roi_drop": [read_manifest(r.detector)["metrics"].get("roi_drop") for r in rounds],
    }
    if config.val_proposals:
        report["proposals_val"] = read_manifest(val_proposals)["metrics"]
        report["wsod_val"] = read_manifest(wsod)["metrics"]["val"]
    if config.supervised:
        _retrain(config, _trusting(recipe), config.output / "supervised", annotations=None)
        report["supervised"] = read_manifest(config.output / "supervised")["metrics"]["val"]
        weak, bound = (report[name]["voc_ap50"] for name in ("detector", "supervised"))
        report["ap50_of_supervised"] = None if bound is None else weak / max(bound, 1e-9)
    if config.masks:
        report |= _masks(config, recipe, rounds[-1].pseudo_labels)
    write_json(config.output / "summary.json", report)
    return report


def _check_data(config: RunConfig) -> None:
    folder = load_coco_folder(config.data)
    if not config.skip_bad:
        check_tags(folder)
    unknown = sum(not record.has_known_boxes for record in folder.records)
    for option in ("supervised", "measure_drop"):
        if getattr(config, option) and unknown:
            raise ValueError(
                f"--{option.replace('_', '-')} needs the true boxes of the training images, and "
                f"{unknown} of {len(folder.records)} of {config.data} have tags only; leave it out"
            )


def _masks(config: RunConfig, recipe: ChainRecipe, pseudo_labels: Path) -> dict[str, Any]:
    """Pseudo masks and Mask R-CNN; their part of the summary."""
    folder = config.output / "pseudo_masks"
    generate_pseudo_masks(
        PseudoMaskConfig(
            data=config.data,
            annotations=pseudo_labels / generate_pseudo_labels.ANNOTATIONS_NAME,
            sam=config.sam,
            output=folder,
            recipe=recipe.pseudo_masks,
            device=config.device,
            skip_bad=config.skip_bad,
            num_threads=config.num_threads,
        )
    )
    detector = config.output / "mask_rcnn"
    _retrain(config, recipe.with_masks(), detector, folder / MASKS_NAME)
    report = {
        "pseudo_masks": read_manifest(folder)["metrics"],
        "mask_rcnn": read_manifest(detector)["metrics"]["val"],
        "mask_rcnn_roi_drop": read_manifest(detector)["metrics"].get("roi_drop"),
    }
    if config.supervised:
        bound = config.output / "supervised_masks"
        _retrain(config, _trusting(recipe.with_masks()), bound, annotations=None)
        report["supervised_masks"] = read_manifest(bound)["metrics"]["val"]
    return report


def _trusting(recipe: ChainRecipe) -> ChainRecipe:
    """RoI drop distrusts boxes; true ones need none, and the bound should be the highest."""
    return replace(recipe, detector=replace(recipe.detector, roi_drop=RoiDropConfig(enabled=False)))


@dataclass(frozen=True, kw_only=True)
class _Round:
    """Folders of one round's stages."""

    pseudo_labels: Path
    detector: Path


def _round(config: RunConfig, recipe: ChainRecipe, detections: Path, suffix: str) -> _Round:
    """Choose pseudo boxes from ``detections`` on the training images and train a detector."""
    folders = _Round(
        pseudo_labels=config.output / f"pseudo_labels{suffix}",
        detector=config.output / f"detector{suffix}",
    )
    generate_pseudo_labels.main(
        generate_pseudo_labels.PseudoLabelConfig(
            data=config.data,
            detections=detections,
            output=folders.pseudo_labels,
            recipe=recipe.pseudo_labels,
            skip_bad=config.skip_bad,
        )
    )
    annotations = folders.pseudo_labels / generate_pseudo_labels.ANNOTATIONS_NAME
    _retrain(config, recipe, folders.detector, annotations)
    return folders


def _relabel(config: RunConfig, detector: Path, suffix: str) -> Path:
    """Detections of a finished detector on the training images."""
    output = config.output / f"relabel{suffix}"
    weights = detector / retrain_detector.WEIGHTS_NAME
    relabel(
        RelabelConfig(
            data=config.data,
            detector=weights,
            output=output,
            device=config.device,
            skip_bad=config.skip_bad,
        )
    )
    return output / retrain_detector.DETECTIONS_NAME


def _proposals(config: RunConfig, recipe: ChainRecipe) -> tuple[Path, Path]:
    """Folders of the training and the validation proposals; predicted tags for the latter."""
    base = config.output if config.proposals is None else config.proposals
    folders = base / "proposals_train", base / "proposals_val"
    if config.proposals is not None:
        for folder in folders[: 1 + config.val_proposals]:
            read_manifest(folder)
        return folders
    classifier = config.output / "classifier" if config.classifier is None else config.classifier
    if config.classifier is None:
        train_classifier(
            TrainClassifierConfig(
                output=classifier,
                data=config.data,
                val=config.val,
                negatives=config.negatives,
                weights=config.vit_weights,
                recipe=recipe.classifier,
                device=config.device,
                num_threads=config.num_threads,
                skip_bad=config.skip_bad,
                num_workers=config.classifier_workers,
            )
        )
    predicted: ProposalRecipe = replace(recipe.proposals, tags="predicted")
    wanted = [(folders[0], config.data, recipe.proposals), (folders[1], config.val, predicted)]
    for folder, data, settings in wanted[: 1 + config.val_proposals]:
        generate_proposals(
            GenerateProposalsConfig(
                output=folder,
                data=data,
                classifier=classifier / WEIGHTS_NAME,
                sam=config.sam,
                recipe=settings,
                device=config.device,
                num_workers=config.proposal_workers,
                num_threads=config.num_threads,
                skip_bad=config.skip_bad,
            )
        )
    return folders


def _retrain(
    config: RunConfig, recipe: ChainRecipe, output: Path, annotations: Path | None
) -> None:
    is_measured = config.measure_drop and annotations is not None
    retrain_detector.main(
        retrain_detector.RetrainDetectorConfig(
            data=config.data,
            output=output,
            annotations=annotations,
            truth=config.data / "instances.json" if is_measured else None,
            val=config.val,
            negatives=config.negatives,
            trunk_weights=config.trunk_weights,
            recipe=recipe.detector,
            device=config.device,
            skip_bad=config.skip_bad,
        )
    )


def main(config: tyro.conf.OmitArgPrefixes[RunConfig]) -> None:
    """Run the chain and print the summary."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])
    recipe = RECIPES[config.recipe]().with_seed(config.seed)
    try:
        config = checked(config)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    Console().print_json(json.dumps(_run(config, recipe)))


if __name__ == "__main__":
    tyro.cli(main)
