"""Train a SAM on masks without classes: ``python -m training.train_sam --output DIR --data DIR``.

Boxes and masks of the training splits are used here only, for a segmenter that knows no class; the
weakly-supervised stages see the result, never the masks. With ``--teacher`` the same loop distils a
larger SAM.
"""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional

from training.data.prompt_samples import (
    AugmentConfig,
    MaskedImage,
    PromptConfig,
    PromptSample,
    draw_sample,
    load_masked_images,
)
from training.engine.checkpoint import load_checkpoint, save_checkpoint
from training.engine.loss_guard import LossGuard
from training.engine.progress import stage_progress
from training.engine.stage import Stage, open_stage
from training.models.sam import (
    CompactImageEncoder,
    SamConfig,
    build_sam,
    compact,
    load_sam,
    save_sam,
)
from training.models.sam_adapters import normalize_images
from training.models.sam_decoder import (
    MaskPrediction,
    decode_masks,
    encode_masks,
    encode_points,
)
from training.models.sam_loss import SamLoss, SamLossConfig, distillation_loss, sam_loss
from training.models.squeezenet import load_imagenet_squeezenet

_LOGGER = logging.getLogger(__name__)
WEIGHTS_NAME = "sam.safetensors"
_CHECKPOINT_NAME = "checkpoint.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamRecipe:
    """Everything that decides the result of a training besides its data."""

    model: SamConfig = field(default_factory=compact)
    """Shapes of the SAM."""
    steps: int = 1500
    """Optimiser steps."""
    batch_size: int = 12
    """Images per step."""
    prompts_per_image: int = 5
    """Prompts per image."""
    learning_rate: float = 8e-4
    """Peak rate of AdamW."""
    trunk_rate_factor: float = 0.25
    """Rate of a pretrained trunk relative to the rest."""
    frozen: tuple[str, ...] = ()
    """Parameters whose names begin so stay as they are: the trunk's first layers cost most."""
    weight_decay: float = 0.02
    """Of AdamW."""
    warmup_steps: int = 100
    """Steps of linear warm-up; a cosine to zero follows."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: float = 0.997
    """Decay of the averaged weights, which are the result; in [0, 1)."""
    refine_probability: float = 0.25
    """Share of steps with one correcting click and the previous mask as input, in [0, 1]."""
    distill_weight: float = 1.0
    """Of the distillation loss beside the loss on the true masks; used with a teacher only."""
    embedding_weight: float = 1.0
    """Of the squared error of image embeddings where teacher and student agree in shape."""
    cached_side: int = 512
    """Pictures are kept in memory with this longest side."""
    folder_weights: tuple[float, ...] = ()
    """How often each data folder is drawn from; empty: the square root of its number of images."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How views are drawn."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """How prompts are drawn."""
    loss: SamLossConfig = field(default_factory=SamLossConfig)
    """Weights of the loss."""
    mixed_precision: bool = True
    """bfloat16 autocast: on CPUs with matrix units several times faster than float32."""
    seed: int = 0
    """Of weights, samples and prompts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSamConfig:
    """Train a class-agnostic SAM on the masks of COCO-format folders."""

    output: Path
    """Folder of the stage; a killed training goes on from its last checkpoint there."""
    data: tuple[Path, ...]
    """Folders with ``images/`` and ``instances.json``."""
    init: Path | None = None
    """Start from the weights of this SAM."""
    trunk_weights: Path | None = None
    """Start the compact encoder's trunk from the published SqueezeNet weights in this file."""
    teacher: Path | None = None
    """Distil this SAM (of any size)."""
    recipe: SamRecipe = field(default_factory=SamRecipe)
    """Everything else."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    num_threads: int = 2
    """CPU threads of torch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamBatch:
    """b views with p prompts each."""

    images: Tensor
    """uint8 [b, 3, s, s], RGB."""
    valid_size: Tensor
    """int32 [b, 2]."""
    coverage: Tensor
    """float32 [b * p, s / 2, s / 2]."""
    point_coords: Tensor
    """float32 [b * p, 2, 2]."""
    point_labels: Tensor
    """int32 [b * p, 2]."""
    is_box: Tensor
    """bool [b * p]."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """All state that a step changes."""

    sam: Sam
    average: Sam
    optimizer: torch.optim.Optimizer
    teacher: Sam | None

    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint must hold."""
        return {"sam": self.sam, "average": self.average}


