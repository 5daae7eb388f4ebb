"""Train Faster R-CNN on boxes, true or pseudo: ``python -m training.retrain_detector --help``.

Writes ``detector.safetensors`` (weights, and the model's config as metadata) and, with ``--val``,
``detections.json`` and a report of the deployed form of the model. A killed run resumes.

The scaled images lie in a file of the stage's folder while it trains, 0.3 MB each at 320 pixels, so
that memory does not grow with the data set; whether the disk has room is checked first.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn
from torch.optim import AdamW

from training.data.bad_images import read_image, usable_images
from training.data.coco import CocoFolder, ImageRecord, load_coco_folder
from training.data.pixel_store import open_pixels
from training.data.results import write_detections
from training.data.sampling import epoch_order, repeat_factors
from training.data.views import FramedImage, TrueBoxes, ViewConfig, annotate_frame, random_view
from training.detect import detect_folder
from training.distributed import DeviceName, choose_device
from training.engine.checkpoint import (
    load_checkpoint,
    load_metadata,
    load_weights,
    save_checkpoint,
    save_weights,
)
from training.engine.loss_guard import LossGuard
from training.engine.progress import stage_progress
from training.engine.stage import Stage, open_stage
from training.evaluate import summary, write_report
from training.models.detector_adapter import DetectorAdapter
from training.models.squeezenet import load_imagenet_squeezenet
from training.retraining.drop_truth import RoiTruth, drop_counts, drop_report, judge_rois
from training.retraining.faster_rcnn import DetectorLosses, FasterRcnn, FasterRcnnConfig
from training.retraining.roi_drop import (
    RoiDropConfig,
    drop_statistics,
    keep_all_rois,
    keep_trusted_rois,
    reduce_roi_losses,
)
from weaksam_rt.config import DetectionConfig
from weaksam_rt.errors import ArtifactError
from weaksam_rt.masks import decode_rle
from weaksam_rt.preprocessing import longest_side_frame, resize_for_detector
from weaksam_rt.types import InstanceMasks

_LOGGER = logging.getLogger(__name__)

WEIGHTS_NAME = "detector.safetensors"
DETECTIONS_NAME = "detections.json"
_CHECKPOINT_NAME = "checkpoint.safetensors"
_IMAGES_NAME = "images.npy"
_NEGATIVES_NAME = "negatives.npy"
_MASK_HEAD = "mask_head."
_FROZEN_LAYERS = ("conv1", "fire2", "fire3", "fire4")


@dataclass(frozen=True, kw_only=True)
class DetectorRecipe:
    """Everything that decides the trained weights, besides the data."""

    model: FasterRcnnConfig = field(default_factory=FasterRcnnConfig)
    view: ViewConfig = field(default_factory=ViewConfig)
    roi_drop: RoiDropConfig = field(default_factory=RoiDropConfig)
    detection: DetectionConfig = field(
        default_factory=lambda: DetectionConfig(score_thresh=0.01, nms_thresh=0.5)
    )
    epochs: int = 12
    """Passes over the images that have boxes."""
    batch_size: int = 8
    """Images per step."""
    repeat_thresh: float = 0.0
    """Images of classes in a smaller share of the images than this, in [0, 1], come more often."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW for the new layers."""
    trunk_rate: float = 0.1
    """Rate of the pretrained trunk relative to ``learning_rate``."""
    weight_decay: float = 0.01
    """Of matrices and kernels; biases and norms have none."""
    warmup_steps: int = 60
    """Steps of linear warm-up; then the rate falls to 0 along a cosine."""
    max_gradient_norm: float = 5.0
    """Gradients are scaled down to this norm."""
    freeze_early_trunk: bool = True
    """Leave conv1 to fire4 as pretrained: edges and textures, and half of the time."""
    only_masks: bool = False
    """Train the mask head alone, on a detector to start from: its boxes stay as they are."""
    seed: int = 0
    """Of initial weights, order and views."""

    def __post_init__(self) -> None:
        if self.only_masks and self.model.mask_channels is None:
            raise ValueError("only_masks needs a mask head; set model.mask_channels")


