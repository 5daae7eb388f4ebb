"""What there is to export: each trained model as a contract-shaped module with inputs to try it
on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.verify import FP32, Tolerance
from training.engine.stage import MANIFEST_NAME, read_manifest
from training.models.detector_adapter import DetectorAdapter
from training.models.sam import load_sam
from training.models.sam_adapters import SamImageEncoderAdapter, SamMaskDecoderAdapter
from training.models.vit_adapter import load_classifier
from training.retrain_detector import load_detector
from weaksam_rt.contracts import (
    DETECTOR,
    SAM_IMAGE_ENCODER,
    SAM_MASK_DECODER,
    VIT_CLASSIFIER,
    DetectorParameters,
    ModelContract,
    Parameters,
    PromptedClassifierParameters,
    SamParameters,
    VitClassifierParameters,
    engine_contract,
)
from weaksam_rt.files import sha256_of_file
from weaksam_rt.preprocessing import resize_maps
from weaksam_rt.prompts import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, FOREGROUND, PADDING

_BATCHES = (2, 1, 3)
"""Batch sizes of example inputs; the first is traced."""
RANKED = Tolerance(max_abs_error=1e-3, max_mismatch_share=0.02)
"""Outputs sorted by score: where two scores are equal to rounding, two places may be swapped."""


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """One model ready to be exported."""

    model: str
    """The served model's name."""
    module: nn.Module
    """Takes and gives the tensors of the contract."""
    parameters: Parameters
    inputs: tuple[Mapping[str, NDArray[Any]], ...]
    """Inputs of several sizes; the first one is traced."""
    tolerance: Tolerance
    source: dict[str, Any]
    """Where the weights come from, for the manifest."""

    @property
    def contract(self) -> ModelContract:
        """The model's contract."""
        return engine_contract(self.model, self.parameters)


def detector_exportable(weights: Path) -> Exportable:
    """The detector of ``training.retrain_detector``."""
    model, class_names = load_detector(weights)
    adapter = DetectorAdapter(model)
    side = model.config.image_size
    parameters = DetectorParameters(
        image_size=side,
        num_candidates=adapter.config.num_candidates,
        class_names=class_names,
        mask_size=adapter.mask_size,
    )
    return Exportable(
        model=DETECTOR,
        module=adapter,
        parameters=parameters,
        inputs=example_inputs(DETECTOR, parameters),
        tolerance=RANKED,
        source=_source(weights),
    )


def classifier_exportable(weights: Path) -> Exportable:
    """The classifier of ``training.train_classifier``."""
    loaded = load_classifier(weights)
    adapter = loaded.served()
    parameters = adapter.parameters_of_contract(loaded.class_names)
    return Exportable(
        model=VIT_CLASSIFIER,
        module=adapter,
        parameters=parameters,
        inputs=example_inputs(VIT_CLASSIFIER, parameters),
        tolerance=FP32,
        source=_source(weights),
    )


def sam_exportables(weights: Path) -> tuple[Exportable, Exportable]:
    """Image encoder and mask decoder of one SAM, ours or an official checkpoint."""
    sam = load_sam(weights)
    side = sam.image_encoder.img_size
    grid = sam.prompt_encoder.image_embedding_size[0]
    dim = sam.prompt_encoder.embed_dim
    parameters = SamParameters(image_size=side, embedding_size=grid, embedding_dim=dim)
    source = _source(weights)
    encoder = Exportable(
        model=SAM_IMAGE_ENCODER,
        module=SamImageEncoderAdapter(sam),
        parameters=parameters,
        inputs=example_inputs(SAM_IMAGE_ENCODER, parameters),
        tolerance=FP32,
        source=source,
    )
    decoder = Exportable(
        model=SAM_MASK_DECODER,
        module=SamMaskDecoderAdapter(sam),
        parameters=parameters,
        inputs=example_inputs(SAM_MASK_DECODER, parameters),
        tolerance=FP32,
        source=source,
    )
    return encoder, decoder


