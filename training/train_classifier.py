"""Stage: train the classification ViT on image-level tags.

    python -m training.train_classifier --data DIR --val DIR --output RUN --weights DEIT
    torchrun --nproc-per-node 8 -m training.train_classifier ...      # the same on 8 GPUs

writes ``classifier.safetensors``. Only ``ImageRecord.tags`` is read; boxes and masks are not.

Several processes share each batch, so that their loss curve is that of one process: the order of
the images and their variation depend on seed and epoch only. What each draws for itself is which
residual branches are skipped (``drop_path``).
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.logging import RichHandler
from torch import Tensor, nn

from training.data.augment import AugmentConfig, augment_images
from training.data.bad_images import UsableImages, usable_images
from training.data.coco import CocoFolder, ImageRecord, load_coco_folder
from training.data.pixel_store import open_pixels
from training.data.rand_augment import VariedImages, make_transform, varied_batches
from training.distributed import DeviceName, Process, training_process
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
_IMAGES_NAME = "images.npy"
"""The scaled images, while several processes share them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierRecipe:
    """Everything that decides the result of a training besides its data."""

    model: WeakTrConfig = field(
        default_factory=lambda: WeakTrConfig(class_readout="linear", coarse_pool="attention")
    )
    """Sizes; with pretrained weights those of the weights. As published: ``published_config``."""
    backbone: str = ""
    """Take the sizes and blocks of this plain ViT of timm, for example ``deit_small_patch16_224``;
    empty: those of ``model``."""
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
    """Share of the steps of linear warm-up, in [0, 1); a cosine follows."""
    first_rate: float = 0.0
    """Where the warm-up starts; 1e-6 as published."""
    last_rate: float = 0.0
    """Where the cosine ends; 1e-5 as published."""
    max_gradient_norm: float | None = 5.0
    """Gradients are scaled down to this norm; None: never, as published."""
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
    device: DeviceName = "auto"
    """Where the model trains."""
    skip_bad: bool = False
    """Leave unreadable images out and list them in the manifest."""
    num_workers: int = 0
    """Processes that read and vary images where the recipe has ``rand_augment``; 0: the training
    process does. The result does not depend on it."""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {self.num_workers}")


@dataclass(frozen=True, kw_only=True)
class TaggedImages:
    """A data set in memory, or in a file that processes share."""

    images: Tensor
    """uint8 [n, s, s, 3], RGB, squeezed to squares."""
    tags: Tensor
    """float32 [n, c], 1 where the image has the class."""
    names: tuple[str, ...]
    """Of the files, for messages."""


@dataclass(frozen=True, kw_only=True)
class TaggedFiles:
    """A data set that is read from its files in every epoch."""

    images: tuple[ImageRecord, ...]
    tags: Tensor
    """float32 [n, c], 1 where the image has the class."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the files, for messages."""
        return tuple(record.path.name for record in self.images)


def train_classifier(config: TrainClassifierConfig) -> None:
    """Train, or go on training, and write the weights; nothing is done where they are there.

    Under ``torchrun`` the processes share each batch; the first alone writes.
    """
    torch.set_num_threads(config.num_threads)
    names = ("data", "val", "negatives", "weights")
    inputs = {name: path for name in names if (path := getattr(config, name)) is not None}
    with training_process(config.device) as process:
        with process.main_first():
            stage = open_stage(
                "train_classifier", config.output, config=config.recipe, inputs=inputs
            )
        if stage.finished:
            return
        if config.weights is None and process.is_main:
            _LOGGER.warning(
                "no ImageNet weights were given: the classifier starts from nothing, which some "
                "thousand images cannot make up for; give a DeiT (--weights, or --vit-weights of "
                "training.run)"
            )
        usable = usable_images(load_coco_folder(config.data), skip_bad=config.skip_bad)
        folder, recipe = usable.folder, config.recipe
        torch.manual_seed(recipe.seed)
        model = make_classifier(
            recipe.model, len(folder.class_names), config.weights, backbone=recipe.backbone
        ).to(process.device)
        train, val, skipped = _load_data(config, usable, model, stage, process)
        metrics = _fit(stage, model, recipe, train, val, process, num_workers=config.num_workers)
        if process.is_main:
            save_classifier(
                stage.directory / WEIGHTS_NAME,
                model,
                folder.class_names,
                provenance={**stage.identity, "metrics": metrics},
            )
            stage.finish(outputs=[WEIGHTS_NAME], metrics={**metrics, "skipped": skipped})
            (stage.directory / _IMAGES_NAME).unlink(missing_ok=True)
        process.wait()


