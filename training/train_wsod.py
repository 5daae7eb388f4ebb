"""Train OICR or MIST on tags and proposals: ``python -m training.train_wsod --help``.

Reads images, their tags and proposals; boxes of the data set are used for evaluation only. Writes
``wsod.safetensors``, ``detections.json`` (of the training images, for pseudo labels) and, with
``--val``, ``val_detections.json``. A killed run resumes.

The descriptions of all proposals lie in a file of the stage's folder while it runs: 6 bytes for
each channel of the trunk, proposal, size and orientation, and 50 more with DropBlock; whether the
disk has room is checked first. Under ``torchrun`` the processes share the images of each step; the
first alone describes and writes. What is drawn for an image (dropout, hidden cells) depends on the
seed, the step and the place in it only, so the curve is that of one process.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn
from torch.optim import AdamW

from training.data.bad_images import usable_images
from training.data.coco import CocoFolder, ImageRecord, load_coco_folder
from training.data.results import read_proposals, write_detections
from training.data.views import FramedImage, frame_image
from training.distributed import DeviceName, Process, training_process
from training.engine.checkpoint import load_checkpoint, save_checkpoint, save_weights
from training.engine.loss_guard import LossGuard
from training.engine.progress import stage_progress
from training.engine.stage import Stage, open_stage
from training.evaluate import summary, write_report
from training.models.detector_adapter import decode_boxes
from training.models.wsod_detector import (
    RoiDescriber,
    RoiDescriptions,
    WsodDetectorConfig,
    WsodHead,
    WsodOutputs,
)
from training.models.wsod_trunks import WsodTrunk, load_trunk
from training.retrain_detector import rate_factor
from training.wsod import mist, oicr
from training.wsod.description_store import (
    as_descriptions,
    open_store,
    row_width,
    write_descriptions,
)
from training.wsod.mil_head import image_loss
from training.wsod.mist import MistConfig
from training.wsod.oicr import OicrConfig
from training.wsod.refinement import BOX_WEIGHTS, BranchLosses, SelectSeeds, refine
from weaksam_rt.boxes import batched_nms, box_area, clip_boxes
from weaksam_rt.preprocessing import longest_side_frame
from weaksam_rt.types import Detections

_LOGGER = logging.getLogger(__name__)

WEIGHTS_NAME = "wsod.safetensors"
DETECTIONS_NAME = "detections.json"
VAL_DETECTIONS_NAME = "val_detections.json"
_CHECKPOINT_NAME = "checkpoint.safetensors"
_STORE_NAME = "descriptions.bin"
_MOST_NAMES = 5
"""Files in a message."""


@dataclass(frozen=True, kw_only=True)
class WsodRecipe:
    """Everything that decides the result, besides the data."""

    model: WsodDetectorConfig = field(default_factory=WsodDetectorConfig)
    method: Literal["oicr", "mist"] = "oicr"
    """Which boxes a branch trusts. oicr: the best ones of a class. mist: several separate ones."""
    oicr: OicrConfig = field(default_factory=OicrConfig)
    mist: MistConfig = field(default_factory=MistConfig)
    extra_image_sizes: tuple[int, ...] = ()
    """More sides of the square input in pixels, multiples of 16: training draws from all sizes,
    detection averages over them. Time and memory grow in proportion."""
    epochs: int = 20
    """Passes over the tagged images."""
    images_per_step: int = 4
    """Images whose gradients are averaged for one step."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW."""
    weight_decay: float = 5e-4
    """Of all parameters."""
    warmup_steps: int = 100
    """Steps of linear warm-up; then the rate falls to 0 along a cosine."""
    min_side_px: float = 16.0
    """Proposals narrower or lower than this, in pixels of the original image, are not used."""
    nms_thresh: float = 0.3
    """Test time: IoU in [0, 1] above which the lesser of two boxes of a class is dropped."""
    max_detections: int = 100
    """Test time: boxes per image."""
    seed: int = 0
    """Of initial weights, order and views."""

    def __post_init__(self) -> None:
        for size in self.extra_image_sizes:
            replace(self.model, image_size=size)  # checks it


