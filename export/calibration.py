"""Q/DQ graphs calibrated on a folder's images."""

from dataclasses import dataclass

import onnx

from export.mixed_precision import KeepFp32
from export.quantization import QuantizedPrecision, quantized
from export.task_metrics import image_inputs, spread
from training.data.coco import CocoFolder
from weaksam_rt.artifacts import ModelArtifact
from weaksam_rt.contracts import SAM_MASK_DECODER

CALIBRATION_IMAGES = 64
"""Most of a folder's images that ranges are taken from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibratedGraph:
    """A Q/DQ graph, and what its ranges were taken from."""

    graph: onnx.ModelProto
    data: str
    """Name of the folder of images."""
    num_images: int


def calibrated(
    source: ModelArtifact,
    precision: QuantizedPrecision,
    keep: KeepFp32,
    folder: CocoFolder | None,
    *,
    max_images: int = CALIBRATION_IMAGES,
) -> CalibratedGraph:
    """The Q/DQ graph of an exported model that reads images.

    Args:
        source: In float32.
        precision: Of the pairs.
        keep: Layers that are not quantised.
        folder: Images like those it will see.
        max_images: Of them, spread evenly.

    Raises:
        ValueError: There are no images, or the model does not read any.
    """
    if folder is None or source.model == SAM_MASK_DECODER:
        raise ValueError(
            f"{source.model} in {precision} needs images to calibrate on (--calibration); leave "
            "models that do not read images out with --only"
        )
    records = spread(folder, max_images).records
    inputs = [image_inputs(source.model, source.parameters, record) for record in records]
    return CalibratedGraph(
        graph=quantized(onnx.load(source.path), inputs, precision, keep),
        data=folder.root.name,
        num_images=len(inputs),
    )