def _load_data(
    config: TrainClassifierConfig,
    usable: UsableImages,
    model: WeakTr,
    stage: Stage,
    process: Process,
) -> tuple[TaggedImages | TaggedFiles, TaggedImages | None, dict[str, str]]:
    """Training and, on the process that measures, validation images; what was skipped of all."""
    recipe = config.recipe
    folder, skipped = usable.folder, dict(usable.skipped)
    process.rows(recipe.batch_size)  # checks it
    negatives = None
    if config.negatives is not None:
        usable = usable_images(load_coco_folder(config.negatives, ()), skip_bad=config.skip_bad)
        negatives, skipped = usable.folder, {**skipped, **usable.skipped}
    num_images = len(folder.records) + (0 if negatives is None else len(negatives.records))
    if num_images < recipe.batch_size:
        raise ValueError(
            f"{config.data} has {num_images} images, fewer than one batch of "
            f"{recipe.batch_size}; choose a smaller batch_size"
        )
    side = model.config.vit.image_size
    train: TaggedImages | TaggedFiles
    if recipe.augment.rand_augment:
        records = _all_records(folder, negatives)
        train = TaggedFiles(images=records, tags=_tags(folder, len(records)))
    else:
        store = stage.directory / _IMAGES_NAME if process.num_processes > 1 else None
        with process.main_first():
            train = load_tagged_images(
                folder, math.ceil(side * recipe.cache_margin), negatives=negatives, store=store
            )
    val = None
    if config.val is not None and process.is_main:
        usable = usable_images(
            load_coco_folder(config.val, folder.class_names), skip_bad=config.skip_bad
        )
        skipped = {**skipped, **usable.skipped}
        val = load_tagged_images(usable.folder, side)
    return train, val, skipped


def make_classifier(
    config: WeakTrConfig, num_classes: int, weights: Path | None, *, backbone: str = ""
) -> WeakTr:
    """A fresh classifier, or one that starts from a ViT's weights; those of a quantised DeiT
    bring the activation ranges that they need.

    Args:
        config: Sizes and maps.
        num_classes: Class tokens.
        weights: State dict in timm's names, with one class token; None: start from nothing.
        backbone: A plain ViT of timm that replaces the sizes in ``config``.
    """
    if backbone:
        from training.models.timm_vit import timm_vit_config  # timm takes a second to import

        settings = ("drop_path", "final_norm", "position_margin")
        kept = {name: getattr(config.vit, name) for name in settings}
        config = dataclasses.replace(config, vit=timm_vit_config(backbone, **kept))
    if weights is None:
        return WeakTr(config, num_classes)
    tensors = load_weights(weights)
    if _RANGES_NAME in tensors:
        ranges = activation_ranges_from_scales(tensors[_RANGES_NAME].float())
        vit = dataclasses.replace(config.vit, activation_ranges=ranges)
        config = dataclasses.replace(config, vit=vit)
    if config.vit.timm_model:
        from training.models.timm_vit import with_imagenet_input

        tensors = with_imagenet_input(config.vit.timm_model, tensors)
    model = WeakTr(config, num_classes)
    load_deit_(model.vit, tensors)
    return model


def load_tagged_images(
    folder: CocoFolder,
    side: int,
    *,
    negatives: CocoFolder | None = None,
    store: Path | None = None,
) -> TaggedImages:
    """Read all images, squeezed to squares of ``side`` pixels as in serving.

    Args:
        folder: Tagged images.
        side: Pixels.
        negatives: Images without any of the tags, which come after them.
        store: Keep the pixels in this file instead of memory; a whole one is used as it is.
    """
    records = _all_records(folder, negatives)
    tags = _tags(folder, len(records))
    shape = (len(records), side, side, 3)
    if store is None:
        images = np.empty(shape, dtype=np.uint8)
        _fill(images, records)
    else:
        images = open_pixels(
            store, shape, lambda pixels: _fill(pixels, records), copy_on_write=True
        )
    names = tuple(record.path.name for record in records)
    return TaggedImages(images=torch.from_numpy(images), tags=tags, names=names)


def _all_records(folder: CocoFolder, negatives: CocoFolder | None) -> tuple[ImageRecord, ...]:
    return (*folder.records, *(() if negatives is None else negatives.records))


def _tags(folder: CocoFolder, num_images: int) -> Tensor:
    """[n, c] of the folder's images and, without tags, those after them."""
    tags = torch.zeros(num_images, len(folder.class_names))
    for row, record in enumerate(folder.records):
        tags[row, list(record.tags)] = 1.0
    return tags


def _fill(images: NDArray[np.uint8], records: Sequence[ImageRecord]) -> None:
    for row, record in enumerate(records):
        images[row] = resize_to_square(record.image(), images.shape[1])


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
    """Linear warm-up, then half a cosine down to the last rate after the last step."""
    num_warmup = math.ceil(recipe.warmup_share * num_steps)
    if step < num_warmup:
        rise = recipe.learning_rate - recipe.first_rate
        return recipe.first_rate + rise * (step + 1) / num_warmup
    share = (step - num_warmup) / max(1, num_steps - num_warmup)
    fall = recipe.learning_rate - recipe.last_rate
    return recipe.last_rate + fall * 0.5 * (1 + math.cos(math.pi * share))


