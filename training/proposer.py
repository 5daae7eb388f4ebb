"""Proposals of one image of a data set: models once, then image after image."""

import asyncio
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from training.data.bad_images import read_image
from training.data.coco import CocoFolder, ImageRecord, load_coco_folder
from training.data.proposal_shards import ImagePart, Skipped
from training.evaluation.proposal_report import ImageEvidence, ImageMaps, most_masks
from training.map_extraction import MapPasses, peak_prompts, summed_maps
from training.models.sam import load_sam
from training.models.vit_adapter import load_classifier
from training.torch_backend import TrainedModels, proposal_models
from weaksam_rt.class_activation_map import normalize_maps
from weaksam_rt.config import PipelineConfig
from weaksam_rt.contracts import VIT_CLASSIFIER
from weaksam_rt.masks import decode_rle
from weaksam_rt.pipeline import WeakSamPipeline
from weaksam_rt.preprocessing import resize_maps, resize_to_square, sum_over_flip
from weaksam_rt.proposals import PromptedBoxes, select_proposals
from weaksam_rt.types import PointPrompts, PromptSource

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProposalRecipe:
    """Everything that decides the proposals besides models and data."""

    tags: Literal["given", "predicted"] = "given"
    """``given``: the images' own tags, for training. ``predicted``: the classes that the classifier
    sees, for images whose tags must not be known."""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """Settings of the served pipeline."""
    maps: Literal["served", "published"] = "served"
    """``served``: one square pass of the classifier and its mirror image, as when served.
    ``published``: passes over the image at several scales, see ``passes``."""
    passes: MapPasses = field(default_factory=MapPasses)
    """For ``published`` maps."""
    mixed_precision: bool = False
    """SAM in bfloat16: on CPUs with matrix units about twice as fast, with boxes that differ by
    fractions of a pixel from the served ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProposerConfig:
    """What proposals are made from, and how."""

    data: Path
    """Folder with ``images/`` and ``instances.json``."""
    classifier: Path
    """``classifier.safetensors`` of ``train_classifier`` or ``convert_classifier``."""
    sam: Path
    """A SAM of ``train_sam``, or an official checkpoint."""
    recipe: ProposalRecipe
    device: str = "cpu"
    """Torch device of the models."""
    num_threads: int = 2
    """CPU threads of torch."""
    skip_bad: bool = False
    """Leave images that cannot be used out."""


class ImageProposer:
    """Models and data set of one process."""

    def __init__(self, config: ProposerConfig) -> None:
        """Load everything.

        Raises:
            ArtifactError: A model file is damaged.
            ValueError: The data set lacks a class of the classifier.
        """
        torch.set_num_threads(config.num_threads)
        self.recipe = config.recipe
        self._skip_bad = config.skip_bad
        self._classifier = load_classifier(config.classifier)
        self.folder: CocoFolder = load_coco_folder(config.data, self._classifier.class_names)
        self.trained: TrainedModels = proposal_models(
            self._classifier,
            load_sam(config.sam),
            config.recipe.pipeline.clustering,
            device=config.device,
            mixed_precision=config.recipe.mixed_precision,
        )
        self._pipeline = WeakSamPipeline(
            self.trained.backend, self.trained.models, config.recipe.pipeline
        )

    def propose(self, record: ImageRecord) -> ImagePart | Skipped:
        """The proposals of one image.

        Raises:
            ValueError: The image cannot be used and ``skip_bad`` is off.
        """
        try:
            image = read_image(record)
            tags = _tags(record, self.folder, self.recipe)
        except ValueError as error:
            if not self._skip_bad:
                raise
            _LOGGER.warning("left out: %s", error)
            return Skipped(file_name=record.path.name, reason=str(error))
        if self.recipe.maps == "published":
            return self._from_published_maps(record, image, tags)
        result = asyncio.run(self._pipeline.propose(image, tags))
        return ImagePart(
            proposals=result.proposals,
            prompts=_from_maps(result.prompts),
            used_tags=result.used_tags,
        )

    def _from_published_maps(
        self, record: ImageRecord, image: NDArray[np.uint8], tags: list[str] | None
    ) -> ImagePart:
        peaks, used = self._published_peaks(image, tags)
        prompts, prompted = asyncio.run(self._pipeline.prompted_boxes(image, peaks=peaks))
        return ImagePart(
            proposals=select_proposals(prompted, record.image_size, self.recipe.pipeline.proposals),
            prompts=_from_maps(prompts),
            used_tags=tuple(self._classifier.class_names[c] for c in used),
        )

    def _published_peaks(
        self, image: NDArray[np.uint8], tags: list[str] | None
    ) -> tuple[PointPrompts, tuple[int, ...]]:
        names, settings = self._classifier.class_names, self.recipe.pipeline
        return peak_prompts(
            self._classifier,
            image,
            None if tags is None else [names.index(tag) for tag in tags],
            passes=self.recipe.passes,
            clustering=settings.clustering,
            present_logit_thresh=settings.present_logit_thresh,
        )

    def prompted(self, record: ImageRecord) -> tuple[PointPrompts, PromptedBoxes]:
        """All prompts of one image and their boxes before any filter, for experiments.

        Raises:
            ValueError: The image cannot be used.
        """
        image, tags = read_image(record), _tags(record, self.folder, self.recipe)
        peaks = None
        if self.recipe.maps == "published":
            peaks, _ = self._published_peaks(image, tags)
        return asyncio.run(self._pipeline.prompted_boxes(image, peaks=peaks, tags=tags))

    def evidence(self, record: ImageRecord, part: ImagePart) -> ImageEvidence:
        """What the report shows of an image with the result ``part``: its maps and masks again."""
        image = read_image(record)
        class_ids = [self._classifier.class_names.index(tag) for tag in part.used_tags]
        maps = (
            summed_maps(self._classifier, image, class_ids, passes=self.recipe.passes)
            if self.recipe.maps == "published"
            else self._served_maps(image, class_ids)
        )
        shown = most_masks(part.prompts)
        masks = np.zeros((0, *record.image_size), bool)
        if len(shown):
            found = asyncio.run(
                self._pipeline.segment(
                    image,
                    point_coords=shown.points[:, None],
                    point_labels=np.ones((len(shown), 1), np.int32),
                    multimask=True,
                )
            )
            chosen = self.recipe.pipeline.proposals.peak_masks[0]
            masks = decode_rle([counts[chosen] for counts in found.mask_counts], record.image_size)
        return ImageEvidence(record=record, image=image, part=part, maps=maps, masks=masks)

    def _served_maps(self, image: NDArray[np.uint8], class_ids: list[int]) -> ImageMaps:
        parameters = self.trained.models.vit_classifier
        assert parameters is not None
        pixels = resize_to_square(image, parameters.image_size)[None]
        if self.recipe.pipeline.flip:
            pixels = np.concatenate([pixels, pixels[:, :, ::-1]])
        answer = asyncio.run(self.trained.backend.infer(VIT_CLASSIFIER, {"image": pixels}))
        size = (image.shape[0], image.shape[1])

        def at_size(name: str) -> NDArray[np.float32]:
            summed = sum_over_flip(answer[name]).take(class_ids, axis=-3)
            return normalize_maps(resize_maps(summed, size))

        def most(maps: NDArray[np.float32]) -> NDArray[np.float32]:
            return maps.max(axis=0, initial=0.0)

        return ImageMaps(
            coarse=most(at_size("coarse_maps")),
            fine=most(at_size("fine_maps")),
            cross=most(at_size("cross_maps").mean(axis=0)),
        )


def check_tags(folder: CocoFolder) -> None:
    """Raise ``ValueError`` where images have no tags, from which proposals are made."""
    untagged = [record for record in folder.records if not record.tags]
    if untagged:
        raise ValueError(
            f"{len(untagged)} of {len(folder.records)} images of {folder.root} have no tags, the "
            f"first is {untagged[0].path.name}; tag them, leave such images out with --skip-bad, "
            "or let the classifier decide (training.generate_proposals --recipe.tags predicted)"
        )


def _tags(record: ImageRecord, folder: CocoFolder, recipe: ProposalRecipe) -> list[str] | None:
    if recipe.tags == "predicted":
        return None
    if not record.tags:
        raise ValueError(f"{record.path} has no tags")
    return [folder.class_names[tag] for tag in record.tags]


def _from_maps(prompts: PointPrompts) -> PointPrompts:
    return prompts.subset(np.flatnonzero(prompts.sources != PromptSource.GRID))
