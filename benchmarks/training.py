"""Our Faster R-CNN beside torchvision's: inference, a training step, and RoI drop's share of it.

``python -m benchmarks training`` compares, on the same random images and boxes in turns: ours;
torchvision's ``FasterRCNN`` and ``MaskRCNN`` on our trunk, pyramid, RPN head and anchors with as
many RoIs (its own RoIAlign, heads, losses and suppression), so that only what is different differs;
and ``fasterrcnn_mobilenet_v3_large_320_fpn``, its smallest as it comes, which learns from 512 RoIs
of an image where the others have 64. With ``--models``, ours also as the exported engine. Weights
are random: no time depends on them except that of suppression, which is bounded by the same number
of boxes.

On a CPU the time that the process had it is measured, with one thread by default: other processes
do not lengthen it. On a GPU it is wall time, synchronised.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import (
    FasterRCNN,
    MaskRCNN,
    fasterrcnn_mobilenet_v3_large_320_fpn,
)
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from benchmarks.entry import enter
from benchmarks.graph_cost import cost_of_model, load_graph
from benchmarks.machine import measure_peaks
from benchmarks.reporting import report
from benchmarks.results import (
    ArtifactRecord,
    BenchmarkResult,
    Metric,
    Recorder,
    artifact_record,
)
from benchmarks.turns import Work, in_turns
from training.models.detector_adapter import DetectorAdapter
from training.retrain_detector import total_loss
from training.retraining.faster_rcnn import FasterRcnn, FasterRcnnConfig, RpnHead
from training.retraining.mask_head import MASK_ROI_SIZE
from training.retraining.roi_drop import RoiDropConfig
from weaksam_rt.artifacts import load_artifact
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.contracts import DETECTOR
from weaksam_rt.pipeline import select_detections
from weaksam_rt.preprocessing import longest_side_frame

OURS, SAME_TRUNK, MOBILENET, ENGINE = (
    "ours, eager",
    "torchvision's FasterRCNN on our trunk",
    "torchvision's fasterrcnn_mobilenet_v3_large_320_fpn",
    "ours, ONNX Runtime engine",
)
WITH_DROP, WITHOUT_DROP = "ours, RoI drop", "ours, no drop"
MASKS, SAME_TRUNK_MASKS = "ours with masks, RoI drop", "torchvision's MaskRCNN on our trunk"
INFERENCE, STEP, LOSS = "inference", "training step", "sum of the losses"
_LEVELS = ("0", "1", "2")
_NUM_MASK_CONVS = 2
_DROP, _NO_DROP = RoiDropConfig(start_fraction=0.0), RoiDropConfig(enabled=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How much is measured, and of what size."""

    repeats: int = 5
    """Blocks of each network; they take turns."""
    inferences: int = 10
    """Images of one block of inference, one at a time."""
    steps: int = 3
    """Training steps of one block."""
    batch_size: int = 4
    """Images of a training step."""
    num_classes: int = 20
    boxes_per_image: int = 4
    """Random objects to learn."""
    mask_channels: int = 64
    """Width of the mask heads."""
    mixed_precision: bool = True
    """Training steps under autocast to bfloat16, as in training."""
    device: str = "cpu"
    """A torch device."""
    threads: int = 1
    """CPU threads of torch and of the engine."""
    seed: int = 0
    """Of weights, images and boxes."""


@dataclass(frozen=True, kw_only=True)
class _Batch:
    images: Tensor
    """[b, 3, s, s], RGB in [0, 255]."""
    boxes: list[Tensor]
    labels: list[Tensor]
    """0-based."""
    masks: list[Tensor]


Loss = Callable[[_Batch], Tensor]


def main(
    config: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TrainingConfig(),
    *,
    models: Path | None = None,
    output: Path | None = None,
) -> None:
    """Measure and report.

    Args:
        config: How much is measured.
        models: Folder of exported models; its detector is measured too. None: leave it out.
        output: Path without suffix; result.json, .md and .html are written there.
    """
    report(measure(config, models), output)


