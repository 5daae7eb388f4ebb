"""Run a trained detector over a data set, through the same graph and suppression as serving."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from training.data.coco import CocoFolder
from weaksam_rt.config import DetectionConfig
from weaksam_rt.pipeline import select_detections
from weaksam_rt.preprocessing import resize_for_detector
from weaksam_rt.types import Detections


@runtime_checkable
class CandidateModel(Protocol):
    """A ``DetectorAdapter``, or anything of its signature."""

    def __call__(self, image: Tensor) -> tuple[Tensor, ...]:
        """Boxes [b, d, 4], scores [b, d] and labels [b, d] of uint8 RGB [b, s, s, 3], and mask
        logits [b, d, m, m] where it has a mask head.
        """
        ...


def detect_folder(
    model: CandidateModel,
    folder: CocoFolder,
    *,
    image_size: int,
    config: DetectionConfig,
    batch_size: int = 4,
    device: torch.device | None = None,
) -> Mapping[int, Detections]:
    """Detections of every image by image id, in the frame of the image, with masks where the model
    gives some.

    Args:
        model: In evaluation mode.
        folder: Only its images are read.
        image_size: Side of the model's input in pixels.
        config: Thresholds.
        batch_size: Images per call.
        device: Of the model; None: the CPU.
    """
    found = {}
    starts = range(0, len(folder.records), batch_size)
    for start in track(starts, description="detect", transient=True):
        records = folder.records[start : start + batch_size]
        framed = [resize_for_detector(record.image(), image_size) for record in records]
        with torch.inference_mode():
            batch = torch.from_numpy(np.stack([pixels for pixels, _ in framed]))
            outputs = model(batch.to(device))
        boxes, scores, labels, *masks = (output.cpu().numpy() for output in outputs)
        for index, (record, (_, frame)) in enumerate(zip(records, framed, strict=True)):
            found[record.image_id] = select_detections(
                boxes[index], scores[index], labels[index], frame,
                mask_logits=masks[0][index] if masks else None,
                score_thresh=config.score_thresh, nms_thresh=config.nms_thresh,
                max_detections=config.max_detections,
            )  # fmt: skip
    return found
