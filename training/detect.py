"""Run a trained detector over a data set, through the same graph and suppression as serving."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import nn

from training.data.coco import CocoFolder, ImageRecord
from training.data.views import frame_image
from weaksam_rt.boxes import batched_nms, clip_boxes
from weaksam_rt.types import Detections, ImageSize


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectConfig:
    """How candidates become detections."""

    nms_thresh: float = 0.5
    """IoU in [0, 1] above which the lesser of two boxes of a class is dropped."""
    score_thresh: float = 0.01
    """Least score, in [0, 1]."""
    max_detections: int = 100
    """Per image."""


def detect_folder(
    adapter: nn.Module,
    folder: CocoFolder,
    *,
    image_size: int,
    config: DetectConfig,
    batch_size: int = 4,
) -> dict[int, Detections]:
    """Detections of every image by image id, in the frame of the image.

    Args:
        adapter: A ``DetectorAdapter`` (or anything of its signature) in evaluation mode.
        folder: Only its images are read.
        image_size: Side of the adapter's input in pixels.
        config: Thresholds.
        batch_size: Images per call.
    """
    found = {}
    batches = list(_batches(folder.records, batch_size))
    for records in track(batches, description="detect", transient=True):
        framed = [_framed(record, image_size) for record in records]
        with torch.inference_mode():
            outputs = adapter(torch.from_numpy(np.stack(framed)))
        boxes, scores, labels = (output.numpy() for output in outputs)
        for index, record in enumerate(records):
            found[record.image_id] = detections_from_candidates(
                boxes[index],
                scores[index],
                labels[index],
                image_size=record.image_size,
                frame_side=image_size,
                config=config,
            )
    return found


def detections_from_candidates(
    boxes_model_frame: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[np.int32],
    *,
    image_size: ImageSize,
    frame_side: int,
    config: DetectConfig,
) -> Detections:
    """Map one image's candidates back to its pixels, drop weak and overlapping ones."""
    height, width = image_size
    scale = frame_side / max(height, width)
    framed_width, framed_height = max(1, round(width * scale)), max(1, round(height * scale))
    factors = np.array([width / framed_width, height / framed_height] * 2, np.float32)
    boxes = clip_boxes(boxes_model_frame * factors, image_size)
    usable = (scores >= config.score_thresh) & ((boxes[:, 2:] - boxes[:, :2]).min(axis=1) >= 1)
    boxes, scores, labels = boxes[usable], scores[usable], labels[usable]
    keep = batched_nms(boxes, scores, labels, config.nms_thresh)[: config.max_detections]
    return Detections(
        boxes=boxes[keep],
        scores=scores[keep],
        labels=labels[keep].astype(np.int64),
        image_size=image_size,
    )


def _framed(record: ImageRecord, image_size: int) -> NDArray[np.uint8]:
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    return frame_image(record.image(), *nothing, frame_side=image_size).pixels


def _batches(records: Sequence[ImageRecord], batch_size: int) -> Iterator[Sequence[ImageRecord]]:
    for start in range(0, len(records), batch_size):
        yield records[start : start + batch_size]