def measure(config: TrainingConfig, models: Path | None) -> BenchmarkResult:
    """Inference, then training steps, then the losses alone; all ways in turns."""
    artifacts: tuple[ArtifactRecord, ...] = ()
    if models is not None:
        artifacts = (artifact_record(load_artifact(models / DETECTOR)),)
    recorder = Recorder(
        what="training",
        title="Faster R-CNN: ours beside torchvision's",
        config=asdict(config),
        artifacts=artifacts,
    )
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    ours, with_masks = (
        FasterRcnn(FasterRcnnConfig(mask_channels=width), config.num_classes).to(config.device)
        for width in (None, config.mask_channels)
    )
    peers = {
        SAME_TRUNK: torchvision_on_our_trunk(ours).to(config.device),
        MOBILENET: _mobilenet(config),
    }
    batch = _random_batch(config, ours.config.image_size)
    inference = _inference_ways(ours, peers, models, config)
    losses: dict[str, tuple[nn.Module, Loss]] = {
        WITH_DROP: (ours, _our_loss(ours, _DROP)),
        WITHOUT_DROP: (ours, _our_loss(ours, _NO_DROP)),
        **{name: (network, _peer_loss(network)) for name, network in peers.items()},
        MASKS: (with_masks, _our_loss(with_masks, _DROP)),
    }
    mask_peer = torchvision_on_our_trunk(with_masks).to(config.device)
    losses[SAME_TRUNK_MASKS] = mask_peer, _peer_loss(mask_peer)
    steps = {n: _optimised(network, loss, batch, config) for n, (network, loss) in losses.items()}
    flops = {name: count_flops(work) for name, work in inference.items()}
    if models is not None:
        flops[ENGINE] = _engine_flops(models, ours.config.image_size)
    step_flops = {name: count_flops(work) for name, work in steps.items()}
    step_kind = f"{STEP} of {config.batch_size}"
    peak = _peak(config)
    metrics = [
        *_with_floors(_measured(INFERENCE, inference, config.inferences, config), flops, peak),
        *_with_floors(_measured(step_kind, steps, config.steps, config), step_flops, peak),
        *_measured(LOSS, _loss_ways(ours, batch, config), config.steps, config, calls=20),
    ]
    return recorder.result(metrics, notes=_notes(metrics, config))