@dataclass(frozen=True, kw_only=True)
class TrainWsodConfig:
    """Train a detector from tags and proposals."""

    data: Path
    """Folder with ``images/`` and ``instances.json``; only tags are learnt from."""
    proposals: Path
    """Proposals of its images (COCO results, category 0)."""
    output: Path
    """Folder of this stage."""
    trunk_weights: Path
    """ImageNet weights of ``recipe.model.trunk``: SqueezeNet 1.0 in Caffe's names, ResNet-18 or
    VGG16 in torchvision's."""
    val: Path | None = None
    """Folder to detect on at the end."""
    val_proposals: Path | None = None
    """Proposals of its images."""
    recipe: WsodRecipe = field(default_factory=WsodRecipe)
    device: DeviceName = "cpu"
    """Where proposals are described and the heads train."""
    skip_bad: bool = False
    """Leave unreadable images, and training images without a usable proposal, out and list them in
    the manifest."""

    def __post_init__(self) -> None:
        if (self.val is None) != (self.val_proposals is None):
            raise ValueError("--val and --val-proposals belong together; give both or neither")


@dataclass(frozen=True, kw_only=True)
class WsodView:
    """One image at one size, as it is or mirrored."""

    boxes: Float[Tensor, "n 4"]
    """The proposals in the model frame of this view."""
    descriptions: RoiDescriptions
    is_mirrored: bool


@dataclass(frozen=True, kw_only=True)
class WsodSample:
    """One image ready to learn from."""

    record: ImageRecord
    boxes: NDArray[np.float32]
    """[n, 4], proposals in pixels of the image."""
    views: tuple[WsodView, ...]
    """By size: as it is, then mirrored."""
    tags: Float[Tensor, " c"]
    """1 where the class is in the image, else 0."""


def main(config: TrainWsodConfig) -> None:
    """Run the stage."""
    inputs = {
        "data": config.data,
        "proposals": config.proposals,
        "trunk_weights": config.trunk_weights,
    }
    if config.val is not None and config.val_proposals is not None:
        inputs |= {"val": config.val, "val_proposals": config.val_proposals}
    with training_process(config.device) as process:
        with process.main_first():
            stage = open_stage("train_wsod", config.output, config=config.recipe, inputs=inputs)
        if not stage.finished:
            _run(config, stage, process)
            process.wait()


def _run(config: TrainWsodConfig, stage: Stage, process: Process) -> None:
    recipe = config.recipe
    usable = usable_images(load_coco_folder(config.data), skip_bad=config.skip_bad)
    folder, skipped = usable.folder, dict(usable.skipped)
    trunk = load_trunk(recipe.model.trunk, config.trunk_weights)
    store = stage.directory / _STORE_NAME
    with process.main_first():
        samples = load_samples(
            folder,
            config.proposals,
            trunk,
            recipe,
            store=store,
            device=process.device,
            needs_all=not config.skip_bad,
        )
    learnt = {sample.record.image_id for sample in samples}
    for record in folder.records:
        if record.image_id not in learnt:
            skipped[f"{folder.root.name}/{record.path.name}"] = "it has no usable proposal"
    folder = replace(folder, records=tuple(r for r in folder.records if r.image_id in learnt))
    num_classes = len(folder.class_names)
    head = train(stage, samples, recipe, num_classes=num_classes, process=process)
    if not process.is_main:
        return
    metadata = {"model": asdict(recipe.model), "class_names": folder.class_names}
    save_weights(stage.directory / WEIGHTS_NAME, head.state_dict(), metadata)
    metrics = {"train_evaluation_only": _detect(stage, head, folder, samples, recipe)}
    outputs = [WEIGHTS_NAME, DETECTIONS_NAME]
    if config.val is not None and config.val_proposals is not None:
        usable = usable_images(
            load_coco_folder(config.val, classes=folder.class_names), skip_bad=config.skip_bad
        )
        val = usable.folder
        skipped |= usable.skipped
        val_store = stage.directory / f"val_{_STORE_NAME}"
        val_samples = load_samples(
            val, config.val_proposals, trunk, recipe, store=val_store, device=process.device
        )
        metrics["val"] = _detect(stage, head, val, val_samples, recipe, name=VAL_DETECTIONS_NAME)
        outputs.append(VAL_DETECTIONS_NAME)
    stage.finish(outputs=outputs, metrics={**metrics, "skipped": skipped})
    for name in (_CHECKPOINT_NAME, _STORE_NAME, f"val_{_STORE_NAME}"):
        (stage.directory / name).unlink(missing_ok=True)