def example_inputs(model: str, parameters: Parameters) -> tuple[dict[str, NDArray[Any]], ...]:
    """Seeded inputs of several sizes for a model, on which exports and engines are compared.

    Raises:
        ValueError: ``model`` is no model that is exported.
    """
    match parameters:
        case SamParameters() if model == SAM_MASK_DECODER:
            return tuple(
                _decoder_inputs(parameters, num_images=i, num_prompts=p, num_points=n)
                for i, p, n in ((2, 3, 4), (1, 1, 2), (3, 9, 2), (1, 5, 7))
            )
        case SamParameters(image_size=side):
            return tuple(
                {"image": _pictures(b, side), "valid_size": _valid_sizes(b, side)} for b in _BATCHES
            )
        case DetectorParameters(image_size=side) | VitClassifierParameters(image_size=side):
            return tuple({"image": _pictures(b, side)} for b in _BATCHES)
        case PromptedClassifierParameters():
            return tuple(_tagged_inputs(parameters, passes) for passes in (2, 1))
    raise ValueError(f"{model} is not an exported model")


def chosen_exportables(
    detector: Path | None, classifier: Path | None, sam: Path | None
) -> list[Exportable]:
    """The models whose weights are given, in the order of the arguments."""
    chosen: list[Exportable] = []
    if detector is not None:
        chosen.append(detector_exportable(detector))
    if classifier is not None:
        chosen.append(classifier_exportable(classifier))
    if sam is not None:
        chosen += sam_exportables(sam)
    return chosen


def _pictures(num: int, side: int) -> NDArray[np.uint8]:
    """Smooth seeded pictures: noise alone drives networks far from what they were trained on."""
    rng = np.random.default_rng(num)
    coarse = rng.random((num, 3, 9, 9), dtype=np.float32) * 255
    detail = rng.normal(0, 6, (num, 3, side, side))
    pictures = resize_maps(coarse, (side, side)) + detail
    return np.ascontiguousarray(pictures.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def _tagged_inputs(
    parameters: PromptedClassifierParameters, num_passes: int
) -> dict[str, NDArray[Any]]:
    """One image and perhaps its mirror image, with as many tags as passes."""
    picture = _pictures(1, parameters.image_size)
    passes = [picture, picture[:, :, ::-1]][:num_passes]
    rng = np.random.default_rng(num_passes)
    num_tags = min(num_passes, len(parameters.class_names))
    tags = rng.choice(len(parameters.class_names), num_tags, replace=False)
    return {
        "image": np.concatenate(passes),
        "tag_ids": tags.astype(np.int32),
        "image_size": np.array([375, 500], np.int32),
    }


def _valid_sizes(num: int, side: int) -> NDArray[np.int32]:
    shorter = [side - (side // 3) * (i % 2) for i in range(num)]
    return np.array([(s, side) if i % 3 else (side, s) for i, s in enumerate(shorter)], np.int32)


def _decoder_inputs(
    parameters: SamParameters, *, num_images: int, num_prompts: int, num_points: int
) -> dict[str, NDArray[Any]]:
    """Half the prompts are points with one padding point, half end in the corners of a box."""
    rng = np.random.default_rng([num_images, num_prompts, num_points])
    grid = parameters.embedding_size
    shape = (num_images, parameters.embedding_dim, grid, grid)
    labels = np.full((num_prompts, num_points), FOREGROUND, np.int32)
    labels[::2, -1] = PADDING
    labels[1::2, -2:] = (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)
    coords = rng.uniform(0, parameters.image_size, (num_prompts, num_points, 2))
    return {
        "image_embeddings": rng.normal(size=shape).astype(np.float32),
        "image_index": rng.integers(0, num_images, num_prompts).astype(np.int32),
        "point_coords": coords.astype(np.float32),
        "point_labels": labels,
    }


def _source(weights: Path) -> dict[str, Any]:
    """Which weights, and how they came to be where the stage's manifest lies beside them."""
    source: dict[str, Any] = {"file": weights.name, "sha256": sha256_of_file(weights)}
    if (weights.parent / MANIFEST_NAME).is_file():
        manifest = read_manifest(weights.parent)
        kept = ("stage", "config", "inputs", "metrics", "commit", "versions", "duration_s")
        source |= {key: manifest[key] for key in kept}
    return source


def example_tensors(inputs: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    """Arrays as tensors."""
    return {name: torch.from_numpy(array) for name, array in inputs.items()}