@dataclass(frozen=True, kw_only=True)
class RetrainDetectorConfig:
    """Train a detector from boxes."""

    data: Path
    """Folder with ``images/`` and ``instances.json``."""
    output: Path
    """Folder of this stage."""
    annotations: Path | None = None
    """Boxes to train on instead of the folder's own, for example pseudo boxes."""
    truth: Path | None = None
    """True boxes of the same images (COCO annotations), evaluation only: the manifest then says
    how many of the RoIs that RoI drop left out were really wrong."""
    negatives: Path | None = None
    """Folder of images that show none of the classes: what a detector must stay silent on."""
    val: Path | None = None
    """Folder to evaluate on at the end."""
    trunk_weights: Path | None = None
    """Pretrained SqueezeNet 1.0; without it the trunk starts at random and is not frozen."""
    start_from: Path | None = None
    """A finished detector (``detector.safetensors``) of the same classes and sizes to go on from,
    for example to give it a mask head; ``trunk_weights`` are not read then."""
    recipe: DetectorRecipe = field(default_factory=DetectorRecipe)
    device: DeviceName = "cpu"
    """Where the model trains and is evaluated; images are read and varied on the CPU."""
    skip_bad: bool = False
    """Leave unreadable images out and list them in the manifest."""

    def __post_init__(self) -> None:
        if self.recipe.only_masks and self.start_from is None:
            raise ValueError("only_masks leaves boxes alone; give the detector with --start-from")


def main(config: RetrainDetectorConfig) -> None:
    """Run the stage."""
    inputs = {"data": config.data}
    for name in ("annotations", "truth", "negatives", "val", "trunk_weights", "start_from"):
        if (path := getattr(config, name)) is not None:
            inputs[name] = path
    stage = open_stage("retrain_detector", config.output, config=config.recipe, inputs=inputs)
    if stage.finished:
        return
    device = torch.device(choose_device(config.device))
    loaded = load_coco_folder(config.data, annotations=config.annotations)
    usable = usable_images(loaded, skip_bad=config.skip_bad)
    folder, skipped = usable.folder, dict(usable.skipped)
    negatives = None
    if config.negatives is not None:
        others = usable_images(load_coco_folder(config.negatives), skip_bad=config.skip_bad)
        negatives = others.folder
        skipped |= others.skipped
    truth = None
    if config.truth is not None:
        truth = load_coco_folder(config.data, folder.class_names, annotations=config.truth)
    start = initial_model(
        config.recipe, folder.class_names, config.trunk_weights, config.start_from
    )
    model = train(stage, folder, config.recipe, start, negatives, truth=truth, device=device)
    metadata = {"model": asdict(config.recipe.model), "class_names": folder.class_names}
    save_weights(stage.directory / WEIGHTS_NAME, model.state_dict(), metadata)
    outputs: list[str] = [WEIGHTS_NAME]
    metrics: dict[str, Any] = {"roi_drop": drop_report(stage.metrics()), "skipped": skipped}
    if config.val is not None:
        val = load_coco_folder(config.val, classes=folder.class_names)
        usable = usable_images(val, skip_bad=config.skip_bad)
        skipped |= usable.skipped
        metrics["val"] = _evaluate(stage, model, usable.folder, config.recipe)
        outputs.append(DETECTIONS_NAME)
    stage.finish(outputs=outputs, metrics=metrics)
    (stage.directory / _CHECKPOINT_NAME).unlink(missing_ok=True)


def load_detector(path: Path) -> tuple[FasterRcnn, tuple[str, ...]]:
    """The model that this stage wrote, in evaluation mode, and its class names."""
    metadata = load_metadata(path)
    class_names = tuple(metadata["class_names"])
    sizes = dict(metadata["model"])
    sizes["anchor_sizes"] = tuple(tuple(level) for level in sizes["anchor_sizes"])
    sizes["aspect_ratios"] = tuple(sizes["aspect_ratios"])
    sizes.setdefault("semantic", False)  # weights from before that part was there
    model = FasterRcnn(FasterRcnnConfig(**sizes), len(class_names))
    try:
        model.load_state_dict(load_weights(path))
    except RuntimeError as error:
        raise ArtifactError(
            f"{path} does not fit its own sizes: {error}; train the detector again"
        ) from error
    return model.eval(), class_names