def predict_tags(model: WeakTr, images: Tensor) -> NDArray[np.float32]:
    """Class-token logits [n, c] of pixels uint8 [n, s, s, 3], as served."""
    served = VitClassifierAdapter(model)
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        logits = [served(part.to(device))[0].cpu() for part in images.split(_EVALUATION_BATCH)]
    model.train(was_training)
    found: NDArray[np.float32] = torch.cat(logits).numpy()
    return found


def _fit(
    stage: Stage,
    model: WeakTr,
    recipe: ClassifierRecipe,
    train: TaggedImages | TaggedFiles,
    val: TaggedImages | None,
    process: Process,
    *,
    num_workers: int,
) -> dict[str, float]:
    optimizer = make_optimizer(model, recipe)
    checkpoint = stage.directory / _CHECKPOINT_NAME
    done = 0
    metrics: dict[str, float] = {}
    if checkpoint.exists():
        done, metrics = load_checkpoint(checkpoint, modules={"model": model}, optimizer=optimizer)
        _LOGGER.info("going on after epoch %d", done)
    process.wait()  # all have read the checkpoint before the main process writes the next one
    in_step = process.in_step(model)
    num_steps = recipe.epochs * (len(train.images) // recipe.batch_size)
    display = stage_progress()
    display.disable = not process.is_main
    with display as progress:
        steps_done = done * num_steps // recipe.epochs
        task = progress.add_task("train_classifier", total=num_steps, completed=steps_done)
        guard = LossGuard(checkpoint, counts="epochs")
        for epoch in range(done, recipe.epochs):
            metrics = _train_epoch(
                in_step,
                optimizer,
                recipe,
                train,
                epoch,
                image_size=model.config.vit.image_size,
                guard=guard,
                on_step=lambda: progress.advance(task),
                process=process,
                num_workers=num_workers,
            )
            if not process.is_main:
                continue
            if val is not None:
                metrics |= _measure(model, val)
            stage.log_metrics(step=epoch + 1, **metrics)
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
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: ClassifierRecipe,
    train: TaggedImages | TaggedFiles,
    epoch: int,
    *,
    image_size: int,
    guard: LossGuard,
    on_step: Callable[[], None],
    process: Process,
    num_workers: int,
) -> dict[str, float]:
    """One pass; order and augmentation depend on (seed, epoch) only, what a process skips by
    chance on its rank too. Each process watches the loss of its own rows.
    """
    generator = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
    torch.manual_seed((recipe.seed * 100_003 + epoch) * 1_009 + process.rank)
    order = torch.randperm(len(train.images), generator=generator)
    batches = order.split(recipe.batch_size)[: len(order) // recipe.batch_size]
    rows, names = process.rows(recipe.batch_size), train.names
    readings: list[dict[str, float]] = []
    if isinstance(train, TaggedFiles):
        inputs = _from_files(train, order, recipe, epoch, image_size, rows, num_workers=num_workers)
    else:
        inputs = _from_memory(train, batches, recipe, generator, image_size, rows, process.device)
    model.train()
    for index, (batch, images) in enumerate(zip(batches, inputs, strict=True)):
        rate = learning_rate(epoch * len(batches) + index, recipe.epochs * len(batches), recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        with torch.autocast(
            process.device.type, dtype=torch.bfloat16, enabled=recipe.mixed_precision
        ):
            output = model(images.to(process.device))
        loss, parts = weaktr_loss(
            output,
            train.tags[batch[rows]].to(process.device),
            background_weight=recipe.background_weight,
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
        optimizer.step()
        guard.check(
            sum(parts.values()),
            step=epoch * len(batches) + index,
            images=[names[i] for i in batch[rows].tolist()],
        )
        readings.append(parts)
        on_step()
    return process.mean(
        {f"loss_{name}": _mean([r[name] for r in readings]) for name in readings[0]}
    )


def _from_memory(
    train: TaggedImages,
    batches: Sequence[Tensor],
    recipe: ClassifierRecipe,
    generator: torch.Generator,
    image_size: int,
    rows: slice,
    device: torch.device,
) -> Iterator[Tensor]:
    """This process's rows of each batch, varied at once."""
    for batch in batches:
        yield augment_images(
            train.images[batch[rows]].to(device),
            image_size,
            recipe.augment,
            generator,
            rows=rows,
            batch_size=len(batch),
        )


def _from_files(
    train: TaggedFiles,
    order: Tensor,
    recipe: ClassifierRecipe,
    epoch: int,
    image_size: int,
    rows: slice,
    *,
    num_workers: int,
) -> Iterator[Tensor]:
    """This process's rows of each batch, each image varied by itself."""
    images = VariedImages(
        records=[train.images[i] for i in order.tolist()],
        transform=make_transform(image_size, recipe.augment),
        seed=recipe.seed,
        epoch=epoch,
    )
    size = recipe.batch_size
    places = range(len(order) // size * size)
    batches = [places[start : start + size][rows] for start in places[::size]]
    return varied_batches(images, batches, num_workers=num_workers)


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
