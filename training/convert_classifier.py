"""A released WeakTr checkpoint as ``classifier.safetensors``, which every stage and the export
read.

    python -m training.convert_classifier --checkpoint WeakTr_CAM_Generation.pth --data DIR \
        --output classifier.safetensors
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import tyro

from training.data.coco import CocoFolder, load_coco_folder
from training.engine.checkpoint import load_weights
from training.models.released_weaktr import weaktr_from_released
from training.models.vit_adapter import save_classifier
from weaksam_rt.errors import ArtifactError
from weaksam_rt.files import sha256_of_file

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertClassifierConfig:
    """Convert a released WeakTr checkpoint."""

    checkpoint: Path
    """The released ``.pth``; read without running code in it."""
    data: Path
    """A converted data folder; its categories name the classes."""
    output: Path
    """The ``.safetensors`` file to write."""


def convert_classifier(config: ConvertClassifierConfig) -> None:
    """Read, check, name the classes, write.

    Raises:
        ArtifactError: The file is not a released WeakTr, or not of these classes.
    """
    try:
        model = weaktr_from_released(load_weights(config.checkpoint))
        names = class_names_of_tokens(load_coco_folder(config.data), model.num_classes)
    except ValueError as error:
        raise ArtifactError(f"{config.checkpoint}: {error}") from error
    provenance = {
        "released_checkpoint": config.checkpoint.name,
        "sha256": sha256_of_file(config.checkpoint),
    }
    save_classifier(config.output, model, names, provenance=provenance)
    _LOGGER.info("%s: %d classes", config.output, sum(name != "" for name in names))


def class_names_of_tokens(folder: CocoFolder, num_tokens: int) -> tuple[str, ...]:
    """The name of each class token, empty for one that stands for no class.

    With as many tokens as classes they follow the category ids. The COCO checkpoint has 90 tokens,
    one for each raw category id, for 80 classes.

    Raises:
        ValueError: The classes are more than the tokens, or a category id is beyond them.
    """
    if len(folder.class_names) == num_tokens:
        return folder.class_names
    if len(folder.class_names) > num_tokens or max(folder.category_ids) > num_tokens:
        raise ValueError(
            f"{num_tokens} class tokens, but {folder.root} has {len(folder.class_names)} classes "
            f"with ids up to {max(folder.category_ids)}; choose the data set of the checkpoint"
        )
    name_of_id = dict(zip(folder.category_ids, folder.class_names, strict=True))
    return tuple(name_of_id.get(token + 1, "") for token in range(num_tokens))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    convert_classifier(tyro.cli(ConvertClassifierConfig))
