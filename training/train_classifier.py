"""Stage: train the classification ViT on image-level tags.

    python -m training.train_classifier --data DIR --val DIR --output RUN --weights DEIT

writes ``classifier.safetensors``. Only ``ImageRecord.tags`` is read; boxes and masks are not.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.logging import RichHandler
from torch import Tensor, nn

from training.data.augment import AugmentConfig, augment_images
from training.data.bad_images import usable_images
from training.data.coco import CocoFolder, load_coco_folder
from training.engine.checkpoint import load_checkpoint, load_weights, save_checkpoint
from training.engine.loss_guard import LossGuard
from training.engine.progress import stage_progress
from training.engine.stage import Stage, open_stage
from training.evaluation.tag_ap import tag_average_precision
from training.models.vit import activation_ranges_from_scales, load_deit_
from training.models.vit_adapter import VitClassifierAdapter, save_classifier
from training.models.weaktr import WeakTr, WeakTrConfig, weaktr_loss
from weaksam_rt.preprocessing import resize_to_square

_LOGGER = logging.getLogger(__name__)
WEIGHTS_NAME = "classifier.safetensors"
_CHECKPOINT_NAME = "checkpoint.safetensors"
_RANGES_NAME = "quant.ranges"
"""Tensor of a quantised DeiT's file that gives its activation ranges."""
_EVALUATION_BATCH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierRecipe:
    """Everything that decides the result of a training besides its data."""

    model: WeakTrConfig = field(
        default_factory=lambda: WeakTrConfig(class_readout="linear", coarse_pool="attention")
    )
    """Sizes; with pretrained weights those of the weights."""
    background_weight: float = 0.5
    """Of the loss that no class answers where no class token looks."""
    epochs: int = 4
    """Passes over the training images."""
    batch_size: int = 32
    """Images per step; what is left over at the end of an epoch waits for the next."""
    learning_rate: float = 2e-4
    """Peak rate of AdamW."""
    head_rate_factor: float = 10.0
    """Rate of class tokens, heads and gate, which start from nothing, relative to the rest."""
    weight_decay: float = 0.05
    """Of AdamW, on matrices only."""
    warmup_share: float = 0.1
    """Share of the steps of linear warm-up, in [0, 1); a cosine to zero follows."""
    max_gradient_norm: float = 5.0
    """Gradients are scaled down to this norm."""
    cache_margin: float = 1.15
    """Images are kept in memory this much larger than the model's input, at least 1."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How training images are varied."""
    mixed_precision: bool = True
    """bfloat16 autocast: on CPUs with matrix units several times faster than float32."""
    seed: int = 0
    """Of weights, order and augmentation."""

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1:
            raise ValueError("epochs and batch_size must be at least 1")
        if not 0 <= self.warmup_share < 1:
            raise ValueError(f"warmup_share must lie in [0, 1); got {self.warmup_share}")
        if self.cache_margin < 1:
            raise ValueError(f"cache_margin must be at least 1; got {self.cache_margin}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainClassifierConfig:
    """Train the classification ViT on the tags of a COCO-format folder."""

    output: Path
    """Folder of the stage; a killed training goes on from its last epoch there."""
    data: Path
    """Folder with ``images/`` and ``instances.json``; only the tags are used."""
    val: Path | None = None
    """Folder to measure the tags' mean average precision on, after every epoch."""
    negatives: Path | None = None
    """Folder of images that show none of the classes."""
    weights: Path | None = None
    """Start from this DeiT in timm's names."""
    recipe: ClassifierRecipe = field(default_factory=ClassifierRecipe)
    """Everything else."""
    num_threads: int = 2
    """CPU threads of torch."""
    skip_bad: bool = False
    """Leave unreadable images out and list them in the manifest."""


@dataclass(frozen=True, kw_only=True)
class TaggedImages:
    """A data set in memory."""

    images: Tensor
    """uint8 [n, s, s, 3], RGB, squeezed to squares."""
    tags: Tensor
    """float32 [n, c], 1 where the image has the class."""


def train_classifier(config: TrainClassifierConfig) -> None:
    """Train, or go on training, and write the weights; nothing is done where they are there."""
    torch.set_num_threads(config.num_threads)
    names = ("data", "val", "negatives", "weights")
    inputs = {name: path for name in names if (path := getattr(config, name)) is not None}
    stage = open_stage(
        "train_classifier",
        config.output,
        config=config.recipe,
        inputs=inputs,
    )
    if stage.finished:
        return
    recipe = config.recipe
    usable = usable_images(load_coco_folder(config.data), skip_bad=config.skip_bad)
    folder, skipped = usable.folder, dict(usable.skipped)
    side = recipe.model.vit.image_size
    cached_side = math.ceil(side * recipe.cache_margin)
    train = load_tagged_images(folder, cached_side)
    if config.negatives is not None:
        usable = usable_images(load_coco_folder(config.negatives, ()), skip_bad=config.skip_bad)
        skipped |= usable.skipped
        negatives = load_tagged_images(usable.folder, cached_side)
        train = with_negatives(train, negatives.images)
    if len(train.images) < recipe.batch_size:
        raise ValueError(
            f"{config.data} has {len(train.images)} images, fewer than one batch of "
            f"{recipe.batch_size}; choose a smaller batch_size"
        )
    val = None
    if config.val is not None:
        usable = usable_images(
            load_coco_folder(config.val, folder.class_names), skip_bad=config.skip_bad
        )
        skipped |= usable.skipped
        val = load_tagged_images(usable.folder, side)
    torch.manual_seed(recipe.seed)
    model = make_classifier(recipe.model, len(folder.class_names), config.weights)
    metrics = _fit(stage, model, recipe, train, val)
    save_classifier(
        stage.directory / WEIGHTS_NAME,
        model,
        folder.class_names,
        provenance={**stage.identity, "metrics": metrics},
    )
    stage.finish(outputs=[WEIGHTS_NAME], metrics={**metrics, "skipped": skipped})


def make_classifier(config: WeakTrConfig, num_classes: int, weights: Path | None) -> WeakTr:
    """A fresh classifier, or one that starts from a DeiT's weights; those of a quantised DeiT
    bring the activation ranges that they need.
    """
    if weights is None:
        return WeakTr(config, num_classes)
    tensors = load_weights(weights)
    if _RANGES_NAME in tensors:
        ranges = activation_ranges_from_scales(tensors[_RANGES_NAME].float())
        vit = dataclasses.replace(config.vit, activation_ranges=ranges)
        config = dataclasses.replace(config, vit=vit)
    model = WeakTr(config, num_classes)
    load_deit_(model.vit, tensors)
    return model


def load_tagged_images(folder: CocoFolder, side: int) -> TaggedImages:
    """Read all images of ``folder``, squeezed to squares of ``side`` pixels as in serving."""
    tags = torch.zeros(len(folder.records), len(folder.class_names))
    images = np.empty((len(folder.records), side, side, 3), dtype=np.uint8)
    for row, record in enumerate(folder.records):
        images[row] = resize_to_square(record.image(), side)
        tags[row, list(record.tags)] = 1.0
    return TaggedImages(images=torch.from_numpy(images), tags=tags)


def with_negatives(tagged: TaggedImages, images: Tensor) -> TaggedImages:
    """``tagged`` and after it ``images`` [n, s, s, 3] that show none of its classes."""
    tags = torch.cat([tagged.tags, torch.zeros(len(images), tagged.tags.shape[1])])
    return TaggedImages(images=torch.cat([tagged.images, images]), tags=tags)


def make_optimizer(model: WeakTr, recipe: ClassifierRecipe) -> torch.optim.AdamW:
    """AdamW with a higher rate for what starts from nothing and decay for matrices only."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_new = not name.startswith("vit.") or name == "vit.cls_token"
        decays = parameter.ndim >= 2 and name not in ("vit.cls_token", "vit.pos_embed")
        groups.setdefault((is_new, decays), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": recipe.weight_decay if decays else 0.0,
                "rate_factor": recipe.head_rate_factor if is_new else 1.0,
            }
            for (is_new, decays), parameters in groups.items()
        ],
        lr=recipe.learning_rate,
    )


def learning_rate(step: int, num_steps: int, recipe: ClassifierRecipe) -> float:
    """Linear warm-up, then half a cosine down to zero after the last step."""
    num_warmup = math.ceil(recipe.warmup_share * num_steps)
    if step < num_warmup:
        return recipe.learning_rate * (step + 1) / num_warmup
    share = (step - num_warmup) / max(1, num_steps - num_warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def predict_tags(model: WeakTr, images: Tensor) -> NDArray[np.float32]:
    """Class-token logits [n, c] of pixels uint8 [n, s, s, 3], as served."""
    served = VitClassifierAdapter(model)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        logits = [served(part)[0] for part in images.split(_EVALUATION_BATCH)]
    model.train(was_training)
    found: NDArray[np.float32] = torch.cat(logits).numpy()
    return found


def _fit(
    stage: Stage,
    model: WeakTr,
    recipe: ClassifierRecipe,
    train: TaggedImages,
    val: TaggedImages | None,
) -> dict[str, float]:
    optimizer = make_optimizer(model, recipe)
    checkpoint = stage.directory / _CHECKPOINT_NAME
    done = 0
    metrics: dict[str, float] = {}
    if checkpoint.exists():
        done, metrics = load_checkpoint(checkpoint, modules={"model": model}, optimizer=optimizer)
        _LOGGER.info("going on after epoch %d", done)
    num_steps = recipe.epochs * (len(train.images) // recipe.batch_size)
    with stage_progress() as progress:
        steps_done = done * num_steps // recipe.epochs
        task = progress.add_task("train_classifier", total=num_steps, completed=steps_done)
        guard = LossGuard(checkpoint)
        for epoch in range(done, recipe.epochs):
            metrics = _train_epoch(
                model, optimizer, recipe, train, epoch, on_step=lambda: progress.advance(task)
            )
            if val is not None:
                metrics |= _measure(model, val)
            stage.log_metrics(step=epoch + 1, **metrics)
            lost = sum(value for name, value in metrics.items() if name.startswith("loss_"))
            guard.check(lost, step=epoch, images=["all of this epoch"])
            progress.update(task, description=_summary(epoch, metrics))
            save_checkpoint(
                checkpoint,
                modules={"model": model},
                optimizer=optimizer,
                step=epoch + 1,
                extra=metrics,
            )
    return metrics


def _train_epoch(
    model: WeakTr,
    optimizer: torch.optim.Optimizer,
    recipe: ClassifierRecipe,
    train: TaggedImages,
    epoch: int,
    *,
    on_step: Callable[[], None],
) -> dict[str, float]:
    """One pass; order and augmentation depend on (seed, epoch) only."""
    generator = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
    order = torch.randperm(len(train.images), generator=generator)
    batches = order.split(recipe.batch_size)[: len(order) // recipe.batch_size]
    readings: list[dict[str, float]] = []
    model.train()
    for index, batch in enumerate(batches):
        rate = learning_rate(epoch * len(batches) + index, recipe.epochs * len(batches), recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        side = recipe.model.vit.image_size
        images = augment_images(train.images[batch], side, recipe.augment, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.mixed_precision):
            output = model(images)
        loss, parts = weaktr_loss(
            output, train.tags[batch], background_weight=recipe.background_weight
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
        optimizer.step()
        readings.append(parts)
        on_step()
    return {f"loss_{name}": _mean([r[name] for r in readings]) for name in readings[0]}


def _measure(model: WeakTr, val: TaggedImages) -> dict[str, float]:
    precision = tag_average_precision(predict_tags(model, val.images), val.tags.numpy() > 0)
    return {"val_map": float(np.nanmean(precision))}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _summary(epoch: int, metrics: dict[str, float]) -> str:
    return f"epoch {epoch + 1}: " + " ".join(f"{k} {v:.3f}" for k, v in metrics.items())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])
    train_classifier(tyro.cli(TrainClassifierConfig))