def main(config: TrainSamConfig) -> None:
    """Train, or go on training, and write the averaged weights."""
    torch.set_num_threads(config.num_threads)
    inputs = {f"data{i}": path for i, path in enumerate(config.data)}
    optional = {"init": config.init, "trunk": config.trunk_weights, "teacher": config.teacher}
    inputs |= {name: path for name, path in optional.items() if path is not None}
    stage = open_stage("train_sam", config.output, config=config.recipe, inputs=inputs)
    if stage.finished:
        return
    recipe = config.recipe
    folders = [load_masked_images(path, recipe.cached_side) for path in config.data]
    _LOGGER.info("images with masks: %s", [len(folder) for folder in folders])
    training = start_training(config)
    checkpoint = stage.directory / _CHECKPOINT_NAME
    done = 0
    if checkpoint.exists():
        done, _ = load_checkpoint(
            checkpoint, modules=training.modules(), optimizer=training.optimizer
        )
        _LOGGER.info("going on after step %d", done)
    guard = LossGuard(checkpoint)
    with stage_progress(slow=True) as progress:
        task = progress.add_task("train_sam", total=recipe.steps, completed=done)
        for step in range(done, recipe.steps):
            samples = draw_batch(folders, recipe, step)
            scalars = train_step(training, make_batch(samples), recipe, step)
            guard.check(scalars["loss"], step=step, images=[sample.name for sample in samples])
            stage.log_metrics(step=step + 1, **scalars)
            progress.update(task, advance=1, description=f"loss {scalars['loss']:.3f}")
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == recipe.steps:
                _write_state(stage, training, recipe, step + 1)
    stage.finish(outputs=[WEIGHTS_NAME], metrics=scalars if recipe.steps > done else {})


def start_training(config: TrainSamConfig) -> Training:
    """Fresh state before the first step."""
    recipe = config.recipe
    torch.manual_seed(recipe.seed)
    sam = build_sam(recipe.model)
    if config.init is not None:
        sam.load_state_dict(load_sam(config.init).state_dict())
    elif config.trunk_weights is not None:
        if not isinstance(sam.image_encoder, CompactImageEncoder):
            raise ValueError("trunk weights are for the compact encoder; use init for a ViT")
        trunk = load_imagenet_squeezenet(config.trunk_weights)
        sam.image_encoder.trunk.load_state_dict(trunk.state_dict())
    for name, parameter in sam.named_parameters():
        parameter.requires_grad_(not name.startswith(recipe.frozen))
    teacher = None if config.teacher is None else load_sam(config.teacher).requires_grad_(False)
    return Training(
        sam=sam.train(),
        average=copy.deepcopy(sam).eval().requires_grad_(False),
        optimizer=make_optimizer(sam, recipe),
        teacher=teacher,
    )


def make_optimizer(sam: Sam, recipe: SamRecipe) -> torch.optim.AdamW:
    """AdamW with a lower rate for the trunk and no decay for biases, norms and embeddings."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in sam.named_parameters():
        if not parameter.requires_grad:
            continue
        is_trunk = name.startswith("image_encoder.trunk.")
        decays = parameter.ndim >= 2 and "embed" not in name and "token" not in name
        groups.setdefault((is_trunk, decays), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": recipe.weight_decay if decays else 0.0,
                "rate_factor": recipe.trunk_rate_factor if is_trunk else 1.0,
            }
            for (is_trunk, decays), parameters in groups.items()
        ],
        lr=recipe.learning_rate,
    )


def learning_rate(step: int, recipe: SamRecipe) -> float:
    """Linear warm-up, then half a cosine down to zero after the last step."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    share = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def draw_batch(
    folders: Sequence[Sequence[MaskedImage]], recipe: SamRecipe, step: int
) -> list[PromptSample]:
    """The samples of one step: a function of data, recipe and step, the same after a resume."""
    generator = np.random.default_rng([recipe.seed, step])
    weights = np.array(recipe.folder_weights or [math.sqrt(len(f)) for f in folders])
    if len(weights) != len(folders):
        raise ValueError(f"{len(weights)} folder_weights for {len(folders)} data folders")
    chosen = generator.choice(len(folders), size=recipe.batch_size, p=weights / weights.sum())
    return [
        draw_sample(
            folders[index][generator.integers(len(folders[index]))],
            frame_size=recipe.model.image_size,
            num_prompts=recipe.prompts_per_image,
            augment=recipe.augment,
            prompts=recipe.prompts,
            generator=generator,
        )
        for index in chosen
    ]