class PyramidBackbone(nn.Module):
    """Our trunk and pyramid in the form that torchvision's detectors expect."""

    def __init__(self, model: FasterRcnn) -> None:
        super().__init__()
        self.trunk, self.neck = model.trunk, model.neck
        self.out_channels = model.config.neck_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Levels by name, finest first; images are normalised already."""
        pyramid = self.trunk(images)
        levels = self.neck(pyramid.stride8, pyramid.stride16).levels
        return OrderedDict(zip(_LEVELS, levels, strict=True))


def torchvision_on_our_trunk(model: FasterRcnn) -> FasterRCNN:
    """Torchvision's detector that shares trunk, pyramid and anchors with ``model``, and its sizes;
    with a mask head where ``model`` has one.
    """
    sizes, num_classes = model.config, model.num_classes + 1
    settings: dict[str, Any] = {
        "min_size": sizes.image_size, "max_size": sizes.image_size,
        "image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0],
        "rpn_anchor_generator": model.anchor_generator, "rpn_head": RpnHead(sizes),
        "rpn_batch_size_per_image": 128,
        "rpn_pre_nms_top_n_train": 600, "rpn_post_nms_top_n_train": sizes.proposals_per_image,
        "rpn_post_nms_top_n_test": 150,
        "box_roi_pool": MultiScaleRoIAlign(_LEVELS, output_size=7, sampling_ratio=2),
        "box_head": TwoMLPHead(sizes.neck_channels * 49, sizes.head_width),
        "box_predictor": FastRCNNPredictor(sizes.head_width, num_classes),
        "box_batch_size_per_image": sizes.rois_per_image,
        "box_positive_fraction": sizes.foreground_share,
    }  # fmt: skip
    width = sizes.mask_channels
    if width is None:
        return FasterRCNN(PyramidBackbone(model), **settings)
    return MaskRCNN(
        PyramidBackbone(model),
        **settings,
        mask_roi_pool=MultiScaleRoIAlign(_LEVELS, MASK_ROI_SIZE, sampling_ratio=2),
        mask_head=MaskRCNNHeads(sizes.neck_channels, [width] * _NUM_MASK_CONVS, 1),
        mask_predictor=MaskRCNNPredictor(width, width, num_classes),
    )


def _mobilenet(config: TrainingConfig) -> nn.Module:
    network: nn.Module = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=config.num_classes + 1
    )
    return network.to(config.device)


def _inference_ways(
    ours: FasterRcnn,
    peers: Mapping[str, nn.Module],
    models: Path | None,
    config: TrainingConfig,
) -> dict[str, Work]:
    """One image to detections, by network; suppression included."""
    side = ours.config.image_size
    pixels = np.random.default_rng(config.seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    batch = torch.from_numpy(pixels)[None].to(config.device)
    image = batch[0].permute(2, 0, 1).float() / 255
    adapter = DetectorAdapter(ours).eval()

    def eager() -> object:
        with torch.inference_mode():
            return _suppressed([t[0].cpu().numpy() for t in adapter.eval()(batch)], side)

    def peer(network: nn.Module) -> object:
        with torch.inference_mode():
            return network.eval()([image])

    ways: dict[str, Work] = {OURS: eager}
    ways |= {name: partial(peer, network) for name, network in peers.items()}
    if models is not None:
        session = OnnxRuntimeModel(load_artifact(models / DETECTOR), num_threads=config.threads)

        def engine() -> object:
            answer = session({"image": pixels[None]})
            return _suppressed([answer[n][0] for n in ("boxes", "scores", "labels")], side)

        ways[ENGINE] = engine
    return ways


def _suppressed(candidates: Sequence[NDArray[np.float32]], side: int) -> object:
    boxes, scores, labels = candidates
    return select_detections(
        boxes, scores, labels.astype(np.int32), longest_side_frame((side, side), side),
        score_thresh=0.05, nms_thresh=0.5, max_detections=100,
    )  # fmt: skip


def _our_loss(model: FasterRcnn, drop: RoiDropConfig) -> Loss:
    def loss(batch: _Batch) -> Tensor:
        losses = model.training_losses(batch.images, batch.boxes, batch.labels, batch.masks)
        return total_loss(losses, drop, 0, 1)[0]

    return loss


def _peer_loss(network: nn.Module) -> Loss:
    def loss(batch: _Batch) -> Tensor:
        targets = [
            {"boxes": boxes, "labels": labels + 1, "masks": masks.to(torch.uint8)}
            for boxes, labels, masks in zip(batch.boxes, batch.labels, batch.masks, strict=True)
        ]
        losses: Mapping[str, Tensor] = network(list(batch.images / 255), targets)
        return torch.stack(list(losses.values())).sum()

    return loss


def _optimised(network: nn.Module, loss: Loss, batch: _Batch, config: TrainingConfig) -> Work:
    """Losses, backward, clipping and an AdamW step."""
    network.to(memory_format=torch.channels_last)
    # A rate of 0 keeps the weights, and so the numbers of RoIs, as they are.
    optimizer = AdamW(network.parameters(), lr=0.0)

    def step() -> None:
        torch.manual_seed(config.seed)
        network.train()
        with _autocast(config):
            total = loss(batch)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()

    return step


def _loss_ways(model: FasterRcnn, batch: _Batch, config: TrainingConfig) -> dict[str, Work]:
    """From the losses of each RoI to the one that is minimised, alone."""
    with torch.no_grad(), _autocast(config):
        losses = model.train().training_losses(batch.images, batch.boxes, batch.labels)
    ways = {WITH_DROP: _DROP, WITHOUT_DROP: _NO_DROP}
    return {name: partial(total_loss, losses, drop, 0, 1) for name, drop in ways.items()}


def _autocast(config: TrainingConfig) -> torch.autocast:
    kind = torch.device(config.device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=config.mixed_precision)


def _measured(
    kind: str, ways: Mapping[str, Work], samples: int, config: TrainingConfig, *, calls: int = 1
) -> list[Metric]:
    if torch.device(config.device).type == "cpu":
        clock = time.process_time
    else:
        clock = time.perf_counter
        ways = {name: partial(_synchronised, work) for name, work in ways.items()}
    return in_turns(
        ways, repeats=config.repeats, samples=samples, kind=kind, calls=calls, clock=clock
    )


def count_flops(work: Work) -> float:
    """Floating-point operations of the products of one call, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def _engine_flops(models: Path, side: int) -> float:
    """PyTorch sees nothing of what an engine does."""
    graph = load_graph(load_artifact(models / DETECTOR).path)
    return cost_of_model(graph, {"image": (1, side, side, 3)}).flops