def load_samples(
    folder: CocoFolder,
    proposals: Path,
    trunk: WsodTrunk,
    recipe: WsodRecipe,
    *,
    store: Path,
    device: torch.device | None = None,
    needs_all: bool = False,
) -> list[WsodSample]:
    """All images that have a usable proposal, with their descriptions as views of a file.

    Args:
        folder: Images and tags.
        proposals: Of these images.
        trunk: With the maps that the recipe names.
        recipe: Sizes and what is usable.
        store: The file of the descriptions; a whole one is used as it is.
        device: Of the trunk; None: the CPU.
        needs_all: An image without a usable proposal is an error instead of left out.

    Raises:
        ValueError: ``needs_all``, and images have no usable proposal.
        OSError: The disk has no room for the file.
    """
    found = read_proposals(proposals, folder=folder)
    boxes = {
        image_id: of_image.boxes[_is_usable(of_image.boxes, recipe.min_side_px)]
        for image_id, of_image in found.items()
    }
    usable = [record for record in folder.records if len(boxes[record.image_id])]
    lacking = [r.path.name for r in folder.records if not len(boxes[r.image_id])]
    if lacking:
        message = (
            f"{len(lacking)} of {len(folder.records)} images of {folder.root} have no proposal in "
            f"{proposals} of at least {recipe.min_side_px:g} pixels: "
            f"{', '.join(lacking[:_MOST_NAMES])}{' ...' if len(lacking) > _MOST_NAMES else ''}"
        )
        if needs_all:
            raise ValueError(
                f"{message}; make proposals for them (training.generate_proposals), lower "
                "min_side_px, or leave such images out with --skip-bad"
            )
        _LOGGER.warning("%s", message)
    if not usable:
        return []
    num_views = 2 * (1 + len(recipe.extra_image_sizes))
    counts = [num_views * len(boxes[record.image_id]) for record in usable]
    channels, has_cells = trunk.maps.channels, recipe.model.drop_block.enabled
    describer = RoiDescriber(trunk, keep_cells=has_cells)
    describer = describer.to(device).to(memory_format=torch.channels_last).eval()

    def fill(rows: Tensor) -> None:
        parts = zip(usable, rows.split(counts), strict=True)
        for record, own in track(
            parts, total=len(usable), description="describe proposals", transient=True
        ):
            _describe(record, boxes[record.image_id], own, describer, recipe)

    rows = open_store(store, sum(counts), row_width(sum(channels), with_cells=has_cells), fill)
    return [
        _sample(record, boxes[record.image_id], own, channels, recipe, len(folder.class_names))
        for record, own in zip(usable, rows.split(counts), strict=True)
    ]