def make_batch(samples: Sequence[PromptSample]) -> SamBatch:
    """Stack samples; prompts of one image stay together."""
    labels = torch.from_numpy(np.concatenate([s.point_labels for s in samples]))
    images = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2)
    return SamBatch(
        images=images,
        valid_size=torch.from_numpy(np.stack([s.valid_size for s in samples])),
        coverage=torch.from_numpy(np.concatenate([s.coverage for s in samples])),
        point_coords=torch.from_numpy(np.concatenate([s.point_coords for s in samples])),
        point_labels=labels,
        is_box=labels[:, 0] == 2,
    )


def train_step(
    training: Training, batch: SamBatch, recipe: SamRecipe, step: int
) -> dict[str, float]:
    """One optimiser step and one step of the average; returns readings."""
    rate = learning_rate(step, recipe)
    for group in training.optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    # Drawn from the step alone, like the samples.
    refine = np.random.default_rng([recipe.seed, step, 1]).random() < recipe.refine_probability
    total, loss = batch_loss(training, batch, recipe, refine=refine)
    training.optimizer.zero_grad(set_to_none=True)
    total.backward()
    norm = nn.utils.clip_grad_norm_(training.sam.parameters(), recipe.max_gradient_norm)
    training.optimizer.step()
    update_average_(training.average, training.sam, min(recipe.ema_decay, (1 + step) / (10 + step)))
    return {
        "loss": total.item(),
        "loss_masks": loss.masks.item(),
        "iou_error": loss.iou_error.item(),
        "best_iou": loss.best_iou.item(),
        "gradient_norm": norm.item(),
        "learning_rate": rate,
    }


def batch_loss(
    training: Training, batch: SamBatch, recipe: SamRecipe, *, refine: bool
) -> tuple[Tensor, SamLoss]:
    """The loss to minimise, and the loss of the first prompts on the true masks for reading."""
    sam = training.sam
    device_type = batch.images.device.type
    with torch.autocast(device_type, dtype=torch.bfloat16, enabled=recipe.mixed_precision):
        images = _normalized(sam, batch.images, batch.valid_size)
        embeddings = sam.image_encoder(images)
        prediction = predict(sam, embeddings, batch.point_coords, batch.point_labels)
    loss = sam_loss(prediction, batch.coverage, ~batch.is_box, recipe.loss)
    total = loss.total
    if refine:
        with torch.autocast(device_type, dtype=torch.bfloat16, enabled=recipe.mixed_precision):
            refined = _refine(sam, embeddings, batch, prediction)
        nothing_ambiguous = torch.zeros_like(batch.is_box)
        total = total + sam_loss(refined, batch.coverage, nothing_ambiguous, recipe.loss).total
    if training.teacher is not None:
        total = total + _distill(training.teacher, batch, embeddings, prediction, recipe)
    return total, loss


def predict(
    sam: Sam,
    embeddings: Tensor,
    point_coords: Tensor,
    point_labels: Tensor,
    mask_inputs: Tensor | None = None,
) -> MaskPrediction:
    """Masks for p / b prompts of each of b images, in the images' order."""
    device_type = embeddings.device.type
    dtype = torch.float32
    if torch.is_autocast_enabled(device_type):  # one cast here saves one at every layer
        dtype = torch.get_autocast_dtype(device_type)
    repeats = point_coords.shape[0] // embeddings.shape[0]
    per_prompt = embeddings.to(dtype).repeat_interleave(repeats, dim=0)
    return decode_masks(
        sam.mask_decoder,
        per_prompt + encode_masks(sam.prompt_encoder, mask_inputs).to(dtype),
        image_pe=_dense_positions(sam).to(dtype),
        sparse=encode_points(sam.prompt_encoder, point_coords, point_labels).to(dtype),
    )