def _peak(config: TrainingConfig) -> float:
    """Operations a second of the clock that is read, in the best precision that takes part."""
    on_cpu = torch.device(config.device).type == "cpu"
    wall = max(
        measure_peaks(config.device, mixed_precision=mixed, threads=config.threads).flops
        for mixed in {False, config.mixed_precision}
    )
    # The process's time is the sum of its threads'.
    return wall / config.threads if on_cpu else wall


def _with_floors(
    metrics: Sequence[Metric], flops: Mapping[str, float], peak: float
) -> list[Metric]:
    """The metrics, whose names end with the ways', with the time of their products at the peak."""
    by_way = {metric.name.partition(": ")[2]: metric for metric in metrics}
    return [
        replace(
            metric,
            floor=1e3 * flops[way] / peak,
            floor_reason="operations of the products at the measured peak",
        )
        for way, metric in by_way.items()
    ]


def _synchronised(work: Work) -> None:
    work()
    torch.cuda.synchronize()


def _random_batch(config: TrainingConfig, side: int) -> _Batch:
    rng = np.random.default_rng(config.seed)
    num = config.boxes_per_image
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
    images = rng.uniform(0, 255, (config.batch_size, 3, side, side)).astype(np.float32)
    return _Batch(
        images=torch.from_numpy(images).to(config.device), boxes=boxes, labels=labels, masks=masks
    )


def _notes(metrics: Sequence[Metric], config: TrainingConfig) -> list[str]:
    """Ratios of the medians within one kind of work, and RoI drop's share of a step."""
    medians = {m.name: float(np.median(m.samples)) for m in metrics}
    step = f"{STEP} of {config.batch_size}"
    pairs = (
        (INFERENCE, OURS, (SAME_TRUNK, MOBILENET)),
        (step, WITH_DROP, (WITHOUT_DROP, SAME_TRUNK, MOBILENET)),
        (step, MASKS, (SAME_TRUNK_MASKS,)),
    )
    ratios = [
        f"{kind}: {other} takes {medians[f'{kind}: {other}'] / medians[f'{kind}: {base}']:.3f} "
        f"times as long as {base}."
        for kind, base, others in pairs
        for other in others
    ]
    extra = medians[f"{LOSS}: {WITH_DROP}"] - medians[f"{LOSS}: {WITHOUT_DROP}"]
    share = extra / medians[f"{step}: {WITH_DROP}"]
    return [
        *ratios,
        f"RoI drop alone (choice, sums, counts): {extra:.2g} ms, {100 * share:.2g} % of a step.",
    ]


if __name__ == "__main__":
    enter(main)
