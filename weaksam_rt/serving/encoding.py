"""Results of the pipeline as the arrays of the serving contracts, without batch axis."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.bytes_tensors import bytes_array
from weaksam_rt.pipeline import ProposalResult
from weaksam_rt.types import Detections, ImageSize, SegmentResult


def outputs_of_detections(
    detections: Detections, class_names: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Outputs of ``weaksam_detect``."""
    counts = detections.masks.rle_counts if detections.masks is not None else ()
    return {
        "boxes": detections.boxes,
        "scores": detections.scores,
        "labels": detections.labels.astype(np.int32),
        "label_names": bytes_array([class_names[i].encode() for i in detections.labels]),
        "mask_counts": bytes_array(counts),
        "image_size": _image_size(detections.image_size),
    }


def outputs_of_proposals(result: ProposalResult) -> dict[str, NDArray[Any]]:
    """Outputs of ``weaksam_propose``."""
    proposals = result.proposals
    return {
        "boxes": proposals.boxes,
        "scores": proposals.scores,
        "sources": proposals.sources,
        "used_tags": bytes_array([tag.encode() for tag in result.used_tags]),
        "image_size": _image_size(proposals.image_size),
    }


def outputs_of_segments(result: SegmentResult) -> dict[str, NDArray[Any]]:
    """Outputs of ``weaksam_segment``."""
    counts = bytes_array([count for row in result.mask_counts for count in row])
    return {
        "mask_counts": counts.reshape(result.scores.shape),
        "boxes": result.boxes,
        "scores": result.scores,
        "stability_scores": result.stability_scores,
        "image_size": _image_size(result.image_size),
    }


def _image_size(image_size: ImageSize) -> NDArray[np.int32]:
    return np.array(image_size, np.int32)