def add_correcting_click(batch: SamBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts of three tokens: the old one and a click where ``logits`` [b * p, h, w] are wrong.

    The order is that of ``PromptEncoder``: clicks, then padding or box corners. Where nothing is
    wrong, the click is at a random place with its true label.
    """
    truth = batch.coverage >= 0.5
    wrong = ((logits > 0) != truth).flatten(1).float()
    cell = torch.multinomial(wrong + 1e-6, 1).squeeze(1)
    width = logits.shape[2]
    stride = batch.images.shape[3] / width
    xy = torch.stack([cell % width, cell // width], dim=1)
    clicks = ((xy + 0.5) * stride - 0.5).unsqueeze(1)
    labels = truth.flatten(1).gather(1, cell[:, None]).to(batch.point_labels.dtype)
    coords, kinds = batch.point_coords, batch.point_labels
    first_is_point = (kinds[:, :1] == 1).unsqueeze(2)
    coords = torch.where(
        first_is_point,
        torch.cat([coords[:, :1], clicks, coords[:, 1:]], dim=1),
        torch.cat([clicks, coords], dim=1),
    )
    kinds = torch.where(
        first_is_point[..., 0],
        torch.cat([kinds[:, :1], labels, kinds[:, 1:]], dim=1),
        torch.cat([labels, kinds], dim=1),
    )
    return coords, kinds


@torch.no_grad()
def update_average_(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Move ``average`` towards ``module`` by ``1 - decay``."""
    for mean, current in zip(average.parameters(), module.parameters(), strict=True):
        mean.lerp_(current, 1 - decay)


def _refine(
    sam: Sam, embeddings: Tensor, batch: SamBatch, prediction: MaskPrediction
) -> MaskPrediction:
    """The prediction after one correcting click, with the chosen mask as input."""
    scores = prediction.iou_predictions.detach().float()
    best = torch.where(batch.is_box, 0, 1 + scores[:, 1:].argmax(dim=1))
    rows = torch.arange(len(best), device=best.device)
    logits = prediction.low_res_logits.detach().float()[rows, best]
    coords, labels = add_correcting_click(batch, logits)
    return predict(sam, embeddings, coords, labels, logits.clamp(-32, 32).unsqueeze(1))


def _distill(
    teacher: Sam,
    batch: SamBatch,
    embeddings: Tensor,
    prediction: MaskPrediction,
    recipe: SamRecipe,
) -> Tensor:
    side = teacher.image_encoder.img_size
    scale = side / batch.images.shape[3]
    with torch.no_grad():
        images = functional.interpolate(
            batch.images.float(), (side, side), mode="bilinear", align_corners=False
        )
        valid_size = (batch.valid_size * scale).round().int()
        seen = teacher.image_encoder(_normalized(teacher, images, valid_size))
        coords = (batch.point_coords + 0.5) * scale - 0.5
        target = predict(teacher, seen, coords, batch.point_labels)
    loss = recipe.distill_weight * distillation_loss(prediction, target, recipe.loss)
    if seen.shape == embeddings.shape:
        loss = loss + recipe.embedding_weight * functional.mse_loss(embeddings.float(), seen)
    return loss


def _normalized(sam: Sam, images: Tensor, valid_size: Tensor) -> Tensor:
    return normalize_images(images, valid_size, mean=sam.pixel_mean, std=sam.pixel_std)


def _dense_positions(sam: Sam) -> Tensor:
    """Positional encoding of the cells; in float32, where bfloat16 would blur it."""
    with torch.autocast(sam.device.type, enabled=False):
        return sam.prompt_encoder.get_dense_pe()


def _write_state(stage: Stage, training: Training, recipe: SamRecipe, step: int) -> None:
    save_checkpoint(
        stage.directory / _CHECKPOINT_NAME,
        modules=training.modules(),
        optimizer=training.optimizer,
        step=step,
    )
    provenance = {**stage.identity, "steps": step}
    save_sam(stage.directory / WEIGHTS_NAME, training.average, recipe.model, provenance=provenance)
    _LOGGER.info("step %d: checkpoint and averaged weights written", step)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    main(tyro.cli(TrainSamConfig))