def train(
    stage: Stage,
    samples: Sequence[WsodSample],
    recipe: WsodRecipe,
    *,
    num_classes: int,
    process: Process | None = None,
) -> WsodHead:
    """Train from the beginning or from the checkpoint in the stage's folder; gives the head in
    evaluation mode, on the device of ``process`` (None: alone, on the CPU).

    Raises:
        ValueError: No sample has a tag.
    """
    tagged = [sample for sample in samples if sample.tags.any()]
    if not tagged:
        raise ValueError("no image has both a tag and a proposal; check the data and proposals")
    process = Process() if process is None else process
    torch.manual_seed(recipe.seed)
    head = WsodHead(recipe.model, num_classes).to(process.device)
    optimizer = AdamW(
        parameter_groups(head, recipe),
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    checkpoint = stage.directory / _CHECKPOINT_NAME
    done = 0
    if checkpoint.exists():
        done, _ = load_checkpoint(checkpoint, modules={"head": head}, optimizer=optimizer)
        _LOGGER.info("resuming after step %d", done)
    process.wait()  # all have read the checkpoint before the main process writes the next one
    steps_per_epoch = -(-len(tagged) // recipe.images_per_step)
    num_steps = recipe.epochs * steps_per_epoch
    guard = LossGuard(checkpoint)
    head.train()
    display = stage_progress()
    display.disable = not process.is_main
    with display as progress:
        task = progress.add_task("train WSOD", total=num_steps, completed=done)
        for step in range(done, num_steps):
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate_factor(step, num_steps, recipe.warmup_steps)
            chosen = _samples_of_step(tagged, recipe, step)
            scalars = train_step(head, optimizer, chosen, recipe, step=step, process=process)
            progress.update(task, advance=1)
            if not process.is_main:
                continue
            stage.log_metrics(step=step, **scalars)
            names = [sample.record.path.name for sample, _ in chosen]
            guard.check(sum(scalars.values()), step=step, images=names)
            if (step + 1) % steps_per_epoch == 0:
                save_checkpoint(
                    checkpoint, modules={"head": head}, optimizer=optimizer, step=step + 1
                )
    return head.eval()


def parameter_groups(head: WsodHead, recipe: WsodRecipe) -> list[dict[str, Any]]:
    """The detector and, where it is there, the hiding network with its own rate."""
    hiding = [] if head.drop_block is None else list(head.drop_block.parameters())
    is_hiding = {id(parameter) for parameter in hiding}
    detector = [p for p in head.parameters() if id(p) not in is_hiding]
    groups = [
        {"params": detector, "peak_lr": recipe.learning_rate},
        {"params": hiding, "peak_lr": recipe.model.drop_block.learning_rate},
    ]
    return [group for group in groups if group["params"]]


def train_step(
    head: WsodHead,
    optimizer: AdamW,
    chosen: Sequence[tuple[WsodSample, WsodView]],
    recipe: WsodRecipe,
    *,
    step: int = 0,
    process: Process | None = None,
) -> dict[str, float]:
    """One optimiser step on samples, each seen in one of its views; gives the scalars to log.

    Args:
        head: Is trained.
        optimizer: Of ``head``.
        chosen: The samples of the step, the same on all processes, which share them.
        recipe: Losses.
        step: Decides, with the seed and the place in the step, what is drawn for a sample.
        process: None: this one alone, on the CPU.
    """
    process = Process() if process is None else process
    optimizer.zero_grad()
    scalars = {"image": 0.0, "refinement": 0.0}
    for place in range(process.rank, len(chosen), process.num_processes):
        sample, view = chosen[place]
        torch.manual_seed((recipe.seed * 1_000_003 + step) * 1_009 + place)
        outputs = head(view.descriptions.to(process.device))
        boxes, tags = view.boxes.to(process.device), sample.tags.to(process.device)
        of_image = image_loss(outputs.mil_scores, tags)
        of_branches = [
            weight * branch.mean()
            for weight, branch in zip(
                branch_weights(recipe),
                branch_losses(outputs, boxes, tags, recipe),
                strict=True,
            )
        ]
        refinement = torch.stack(of_branches).sum()
        ((of_image + refinement) / len(chosen)).backward()
        scalars["image"] += of_image.item() / len(chosen)
        scalars["refinement"] += refinement.item() / len(chosen)
    process.add_gradients_(head.parameters())
    nn.utils.clip_grad_norm_(head.parameters(), 5.0)
    optimizer.step()
    return process.total(scalars)


def branch_losses(
    outputs: WsodOutputs, boxes: Float[Tensor, "n 4"], tags: Float[Tensor, " c"], recipe: WsodRecipe
) -> list[BranchLosses]:
    """Losses of every RoI in every branch by the recipe's method; ``boxes`` in any frame."""
    select: SelectSeeds = partial(oicr.select_seeds, config=recipe.oicr)
    foreground_thresh = recipe.oicr.foreground_thresh
    if recipe.method == "mist":
        select = partial(mist.select_seeds, config=recipe.mist)
        foreground_thresh = recipe.mist.foreground_thresh
    return refine(
        outputs.mil_scores,
        outputs.branches(),
        boxes,
        tags,
        select_seeds=select,
        foreground_thresh=foreground_thresh,
    )


def branch_weights(recipe: WsodRecipe) -> list[float]:
    """Weight of each branch's loss."""
    first = recipe.mist.first_branch_weight if recipe.method == "mist" else 1.0
    return [first] + [1.0] * (recipe.model.num_refinements - 1)


def detect(head: WsodHead, sample: WsodSample, recipe: WsodRecipe) -> Detections:
    """Detections of one image: scores and boxes averaged over all views, suppressed by class.

    Boxes can be averaged because every view has the same proposals.
    """
    device = next(head.parameters()).device
    with torch.inference_mode():
        outputs = [head(view.descriptions.to(device)) for view in sample.views]
        scores = torch.stack([of_view.scores() for of_view in outputs]).mean(dim=0).cpu()
        moved = [
            moved_boxes(sample.boxes, offsets.cpu(), is_mirrored=view.is_mirrored)
            for view, of_view in zip(sample.views, outputs, strict=True)
            if (offsets := of_view.offsets()) is not None
        ]
    num_classes = scores.shape[1]
    if moved:
        mean = torch.stack(moved).mean(dim=0).flatten(0, 1).numpy()
        boxes = clip_boxes(mean.astype(np.float32), sample.record.image_size)
    else:
        boxes = np.repeat(sample.boxes, num_classes, axis=0)
    labels = np.tile(np.arange(num_classes), len(sample.boxes))
    flat = scores.flatten().numpy().astype(np.float32)
    visible = np.flatnonzero(box_area(boxes) > 0)  # a moved box may have left the image
    boxes, labels, flat = boxes[visible], labels[visible], flat[visible]
    keep = batched_nms(boxes, flat, labels, recipe.nms_thresh)[: recipe.max_detections]
    return Detections(
        boxes=boxes[keep],
        scores=flat[keep],
        labels=labels[keep].astype(np.int64),
        image_size=sample.record.image_size,
    )


def moved_boxes(
    boxes: NDArray[np.float32], offsets: Float[Tensor, "n c 4"], *, is_mirrored: bool
) -> Float[Tensor, "n c 4"]:
    """Boxes of the image moved by offsets that were predicted in a view of it.

    Args:
        boxes: [n, 4], XYXY, pixels.
        offsets: Relative to the sizes of the boxes, so that the view's scale does not matter.
        is_mirrored: Left and right are exchanged in the view.
    """
    if is_mirrored:
        offsets = offsets * offsets.new_tensor([-1.0, 1.0, 1.0, 1.0])
    return decode_boxes(torch.from_numpy(boxes)[:, None], offsets, BOX_WEIGHTS)


def _detect(
    stage: Stage,
    head: WsodHead,
    folder: CocoFolder,
    samples: Sequence[WsodSample],
    recipe: WsodRecipe,
    *,
    name: str = DETECTIONS_NAME,
) -> dict[str, float | None]:
    found = {record.image_id: Detections.empty(record.image_size) for record in folder.records}
    for sample in track(samples, description="detect", transient=True):
        found[sample.record.image_id] = detect(head, sample, recipe)
    write_detections(stage.directory / name, found, folder=folder)
    report = summary(write_report(stage.directory / name.removesuffix(".json"), folder, found))
    _LOGGER.info("%s: %s", name, report)
    return report


def _describe(
    record: ImageRecord,
    boxes: NDArray[np.float32],
    rows: Tensor,
    describer: RoiDescriber,
    recipe: WsodRecipe,
) -> None:
    """Fill the rows of one image, view by view."""
    labels = np.zeros(len(boxes), np.int64)
    image, device = record.image(), describer.pixel_mean.device
    own = iter(rows.split(len(boxes)))
    for size in (recipe.model.image_size, *recipe.extra_image_sizes):
        framed = frame_image(image, boxes, labels, frame_side=size)
        for view in (framed, mirror(framed)):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                found = describer(_pixels(view).to(device), torch.from_numpy(view.boxes).to(device))
            write_descriptions(next(own), found)


def _sample(
    record: ImageRecord,
    boxes: NDArray[np.float32],
    rows: Tensor,
    map_channels: Sequence[int],
    recipe: WsodRecipe,
    num_classes: int,
) -> WsodSample:
    """One image with its rows of the file, in the order that ``_describe`` writes."""
    views = []
    own = iter(rows.split(len(boxes)))
    for size in (recipe.model.image_size, *recipe.extra_image_sizes):
        frame = longest_side_frame(record.image_size, size)
        in_frame = frame.to_model(boxes)
        for is_mirrored in (False, True):
            seen = mirrored_boxes(in_frame, frame.valid_size[1]) if is_mirrored else in_frame
            views.append(
                WsodView(
                    boxes=torch.from_numpy(seen),
                    descriptions=as_descriptions(next(own), map_channels),
                    is_mirrored=is_mirrored,
                )
            )
    tags = torch.zeros(num_classes)
    tags[list(record.tags)] = 1.0
    return WsodSample(record=record, boxes=boxes, views=tuple(views), tags=tags)


def mirror(framed: FramedImage) -> FramedImage:
    """The image mirrored left to right inside its valid part, which stays top-left aligned."""
    height, width = framed.valid_size
    pixels = framed.pixels.copy()
    pixels[:height, :width] = framed.pixels[:height, :width][:, ::-1]
    boxes = mirrored_boxes(framed.boxes, width)
    return FramedImage(
        pixels=pixels, valid_size=framed.valid_size, boxes=boxes, labels=framed.labels
    )


def mirrored_boxes(boxes: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Boxes [n, 4] where the part of the frame that is ``width`` wide is mirrored."""
    mirrored = boxes.copy()
    mirrored[:, [0, 2]] = width - boxes[:, [2, 0]]
    return mirrored


def _pixels(framed: FramedImage) -> Tensor:
    image = torch.from_numpy(framed.pixels)[None].permute(0, 3, 1, 2).float()
    return image.contiguous(memory_format=torch.channels_last)


def _is_usable(boxes: NDArray[np.float32], min_side_px: float) -> NDArray[np.bool_]:
    """Large enough and no exact copy of an earlier one."""
    first = np.zeros(len(boxes), dtype=bool)
    first[np.unique(boxes, axis=0, return_index=True)[1]] = True
    return first & ((boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf) >= min_side_px)


def _samples_of_step(
    samples: Sequence[WsodSample], recipe: WsodRecipe, step: int
) -> list[tuple[WsodSample, WsodView]]:
    """Samples and views of one step; they depend on the seed and the step only."""
    steps_per_epoch = -(-len(samples) // recipe.images_per_step)
    epoch, position = divmod(step, steps_per_epoch)
    generator = np.random.default_rng((recipe.seed, epoch))
    order = generator.permutation(len(samples))
    draws = generator.random(len(samples))
    chosen = order[position * recipe.images_per_step : (position + 1) * recipe.images_per_step]
    return [
        (samples[index], samples[index].views[-1 - int(draws[index] * len(samples[index].views))])
        for index in chosen
    ]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(tyro.cli(TrainWsodConfig, description=__doc__))
