"""SAM's logits to masks, boxes and run lengths: the pipeline's way beside those it replaced.

``python -m benchmarks mask_epilogue assets/demo_models`` prompts SAM with a grid on a photograph
and times what follows, in turns, on the same masks: at the image's resolution the definition,
matrix products with COCO's encoder, the pipeline's form on a part of the pixels, and where there is
a GPU the kernels; at SAM's resolution stability scores and boxes. The masks are also enlarged to
the 256x256 of an official SAM, on a frame of 1024. Ways that disagree stop the run.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from numpy.typing import NDArray

from benchmarks.entry import enter
from benchmarks.pictures import pictures
from benchmarks.reporting import Where, report
from benchmarks.results import BenchmarkResult, Metric, Recorder, artifact_record
from benchmarks.turns import in_turns, per_item
from weaksam_rt.artifacts import load_artifact
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.contracts import SAM_IMAGE_ENCODER, SAM_MASK_DECODER, SamParameters
from weaksam_rt.errors import BackendUnavailableError
from weaksam_rt.images import decode_image
from weaksam_rt.masks import (
    boxes_from_logits,
    decode_rle,
    encode_rle,
    full_resolution_boxes,
    image_logits,
    low_res_stability,
    rle_boxes,
)
from weaksam_rt.pipeline import masks_of_image
from weaksam_rt.preprocessing import (
    ModelFrame,
    longest_side_frame,
    resize_longest_side,
    resize_maps,
)
from weaksam_rt.prompt_clustering import prompt_backend, summarize_masks
from weaksam_rt.prompt_clustering._reference import inside_down_columns
from weaksam_rt.prompt_clustering.config import BackendName
from weaksam_rt.prompts import grid_prompts, pack_prompts, sam_prompts
from weaksam_rt.types import InstanceMasks

PIPELINE, MATRICES, DEFINITION, KERNELS = (
    "the pipeline's way",
    "matrix products and COCO's encoder",
    "the definition",
    "the CUDA kernels",
)
_ROUNDING = 1e-5
"""Of the largest logit: matrix products round in another order."""
_OFFICIAL_SIDE, _OFFICIAL_FRAME = 256, 1024
Logits = NDArray[np.float32]
Way = Callable[[Logits, ModelFrame], InstanceMasks]


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskEpilogueConfig:
    """Which masks, and how often."""

    points_per_side: int = 4
    """Grid points along each side; three masks each."""
    image_height: int = 480
    image_width: int = 640
    """Of the masks at image resolution, in pixels."""
    repeats: int = 7
    """Of each way; they take turns. A sample is all masks together, divided by their number."""


def main(
    where: Where,
    config: Annotated[MaskEpilogueConfig, tyro.conf.arg(name="")] = MaskEpilogueConfig(),
    *,
    images: Path | None = None,
) -> None:
    """Measure and report.

    Args:
        where: Models and output.
        config: Which masks, and how often.
        images: A picture or folder; its first is used. None: scikit-image's astronaut.
    """
    report(measure(where.models, config, images), where.output)


def measure(models: Path, config: MaskEpilogueConfig, images: Path | None) -> BenchmarkResult:
    """SAM's own masks, then the same enlarged."""
    artifacts = [load_artifact(models / name) for name in (SAM_IMAGE_ENCODER, SAM_MASK_DECODER)]
    recorder = Recorder(
        what="mask_epilogue",
        title="SAM's logits to masks and boxes",
        config=asdict(config),
        artifacts=tuple(map(artifact_record, artifacts)),
    )
    logits, side = _sam_logits(models, config, pictures(images, 1)[0])
    size = config.image_height, config.image_width
    official = resize_maps(logits, (_OFFICIAL_SIDE, _OFFICIAL_SIDE))
    of_frames = {
        _name(logits, side): (logits, longest_side_frame(size, side)),
        _name(official, _OFFICIAL_FRAME): (official, longest_side_frame(size, _OFFICIAL_FRAME)),
    }
    metrics = [m for name, case in of_frames.items() for m in _timed(name, *case, config)]
    notes = [
        f"Milliseconds of one mask; {len(logits)} masks of {size[0]}x{size[1]} pixels, "
        "of each the run lengths and the box, or at SAM's resolution stability score and box.",
        *_ratios(metrics),
    ]
    return recorder.result(metrics, notes=notes)


def _name(logits: Logits, frame_side: int) -> str:
    return f"SAM of {frame_side} px, {logits.shape[-1]}x{logits.shape[-1]} logits"


