"""Whether an exported SAM answers as the ``segment_anything`` package does, prompt by prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from torch import nn

from weaksam_rt.backends.local import ModelFunction
from weaksam_rt.preprocessing import ModelFrame, resize_longest_side
from weaksam_rt.prompts import (
    FOREGROUND,
    PackedPrompts,
    SamPrompt,
    box_prompt,
    pack_prompts,
    point_prompt,
)

_MAX_PROMPTS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptedImage:
    """An image with prompts of both kinds, in pixels of the image."""

    pixels: NDArray[np.uint8]
    """RGB, [h, w, 3]."""
    points: tuple[tuple[float, float], ...]
    """(x, y); each is a prompt of its own."""
    boxes: tuple[tuple[float, float, float, float], ...]
    """XYXY; each is a prompt of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamAgreement:
    """Largest difference of any element, relative to the largest magnitude of the same tensor."""

    embeddings: float
    low_res_logits: float
    iou_predictions: float
    num_prompts: int
    num_calls: int
    """Calls of the mask decoder that answered all prompts of all images."""

    @property
    def worst(self) -> float:
        """The largest of the three."""
        return max(self.embeddings, self.low_res_logits, self.iou_predictions)


def spread_out_(sam: Sam, generator: torch.Generator) -> None:
    """Give an untrained SAM weights under which no part of it is without effect, in place.

    Relative position tables, position embeddings and biases start at zero, and masks of random
    weights are nearly flat: two wrong implementations would agree.
    """
    with torch.no_grad():
        for parameter in sam.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for mlp in sam.mask_decoder.output_hypernetworks_mlps:
            _last_linear(mlp).weight.mul_(40)


def agreement_with_segment_anything(
    sam: Sam,
    encoder: ModelFunction,
    decoder: ModelFunction,
    images: Sequence[PromptedImage],
) -> SamAgreement:
    """Run all prompts of all images packed, and each alone through ``SamPredictor``.

    Args:
        sam: The package's own model, in evaluation mode.
        encoder: The exported ``sam_image_encoder``.
        decoder: The exported ``sam_mask_decoder``.
        images: Of any sizes, with any numbers of prompts.
    """
    framed = [resize_longest_side(image.pixels, sam.image_encoder.img_size) for image in images]
    frames = [frame for _, frame in framed]
    embeddings = _embed(encoder, framed)
    packs = list(pack_prompts([_prompts(i) for i in images], frames, max_prompts=_MAX_PROMPTS))
    answers = _answers(decoder, embeddings, packs)
    predictor = SamPredictor(sam)
    errors = []
    for index, image in enumerate(images):
        predictor.set_image(image.pixels)
        errors.append((_relative(embeddings[index], predictor.features[0].numpy()), 0.0, 0.0))
        for position, arguments in enumerate(_arguments(image)):
            got = answers[index, position]
            _, scores, logits = predictor.predict(**arguments, return_logits=True)
            tokens = slice(1, None) if arguments["multimask_output"] else slice(0, 1)
            logits_error = _relative(got.low_res_logits[tokens], logits)
            errors.append((0.0, logits_error, _relative(got.iou_predictions[tokens], scores)))
    worst = np.max(errors, axis=0)
    return SamAgreement(
        embeddings=float(worst[0]),
        low_res_logits=float(worst[1]),
        iou_predictions=float(worst[2]),
        num_prompts=len(answers),
        num_calls=len(packs),
    )


class _Answer(NamedTuple):
    """Of one prompt."""

    low_res_logits: NDArray[np.float32]
    iou_predictions: NDArray[np.float32]


def _answers(
    decoder: ModelFunction, embeddings: NDArray[np.float32], packs: Sequence[PackedPrompts]
) -> dict[tuple[int, int], _Answer]:
    """The answer to each prompt by image and position in it."""
    answers = {}
    for pack in packs:
        inputs = {
            "image_embeddings": embeddings,
            "image_index": pack.image_index,
            "point_coords": pack.point_coords,
            "point_labels": pack.point_labels,
        }
        answer = decoder(inputs, None)
        for row, key in enumerate(zip(pack.image_index, pack.positions, strict=True)):
            image, position = map(int, key)
            answers[image, position] = _Answer(
                answer["low_res_logits"][row], answer["iou_predictions"][row]
            )
    return answers


def _last_linear(mlp: nn.Module) -> nn.Linear:
    return [module for module in mlp.modules() if isinstance(module, nn.Linear)][-1]


def _embed(
    encoder: ModelFunction, framed: Sequence[tuple[NDArray[np.uint8], ModelFrame]]
) -> NDArray[np.float32]:
    """One call for each image: a ViT's attention maps of several would not fit a small machine."""
    return np.concatenate(
        [
            encoder(
                {
                    "image": pixels[None],
                    "valid_size": np.array([frame.valid_size], np.int32),
                },
                None,
            )["image_embeddings"]
            for pixels, frame in framed
        ]
    )


def _prompts(image: PromptedImage) -> list[SamPrompt]:
    label = np.array([FOREGROUND], np.int32)
    points = [point_prompt(np.array([point], np.float32), label) for point in image.points]
    return points + [box_prompt(np.array(box, np.float32)) for box in image.boxes]


def _arguments(image: PromptedImage) -> list[dict[str, Any]]:
    """The same prompts for ``SamPredictor.predict``."""
    points: list[dict[str, Any]] = [
        {
            "point_coords": np.array([point]),
            "point_labels": np.array([1]),
            "multimask_output": True,
        }
        for point in image.points
    ]
    boxes = [{"box": np.array(box), "multimask_output": False} for box in image.boxes]
    return points + boxes


def _relative(got: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())
