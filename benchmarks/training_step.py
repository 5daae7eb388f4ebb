"""What a training step costs: RoI drop's share of it, and our Faster R-CNN beside torchvision's.

``python -m benchmarks.training_step`` writes ``benchmarks/results/training_step.md`` and ``.json``.
All variants share trunk, pyramid, RPN head, anchors, image size and numbers of RoIs, learn from the
same random images and boxes, and take turns, so that a busy machine is busy for all of them.
"""

import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.progress import track
from torch import Tensor, nn
from torch.optim import AdamW
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from benchmarks.training import PyramidBackbone
from training.engine.stage import git_commit
from training.retrain_detector import total_loss
from training.retraining.faster_rcnn import FasterRcnn, FasterRcnnConfig, RpnHead
from training.retraining.mask_head import MASK_ROI_SIZE
from training.retraining.roi_drop import RoiDropConfig
from weaksam_rt.files import atomic_path, write_json

_LOGGER = logging.getLogger(__name__)
_NUM_MASK_CONVS = 2
_LEVELS = ("0", "1", "2")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStepConfig:
    """Sizes of the measurement."""

    model: FasterRcnnConfig = field(default_factory=FasterRcnnConfig)
    """Of all variants."""
    num_classes: int = 20
    batch_size: int = 8
    """Images in a step."""
    boxes_per_image: int = 4
    """Random objects to learn."""
    mask_channels: int = 64
    """Width of the mask heads."""
    rounds: int = 15
    """Steps of each variant, taking turns."""
    warmup: int = 2
    """Steps of each before that."""
    device: str = "cpu"
    """A torch device; on a GPU wall time with synchronisation is measured, else the time that the
    process had a CPU, which other processes do not lengthen."""
    num_threads: int = 1
    """CPU threads of torch."""
    output: Path = Path("benchmarks/results/training_step")
    """Report without its endings."""


@dataclass(frozen=True, kw_only=True)
class _Batch:
    images: Tensor
    """[b, 3, s, s], RGB in [0, 255]."""
    boxes: list[Tensor]
    labels: list[Tensor]
    """0-based."""
    masks: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class _Variant:
    module: nn.Module
    loss: Callable[[_Batch], Tensor]
    optimizer: AdamW


def main(config: TrainingStepConfig) -> None:
    """Measure and write the report."""
    torch.set_num_threads(config.num_threads)
    variants = _variants(config)
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    batch = _random_batch(config)
    for turn in track(range(config.warmup + config.rounds), description="rounds"):
        for name in names if turn % 2 == 0 else reversed(names):
            spent = _timed(partial(_step, variants[name], batch, config), config)
            if turn >= config.warmup:
                seconds[name].append(spent)
    drop = [_timed_drop(variants["ours, RoI drop"], batch, config) for _ in range(config.rounds)]
    _write(config, seconds, drop)


def _variants(config: TrainingStepConfig) -> dict[str, _Variant]:
    with_masks = replace(config.model, mask_channels=config.mask_channels)
    return {
        "ours, no drop": _ours(config, config.model, RoiDropConfig(enabled=False)),
        "ours, RoI drop": _ours(config, config.model, RoiDropConfig(start_fraction=0.0)),
        "torchvision": _torchvision(config, with_masks=False),
        "ours with masks, RoI drop": _ours(config, with_masks, RoiDropConfig(start_fraction=0.0)),
        "torchvision with masks": _torchvision(config, with_masks=True),
    }


def _ours(config: TrainingStepConfig, sizes: FasterRcnnConfig, drop: RoiDropConfig) -> _Variant:
    torch.manual_seed(0)
    model = FasterRcnn(sizes, config.num_classes).to(config.device)

    def _loss(batch: _Batch) -> Tensor:
        losses = model.training_losses(batch.images, batch.boxes, batch.labels, batch.masks)
        return total_loss(losses, drop, 0, 1)[0]

    return _variant(model, _loss)


def _torchvision(config: TrainingStepConfig, *, with_masks: bool) -> _Variant:
    """The detector of torchvision: the same parts below, its own RoIAlign, heads and losses."""
    torch.manual_seed(0)
    sizes = config.model
    ours = FasterRcnn(sizes, config.num_classes)
    settings: dict[str, Any] = {
        "min_size": sizes.image_size, "max_size": sizes.image_size,
        "rpn_anchor_generator": ours.anchor_generator, "rpn_head": RpnHead(sizes),
        "rpn_batch_size_per_image": 128,
        "rpn_pre_nms_top_n_train": 600, "rpn_post_nms_top_n_train": sizes.proposals_per_image,
        "box_roi_pool": MultiScaleRoIAlign(_LEVELS, output_size=7, sampling_ratio=2),
        "box_head": TwoMLPHead(sizes.neck_channels * 49, sizes.head_width),
        "box_predictor": FastRCNNPredictor(sizes.head_width, config.num_classes + 1),
        "box_batch_size_per_image": sizes.rois_per_image,
        "box_positive_fraction": sizes.foreground_share,
    }  # fmt: skip
    kind = FasterRCNN
    if with_masks:
        width, num_classes = config.mask_channels, config.num_classes + 1
        settings |= {
            "mask_roi_pool": MultiScaleRoIAlign(_LEVELS, MASK_ROI_SIZE, sampling_ratio=2),
            "mask_head": MaskRCNNHeads(sizes.neck_channels, [width] * _NUM_MASK_CONVS, 1),
            "mask_predictor": MaskRCNNPredictor(width, width, num_classes),
        }
        kind = MaskRCNN
    model = kind(PyramidBackbone(ours), **settings).to(config.device).train()

    def _loss(batch: _Batch) -> Tensor:
        targets = [
            {"boxes": boxes, "labels": labels + 1, "masks": masks.to(torch.uint8)}
            for boxes, labels, masks in zip(batch.boxes, batch.labels, batch.masks, strict=True)
        ]
        losses: Mapping[str, Tensor] = model(list(batch.images / 255), targets)
        return torch.stack(list(losses.values())).sum()

    return _variant(model, _loss)