def _sam_logits(models: Path, config: MaskEpilogueConfig, data: bytes) -> tuple[Logits, int]:
    """All masks [n, m, m] of a grid of prompts on a picture, and the side of SAM's frame."""
    encoder = OnnxRuntimeModel(load_artifact(models / SAM_IMAGE_ENCODER))
    decoder = OnnxRuntimeModel(load_artifact(models / SAM_MASK_DECODER))
    parameters = load_artifact(models / SAM_IMAGE_ENCODER).parameters
    assert isinstance(parameters, SamParameters)
    image = decode_image(data)
    pixels, frame = resize_longest_side(image, parameters.image_size)
    valid = np.array([frame.valid_size], np.int32)
    embeddings = encoder({"image": pixels[None], "valid_size": valid})["image_embeddings"]
    prompts = sam_prompts(grid_prompts(config.points_per_side, frame.image_size))
    (pack,) = pack_prompts([prompts], [frame], max_prompts=len(prompts))
    answer = decoder(
        {
            "image_embeddings": embeddings,
            "image_index": pack.image_index,
            "point_coords": pack.point_coords,
            "point_labels": pack.point_labels,
        }
    )
    masks = answer["low_res_logits"][:, 1:]
    return masks.reshape(-1, *masks.shape[2:]), parameters.image_size


def _timed(
    name: str, logits: Logits, frame: ModelFrame, config: MaskEpilogueConfig
) -> list[Metric]:
    ways: dict[str, Way] = {
        PIPELINE: partial(masks_of_image, backend="reference"),
        MATRICES: _by_matrices,
        DEFINITION: _by_definition,
    }
    if _has_gpu():
        ways[KERNELS] = partial(masks_of_image, backend="cuda")
    _check(ways, logits, frame)
    at_image = {way: partial(_boxed, masks, logits, frame) for way, masks in ways.items()}
    at_image["boxes only, from the outside inwards"] = partial(full_resolution_boxes, logits, frame)
    backends: list[BackendName] = ["reference", "cuda"] if _has_gpu() else ["reference"]
    summaries = dict(zip((PIPELINE, KERNELS), backends, strict=False))
    at_sam = {
        way: partial(_summary, logits, frame, backend) for way, backend in summaries.items()
    } | {"scores and boxes, without areas": partial(_apart, logits, frame)}
    return [
        per_item(metric, len(logits))
        for kind, work in (("at the image's size", at_image), ("as they are", at_sam))
        for metric in in_turns(work, repeats=config.repeats, samples=3, kind=f"{name}, {kind}")
    ]


def _by_matrices(logits: Logits, frame: ModelFrame) -> InstanceMasks:
    # One at a time: full-resolution logits of many masks would not fit.
    counts = [encode_rle(image_logits(mask[None], frame) > 0)[0] for mask in logits]
    return InstanceMasks(rle_counts=tuple(counts), image_size=frame.image_size)


def _by_definition(logits: Logits, frame: ModelFrame) -> InstanceMasks:
    height, width = frame.image_size
    masks = (inside_down_columns(mask, frame).reshape(width, height).T for mask in logits)
    counts = [encode_rle(mask[None])[0] for mask in masks]
    return InstanceMasks(rle_counts=tuple(counts), image_size=frame.image_size)


def _boxed(way: Way, logits: Logits, frame: ModelFrame) -> NDArray[np.float32]:
    return rle_boxes(way(logits, frame))


def _summary(logits: Logits, frame: ModelFrame, backend: BackendName) -> object:
    of_image = np.zeros(len(logits), np.int32)
    return summarize_masks(logits, of_image, (frame,), backend=backend)


def _apart(logits: Logits, frame: ModelFrame) -> object:
    return low_res_stability(logits, frame), boxes_from_logits(logits, frame)


def _check(ways: dict[str, Way], logits: Logits, frame: ModelFrame) -> None:
    """Raise unless all give the definition's masks; matrix products, where rounding cannot tell."""
    expected = ways[DEFINITION](logits, frame)
    for name, way in ways.items():
        found = way(logits, frame)
        is_equal = found == expected
        if name == MATRICES:
            values = image_logits(logits, frame)
            differ = decode_rle(found.rle_counts, frame.image_size) != (
                decode_rle(expected.rle_counts, frame.image_size)
            )
            is_equal = not (np.abs(values[differ]) > _ROUNDING * np.abs(logits).max()).any()
        if not is_equal:
            raise RuntimeError(f"{name}: other masks than the definition's")


def _has_gpu() -> bool:
    try:
        prompt_backend("cuda")
    except BackendUnavailableError:
        return False
    return True


def _ratios(metrics: list[Metric]) -> list[str]:
    medians = {metric.name: float(np.median(metric.samples)) for metric in metrics}
    kinds = {name.rsplit(": ", 1)[0]: name for name in medians}
    return [
        f"{name} takes {value / medians[f'{kind}: {PIPELINE}']:.2f} times as long as the "
        "pipeline's way."
        for kind in kinds
        for name, value in medians.items()
        if name.startswith(f"{kind}: ") and not name.endswith(PIPELINE)
    ]


if __name__ == "__main__":
    enter(main)