def train(
    stage: Stage,
    folder: CocoFolder,
    recipe: DetectorRecipe,
    model: FasterRcnn,
    negatives: CocoFolder | None = None,
    *,
    truth: CocoFolder | None = None,
    device: torch.device | None = None,
) -> FasterRcnn:
    """Train ``model`` (of ``initial_model``) from the beginning or from the checkpoint in the
    stage's folder; gives it back in evaluation mode, on ``device`` (None: the CPU). Of
    ``negatives`` the images are read and no boxes; ``truth`` only measures.

    Raises:
        ValueError: No image has a box.
        DivergedError: The loss is not finite or grows without end; the last good checkpoint stays.
    """
    images = load_framed_images(
        folder,
        recipe.model.image_size,
        truth,
        with_masks=recipe.model.mask_channels is not None,
        store=stage.directory / _IMAGES_NAME,
    )
    if not images:
        raise ValueError(f"{folder.root}: no image has a box to train on; check the annotations")
    if negatives is not None:
        images += load_negatives(
            negatives, recipe.model.image_size, store=stage.directory / _NEGATIVES_NAME
        )
    batches = Batches(images, recipe)
    model = model.to(device).to(memory_format=torch.channels_last)
    optimizer = AdamW(parameter_groups(model, recipe), lr=recipe.learning_rate, fused=True)
    checkpoint = stage.directory / _CHECKPOINT_NAME
    done = 0
    if checkpoint.exists():
        done, _ = load_checkpoint(checkpoint, modules={"model": model}, optimizer=optimizer)
        _LOGGER.info("resuming after step %d", done)
    guard = LossGuard(checkpoint)
    num_steps = recipe.epochs * batches.per_epoch
    model.train()
    with stage_progress() as progress:
        task = progress.add_task("train detector", total=num_steps, completed=done)
        for step in range(done, num_steps):
            batch = batches.of_step(step)
            scalars = train_step(model, optimizer, batch, recipe, step, num_steps)
            guard.check(scalars["loss"], step=step, images=[view.name for view in batch])
            stage.log_metrics(step=step, **scalars)
            progress.update(task, advance=1, description=f"loss {scalars['loss']:.3f}")
            if (step + 1) % batches.per_epoch == 0:
                save_checkpoint(
                    checkpoint, modules={"model": model}, optimizer=optimizer, step=step + 1
                )
    for name in (_IMAGES_NAME, _NEGATIVES_NAME):
        (stage.directory / name).unlink(missing_ok=True)
    return model.eval()


def initial_model(
    recipe: DetectorRecipe,
    class_names: tuple[str, ...],
    trunk_weights: Path | None,
    start_from: Path | None = None,
) -> FasterRcnn:
    """The model before its first step: seeded, with a pretrained trunk where there is one, whose
    early layers do not learn if the recipe says so.

    Args:
        recipe: Sizes and seed.
        class_names: In the order of the labels.
        trunk_weights: ImageNet weights of SqueezeNet 1.0, or None.
        start_from: A finished detector whose weights are taken over; a mask head that it lacks
            starts at random.

    Raises:
        ValueError: ``start_from`` knows other classes.
        ArtifactError: ``start_from`` has other sizes.
    """
    torch.manual_seed(recipe.seed)
    trunk = None
    if trunk_weights is not None and start_from is None:
        trunk = load_imagenet_squeezenet(trunk_weights)
    model = FasterRcnn(recipe.model, len(class_names), trunk)
    if start_from is not None:
        _take_over_(model, class_names, start_from)
    if recipe.freeze_early_trunk and (trunk is not None or start_from is not None):
        for name in _FROZEN_LAYERS:
            model.trunk.get_submodule(name).requires_grad_(False)
    if recipe.only_masks:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(_MASK_HEAD))
    return model


def _take_over_(model: FasterRcnn, class_names: tuple[str, ...], start_from: Path) -> None:
    known = tuple(load_metadata(start_from)["class_names"])
    if known != class_names:
        raise ValueError(f"{start_from} knows {list(known)}, the data has {list(class_names)}")
    try:
        result = model.load_state_dict(load_weights(start_from), strict=False)
    except RuntimeError as error:
        raise ArtifactError(f"{start_from} does not fit the recipe's sizes: {error}") from error
    lacking = [name for name in result.missing_keys if not name.startswith(_MASK_HEAD)]
    if lacking or result.unexpected_keys:
        raise ArtifactError(
            f"{start_from} does not fit the recipe: it lacks {lacking[:3]} and has "
            f"{result.unexpected_keys[:3]} too many; choose the recipe that it was trained with"
        )