def _variant(model: nn.Module, loss: Callable[[_Batch], Tensor]) -> _Variant:
    model.to(memory_format=torch.channels_last)
    # A rate of 0 keeps the weights, and so the numbers of RoIs, as they are.
    return _Variant(module=model, loss=loss, optimizer=AdamW(model.parameters(), lr=0.0))


def _step(variant: _Variant, batch: _Batch, config: TrainingStepConfig) -> None:
    torch.manual_seed(1)
    with torch.autocast(torch.device(config.device).type, dtype=torch.bfloat16):
        loss = variant.loss(batch)
    variant.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(variant.module.parameters(), 5.0)
    variant.optimizer.step()


def _timed_drop(variant: _Variant, batch: _Batch, config: TrainingStepConfig) -> float:
    """Seconds that the loss of one step takes more with RoI drop than without, alone."""
    assert isinstance(variant.module, FasterRcnn)
    with torch.no_grad(), torch.autocast(torch.device(config.device).type, dtype=torch.bfloat16):
        losses = variant.module.training_losses(batch.images, batch.boxes, batch.labels)
    on, off = RoiDropConfig(start_fraction=0.0), RoiDropConfig(enabled=False)
    repeats = 20

    def _all(drop: RoiDropConfig) -> None:
        for _ in range(repeats):
            total_loss(losses, drop, 0, 1)

    return (_timed(partial(_all, on), config) - _timed(partial(_all, off), config)) / repeats


def _timed(work: Callable[[], None], config: TrainingStepConfig) -> float:
    on_gpu = torch.device(config.device).type != "cpu"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def _random_batch(config: TrainingStepConfig) -> _Batch:
    rng = np.random.default_rng(0)
    side, num = config.model.image_size, config.boxes_per_image
    boxes, labels, masks = [], [], []
    for _ in range(config.batch_size):
        low = rng.uniform(0, 0.6 * side, (num, 2))
        corners = np.concatenate([low, low + rng.uniform(0.15, 0.4, (num, 2)) * side], axis=1)
        boxes.append(torch.from_numpy(corners.astype(np.float32)).to(config.device))
        labels.append(torch.from_numpy(rng.integers(0, config.num_classes, num)).to(config.device))
        inside = np.zeros((num, side, side), bool)
        for mask, (x1, y1, x2, y2) in zip(inside, corners.astype(int), strict=True):
            mask[y1:y2, x1:x2] = True
        masks.append(torch.from_numpy(inside).to(config.device))
    images = torch.from_numpy(
        rng.uniform(0, 255, (config.batch_size, 3, side, side)).astype(np.float32)
    )
    return _Batch(images=images.to(config.device), boxes=boxes, labels=labels, masks=masks)


def _write(
    config: TrainingStepConfig, seconds: Mapping[str, Sequence[float]], drop: Sequence[float]
) -> None:
    command = shlex.join(["python", "-m", "benchmarks.training_step", *sys.argv[1:]])
    best = {name: min(values) for name, values in seconds.items()}
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    share = float(np.median(drop)) / median["ours, RoI drop"]
    is_gpu = config.device != "cpu"
    facts = {
        "command": command,
        "commit": git_commit(),
        "machine": torch.cuda.get_device_name() if is_gpu else platform.machine(),
        "threads": config.num_threads,
        "load": "-" if is_gpu else f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        "clock": "wall" if is_gpu else "CPU time of the process",
        "torch": torch.__version__,
    }
    pairs = (
        ("ours, RoI drop", "ours, no drop"),
        ("ours, RoI drop", "torchvision"),
        ("ours with masks, RoI drop", "torchvision with masks"),
    )
    lines = [
        "# What a training step costs", "", f"`{command}`", "",
        *(f"- {name}: {value}" for name, value in facts.items() if name != "command"), "",
        f"{config.batch_size} images of {config.model.image_size} px, "
        f"{config.model.rois_per_image} RoIs each, bfloat16 autocast, {config.rounds} steps of "
        "each variant taking turns.", "",
        "| variant | least, ms | median, ms |", "| --- | --: | --: |",
        *(f"| {n} | {1e3 * best[n]:.0f} | {1e3 * median[n]:.0f} |" for n in seconds), "",
        "| ratio | of least | of medians |", "| --- | --: | --: |",
        *(
            f"| {a} / {b} | {best[a] / best[b]:.3f} | {median[a] / median[b]:.3f} |"
            for a, b in pairs
        ), "",
        f"RoI drop alone (choice, sums and counts; median of {len(drop)}): "
        f"{1e3 * float(np.median(drop)):.2f} ms, {100 * share:.2f} % of the step.", "",
    ]  # fmt: skip
    with atomic_path(config.output.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(lines))
    content = {**facts, "seconds": dict(seconds), "drop_seconds": list(drop), "drop_share": share}
    write_json(config.output.with_suffix(".json"), content)
    _LOGGER.info("%s", "\n".join(lines))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(tyro.cli(TrainingStepConfig, description=__doc__))
