"""Our Faster R-CNN beside torchvision's: inference and a training step, same images, in turns.

``python -m benchmarks training`` compares three networks at one size of input: ours; torchvision's
``FasterRCNN`` on our trunk and pyramid (its own heads, RoIAlign and suppression), so that only what
is different differs; and ``fasterrcnn_mobilenet_v3_large_320_fpn``, its smallest as it comes. With
``--models``, ours also as the exported engine. Weights are random: no step's time depends on them
except that of suppression, which is bounded by the same number of boxes.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.ops import MultiScaleRoIAlign

from benchmarks.reporting import report
from benchmarks.results import (
    ArtifactRecord,
    BenchmarkResult,
    Metric,
    Recorder,
    artifact_record,
)
from training.models.detector_adapter import DetectorAdapter
from training.retrain_detector import DetectorRecipe, total_loss
from training.retraining.faster_rcnn import FasterRcnn, FasterRcnnConfig
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
_NUM_CLASSES = 10
_BOXES_PER_IMAGE = 3

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How much is measured."""

    repeats: int = 5
    """Blocks of each network; they take turns."""
    inferences: int = 10
    """Images of one block of inference, one at a time."""
    steps: int = 3
    """Training steps of one block."""
    batch_size: int = 4
    """Images of a training step."""
    seed: int = 0
    """Of weights, images and boxes."""


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
    """Inference, then training steps; all networks in turns."""
    artifacts: tuple[ArtifactRecord, ...] = ()
    if models is not None:
        artifacts = (artifact_record(load_artifact(models / DETECTOR)),)
    recorder = Recorder(
        what="training",
        title="Faster R-CNN: ours beside torchvision's",
        config=asdict(config),
        artifacts=artifacts,
    )
    torch.manual_seed(config.seed)
    ours = FasterRcnn(FasterRcnnConfig(), _NUM_CLASSES)
    peers = {SAME_TRUNK: torchvision_on_our_trunk(ours), MOBILENET: _mobilenet()}
    inference = _inference_ways(ours, peers, models, config)
    training = _training_ways(ours, peers, config)
    metrics = [
        *_measured("inference", inference, config.inferences, config),
        *_measured(f"training step of {config.batch_size}", training, config.steps, config),
    ]
    return recorder.result(metrics, notes=_notes(metrics))


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
        return OrderedDict((str(i), level) for i, level in enumerate(levels))


def torchvision_on_our_trunk(model: FasterRcnn) -> FasterRCNN:
    """Torchvision's detector that shares trunk, pyramid and anchors with ``model``."""
    side = model.config.image_size
    return FasterRCNN(
        PyramidBackbone(model),
        num_classes=model.num_classes + 1,
        min_size=side,
        max_size=side,
        image_mean=[0.0, 0.0, 0.0],
        image_std=[1.0, 1.0, 1.0],
        rpn_anchor_generator=model.anchor_generator,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], output_size=7, sampling_ratio=2),
        box_batch_size_per_image=model.config.rois_per_image,
        rpn_batch_size_per_image=128,
        rpn_post_nms_top_n_train=model.config.proposals_per_image,
        rpn_post_nms_top_n_test=150,
    )


def _mobilenet() -> nn.Module:
    network: nn.Module = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=_NUM_CLASSES + 1
    )
    return network


def _inference_ways(
    ours: FasterRcnn, peers: dict[str, nn.Module], models: Path | None, config: TrainingConfig
) -> dict[str, Step]:
    """One image to detections, by network; suppression included."""
    side = ours.config.image_size
    pixels = np.random.default_rng(config.seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    batch = torch.from_numpy(pixels)[None]
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    adapter = DetectorAdapter(ours).eval()

    def eager() -> object:
        with torch.inference_mode():
            return _suppressed([t[0].numpy() for t in adapter.eval()(batch)], side)

    def peer(network: nn.Module) -> Step:
        def step() -> object:
            with torch.inference_mode():
                return network.eval()([image])

        return step

    ways: dict[str, Step] = {OURS: eager}
    ways |= {name: peer(network) for name, network in peers.items()}
    if models is not None:
        session = OnnxRuntimeModel(load_artifact(models / DETECTOR))

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


def _training_ways(
    ours: FasterRcnn, peers: dict[str, nn.Module], config: TrainingConfig
) -> dict[str, Step]:
    """Losses, backward and an AdamW step in float32, by network."""
    rng = np.random.default_rng(config.seed)
    side, size = ours.config.image_size, config.batch_size
    images = torch.from_numpy(rng.random((size, 3, side, side), dtype=np.float32))
    corners = rng.uniform(0, side / 2, (size, _BOXES_PER_IMAGE, 2))
    spans = rng.uniform(40, side / 2, (size, _BOXES_PER_IMAGE, 2))
    boxes = torch.from_numpy(np.concatenate([corners, corners + spans], axis=2)).float()
    labels = torch.from_numpy(rng.integers(0, _NUM_CLASSES, (size, _BOXES_PER_IMAGE)))
    drop = DetectorRecipe().roi_drop

    def our_loss() -> Tensor:
        losses = ours.training_losses(255 * images, list(boxes), list(labels))
        return total_loss(losses, drop, 0, 100)[0]

    def peer_loss(network: nn.Module) -> Callable[[], Tensor]:
        targets = [{"boxes": b, "labels": n + 1} for b, n in zip(boxes, labels, strict=True)]
        return lambda: sum(network(list(images), targets).values(), torch.zeros(()))

    ways = {OURS: _optimised(ours, our_loss)}
    return ways | {n: _optimised(network, peer_loss(network)) for n, network in peers.items()}


def _optimised(network: nn.Module, loss: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6)

    def step() -> object:
        network.train()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        return None

    return step


def _measured(
    name: str, ways: dict[str, Step], number: int, config: TrainingConfig
) -> list[Metric]:
    for step in ways.values():  # the first call of each prepares what the others reuse
        step()
    repeats: dict[str, list[tuple[float, ...]]] = {way: [] for way in ways}
    for _ in track(range(config.repeats), name, transient=True):
        for way, step in ways.items():
            repeats[way].append(tuple(_milliseconds(step) for _ in range(number)))
    return [
        Metric(name=f"{name}: {way}", unit="ms", repeats=tuple(times))
        for way, times in repeats.items()
    ]


def _milliseconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def _notes(metrics: Sequence[Metric]) -> list[str]:
    """Ratios of the medians within one kind of work."""
    medians = {m.name: float(np.median(m.samples)) for m in metrics}
    notes = []
    for name, value in medians.items():
        kind, way = name.split(": ", 1)
        if way in (SAME_TRUNK, MOBILENET):
            ratio = value / medians[f"{kind}: {OURS}"]
            notes.append(f"{kind}: {way} takes {ratio:.2f} times as long as ours.")
    return notes