def load_framed_images(
    folder: CocoFolder,
    frame_side: int,
    truth: CocoFolder | None = None,
    *,
    with_masks: bool = False,
    store: Path | None = None,
) -> list[FramedImage]:
    """All images that have a box, in the model frame, without crowd boxes; with the true boxes of
    the same images where ``truth`` is given.

    Args:
        folder: With the boxes to learn from.
        frame_side: Of the model's input, pixels.
        truth: The same images with their true boxes.
        with_masks: The masks of the boxes too, run-length coded.
        store: Keep the pixels in this file instead of memory; a whole one is used as it is.

    Raises:
        ValueError: ``truth`` lacks one of the images or its boxes, or a box has no mask and masks
            are wanted.
        OSError: The disk has no room for the file.
    """
    of_image = {} if truth is None else {record.image_id: record for record in truth.records}
    records = [record for record in folder.records if (~record.is_crowd).any()]
    for record in records if truth is not None else ():
        _check_truth(record, of_image.get(record.image_id))
    images = []
    for record, pixels in zip(records, _framed_pixels(records, frame_side, store), strict=True):
        framed = annotate_frame(
            pixels,
            record.boxes[~record.is_crowd],
            record.labels[~record.is_crowd],
            image_size=record.image_size,
            masks=record.masks()[~record.is_crowd] if with_masks else None,
            name=record.path.name,
        )
        if truth is not None:
            framed = replace(framed, truth=_true_boxes(of_image[record.image_id], frame_side))
        images.append(framed)
    return images


def _check_truth(record: ImageRecord, truth: ImageRecord | None) -> None:
    if truth is None:
        raise ValueError(f"the true boxes lack {record.path.name}; give all images")
    if not truth.has_known_boxes:
        raise ValueError(
            f"{record.path.name} has tags and no true boxes to measure with; leave the truth out"
        )


def _true_boxes(record: ImageRecord, frame_side: int) -> TrueBoxes:
    frame = longest_side_frame(record.image_size, frame_side)
    return TrueBoxes(
        boxes=frame.to_model(record.boxes[~record.is_crowd]),
        labels=record.labels[~record.is_crowd],
    )


def load_negatives(
    folder: CocoFolder, frame_side: int, *, store: Path | None = None
) -> list[FramedImage]:
    """All images in the model frame, without boxes; ``store`` as for ``load_framed_images``."""
    none = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    pixels_of_all = _framed_pixels(folder.records, frame_side, store)
    return [
        annotate_frame(pixels, *none, image_size=record.image_size, name=record.path.name)
        for record, pixels in zip(folder.records, pixels_of_all, strict=True)
    ]


def _framed_pixels(
    records: Sequence[ImageRecord], frame_side: int, store: Path | None
) -> NDArray[np.uint8]:
    """[n, s, s, 3], in memory or in a file."""

    def fill(pixels: NDArray[np.uint8]) -> None:
        for place, record in enumerate(track(records, description="read images", transient=True)):
            pixels[place], _ = resize_for_detector(read_image(record), frame_side)

    shape = (len(records), frame_side, frame_side, 3)
    if store is not None and records:
        return open_pixels(store, shape, fill)
    pixels = np.empty(shape, np.uint8)
    fill(pixels)
    return pixels


class Batches:
    """The random views of each step; they depend on the seed and the step only."""

    def __init__(self, images: Sequence[FramedImage], recipe: DetectorRecipe) -> None:
        self.per_epoch = -(-len(images) // recipe.batch_size)
        self._images = images
        self._recipe = recipe
        classes = [set(image.labels.tolist()) for image in images]
        self._factors = repeat_factors(classes, recipe.repeat_thresh)
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def of_step(self, step: int) -> list[FramedImage]:
        """The batch of the 0-based ``step``; fast where steps come in order."""
        recipe = self._recipe
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = np.random.default_rng((recipe.seed, epoch))
            self._epoch, self._order = epoch, epoch_order(self._factors, generator)
        chosen = self._order[position * recipe.batch_size : (position + 1) * recipe.batch_size]
        generator = np.random.default_rng((recipe.seed, epoch, position))
        return [random_view(self._images[index], recipe.view, generator) for index in chosen]


def train_step(
    model: FasterRcnn,
    optimizer: AdamW,
    batch: Sequence[FramedImage],
    recipe: DetectorRecipe,
    step: int,
    num_steps: int,
) -> dict[str, float]:
    """One optimiser step; gives the scalars to log."""
    factor = rate_factor(step, num_steps, recipe.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    device = model.pixel_mean.device
    pixels = torch.from_numpy(np.stack([view.pixels for view in batch])).to(device)
    masks = None
    if model.mask_head is not None:
        masks = [_masks_of(view).to(device) for view in batch]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        losses = model.training_losses(
            pixels.permute(0, 3, 1, 2).float(),
            [torch.from_numpy(view.boxes).to(device) for view in batch],
            [torch.from_numpy(view.labels).to(device) for view in batch],
            masks,
        )
    truth = _truth_of_rois(losses, batch)
    total, scalars = total_loss(losses, recipe.roi_drop, step, num_steps, truth=truth)
    optimizer.zero_grad()
    if total.requires_grad:  # masks alone learn nothing from a batch without objects
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
        optimizer.step()
    return scalars


def _masks_of(view: FramedImage) -> Tensor:
    """[n, s, s]; images of background come without masks and have none."""
    side = len(view.pixels)
    masks = view.masks or InstanceMasks(rle_counts=(), image_size=(side, side))
    return torch.from_numpy(np.ascontiguousarray(decode_rle(masks.rle_counts, masks.image_size)))


def _truth_of_rois(losses: DetectorLosses, batch: Sequence[FramedImage]) -> RoiTruth | None:
    truths = [view.truth for view in batch]
    if all(truth is None for truth in truths):
        return None
    # Images of background come without true boxes and have none.
    none = TrueBoxes(boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, np.int64))
    return judge_rois(losses.sampled, [none if truth is None else truth for truth in truths])


def total_loss(
    losses: DetectorLosses,
    roi_drop: RoiDropConfig,
    step: int,
    num_steps: int,
    *,
    truth: RoiTruth | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Sum of the losses with RoI drop once it has begun, and what to log."""
    counts: dict[str, float] = {}
    if roi_drop.is_active(step, num_steps):
        kept = keep_trusted_rois(losses.rois, roi_drop)
        counts = drop_counts(losses.rois, kept, truth)
    else:
        kept = keep_all_rois(losses.rois)
    rois = reduce_roi_losses(losses.rois, kept)
    total = losses.objectness + losses.rpn_box + rois.classification + rois.regression + rois.mask
    if losses.rois.mask is not None:
        counts["mask"] = rois.mask.item()
    scalars = {
        "loss": total.item(),
        "objectness": losses.objectness.item(),
        "rpn_box": losses.rpn_box.item(),
        "classification": rois.classification.item(),
        "regression": rois.regression.item(),
        **drop_statistics(losses.rois, kept),
        **counts,
    }
    return total, scalars


def rate_factor(step: int, num_steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then a cosine from 1 to 0; ``step`` is 0-based."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * share))


def parameter_groups(model: FasterRcnn, recipe: DetectorRecipe) -> list[dict[str, Any]]:
    """Trunk and new layers by their rates, with and without weight decay."""
    groups = []
    for is_trunk in (False, True):
        peak = recipe.learning_rate * (recipe.trunk_rate if is_trunk else 1.0)
        for decays in (False, True):
            parameters = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
                and name.startswith("trunk.") == is_trunk
                and (parameter.ndim > 1) == decays
            ]
            decay = recipe.weight_decay if decays else 0.0
            groups.append({"params": parameters, "peak_lr": peak, "weight_decay": decay})
    return groups


def _evaluate(
    stage: Stage, model: FasterRcnn, folder: CocoFolder, recipe: DetectorRecipe
) -> dict[str, float | None]:
    device = model.pixel_mean.device
    detections = detect_folder(
        DetectorAdapter(model).eval().to(device),
        folder,
        image_size=recipe.model.image_size,
        config=recipe.detection,
        device=device,
    )
    write_detections(stage.directory / DETECTIONS_NAME, detections, folder=folder)
    report = summary(write_report(stage.directory, folder, detections))
    _LOGGER.info("%s: %s", folder.root, report)
    return report


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(tyro.cli(RetrainDetectorConfig, description=__doc__))
