"""Pictures whose answers are known before a server gives them: what engines and pipelines say here,
and whether the server says the same.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.artifacts import ModelArtifact
from weaksam_rt.backends.base import Arrays
from weaksam_rt.backends.engines import open_engine
from weaksam_rt.backends.local import LocalBackend, ModelFunction
from weaksam_rt.boxes import box_iou
from weaksam_rt.client import WeakSamClient
from weaksam_rt.config import PipelineConfig
from weaksam_rt.contracts import (
    DETECTOR,
    PROMPT_CLUSTERING,
    SAM_IMAGE_ENCODER,
    SAM_MASK_DECODER,
    WEAKSAM_DETECT,
    WEAKSAM_PROPOSE,
    WEAKSAM_SEGMENT,
    DetectorParameters,
    SamParameters,
    VitClassifierParameters,
)
from weaksam_rt.errors import ReleaseError
from weaksam_rt.images import decode_image, decode_reduced
from weaksam_rt.masks import decode_rle, mask_to_box
from weaksam_rt.model_control import ModelControl
from weaksam_rt.model_repository import pipeline_models
from weaksam_rt.pipeline import WeakSamPipeline
from weaksam_rt.preprocessing import resize_for_detector, resize_longest_side, resize_to_square
from weaksam_rt.prompt_clustering import prompt_clustering_model
from weaksam_rt.prompts import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT
from weaksam_rt.types import Detections, SegmentResult

Engines = Mapping[str, ModelArtifact]
"""By model."""
_BOX_TOLERANCE_PX = 0.05
_SCORE_TOLERANCE = 1e-3
_SAME_BOX_IOU = 0.95
_SAME_BOXES = 0.95
"""Share of boxes of masks that must be found again: masks have edges, and ties in suppression."""
_WATCH_PAUSE_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a pipeline says of a picture, reduced to what is compared."""

    boxes: NDArray[np.float32]
    """[n, 4], XYXY."""
    scores: NDArray[np.float32]
    """[n]."""
    names: tuple[str, ...]
    """Of classes: one for each box, or the tags that were used."""
    mask_boxes: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    """[m, 4], XYXY around each mask."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineCall:
    """One pipeline, asked here and on a server."""

    here: Callable[[WeakSamPipeline, bytes], Answer]
    served: Callable[[WeakSamClient, bytes], tuple[int | None, Answer]]
    """The version that answered (None: its answers do not say), and what it said."""
    difference: Callable[[Answer, Answer], str | None]
    """How a served answer differs from the one expected; None: not beyond rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineAnswer:
    """Inputs of an engine and its outputs, as a server takes and gives them for one image."""

    artifact: ModelArtifact
    inputs: Arrays
    outputs: Arrays


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A picture and the answers that the candidates give to it outside the server."""

    name: str
    data: bytes
    engines: tuple[EngineAnswer, ...]
    """Of the candidates alone."""
    pipelines: Mapping[str, Answer]
    """Of the pipelines that call them."""


def make_probes(
    candidates: Engines,
    others: Engines,
    pipelines: Sequence[str],
    config: PipelineConfig,
    images: Sequence[Path],
) -> list[Probe]:
    """What the server will have to answer, computed in this process.

    Args:
        candidates: The engines to be released.
        others: Engines that the pipelines call besides.
        pipelines: Those that call a candidate.
        config: Of the pipelines.
        images: Pictures.
    """
    engines, calls = {**others, **candidates}, calls_of(candidates)
    opened = {name: open_engine(engine, num_threads=1) for name, engine in engines.items()}
    clustering = partial(prompt_clustering_model, config=config.clustering)
    here = WeakSamPipeline(
        LocalBackend({**opened, PROMPT_CLUSTERING: clustering}), pipeline_models(engines), config
    )
    probes = []
    for path in images:
        data = path.read_bytes()
        probes.append(
            Probe(
                name=path.name,
                data=data,
                engines=_engine_answers(candidates, opened, data),
                pipelines={name: calls[name].here(here, data) for name in pipelines},
            )
        )
    return probes


def check_engine_answers(control: ModelControl, probes: Sequence[Probe], version: int) -> None:
    """Ask the loaded, not yet used engines on the server; raises ``ReleaseError`` at the first
    answer that is not the candidate's.
    """
    for probe in probes:
        for known in probe.engines:
            answer = control.infer(known.artifact.contract, version, known.inputs)
            if difference := _outputs_difference(known, answer):
                raise ReleaseError(
                    f"{probe.name}: {known.artifact.model} on the server gives {difference}"
                )


def watch_answers(
    client: WeakSamClient,
    probes: Sequence[Probe],
    calls: Mapping[str, PipelineCall],
    version: int,
    *,
    watch_s: float,
) -> None:
    """Ask the switched pipelines again and again for ``watch_s`` seconds, at least once each.

    Raises:
        ReleaseError: An answer came from another version, or is not the candidates'.
        WeakSamError: The server failed a probe.
    """
    deadline = time.monotonic() + watch_s
    while True:
        for probe in probes:
            for pipeline, expected in probe.pipelines.items():
                call = calls[pipeline]
                found, answer = call.served(client, probe.data)
                if found not in (version, None):
                    raise ReleaseError(
                        f"{probe.name} was answered by version {found} of {pipeline}, expected "
                        f"{version}"
                    )
                if difference := call.difference(answer, expected):
                    raise ReleaseError(f"{probe.name}: {pipeline}: {difference}")
        if time.monotonic() >= deadline:
            return
        time.sleep(min(_WATCH_PAUSE_S, max(deadline - time.monotonic(), 0)))


def answer_difference(got: Detections, expected: Detections) -> str | None:
    """How served detections differ from those expected; None: not beyond rounding."""
    if len(got) == len(expected) and not np.array_equal(got.labels, expected.labels):
        return f"labels {got.labels.tolist()}, expected {expected.labels.tolist()}"
    return _detections_difference(_of_detections(got), _of_detections(expected))


# ---------------------------------------------------------------------------------------------
# Engines
# ---------------------------------------------------------------------------------------------


def _engine_answers(
    candidates: Engines, opened: Mapping[str, ModelFunction], data: bytes
) -> tuple[EngineAnswer, ...]:
    answers: dict[str, EngineAnswer] = {}
    # The decoder is asked about what the encoder says.
    for model in sorted(candidates, key=lambda name: name == SAM_MASK_DECODER):
        artifact = candidates[model]
        inputs = _inputs(artifact, data, answers)
        outputs = opened[model](inputs, None)
        if artifact.contract.is_batched:
            inputs, outputs = (
                {name: array[0] for name, array in arrays.items()} for arrays in (inputs, outputs)
            )
        answers[model] = EngineAnswer(artifact=artifact, inputs=inputs, outputs=outputs)
    return tuple(answers.values())


def _inputs(
    artifact: ModelArtifact, data: bytes, before: Mapping[str, EngineAnswer]
) -> dict[str, NDArray[Any]]:
    """What serving puts into the engine for this picture."""
    match artifact.parameters:
        case DetectorParameters(image_size=side):
            image = decode_reduced(data, side)
            pixels, _ = resize_for_detector(image.pixels, side, image_size=image.image_size)
            return {"image": pixels[None]}
        case VitClassifierParameters(image_size=side):
            return {"image": resize_to_square(decode_image(data), side)[None]}
        case SamParameters(image_size=side) if artifact.model == SAM_IMAGE_ENCODER:
            pixels, frame = resize_longest_side(decode_image(data), side)
            return {"image": pixels[None], "valid_size": np.array([frame.valid_size], np.int32)}
        case SamParameters(image_size=side) if artifact.model == SAM_MASK_DECODER:
            corners = np.array([[[side / 8, side / 8], [side / 2, side / 2]]], np.float32)
            embedding = before[SAM_IMAGE_ENCODER].outputs["image_embeddings"]
            return {
                "image_embeddings": embedding[None],
                "image_index": np.zeros(1, np.int32),
                "point_coords": corners,
                "point_labels": np.array([[BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]], np.int32),
            }
    raise ReleaseError(f"{artifact.model} has no probes")


def _outputs_difference(known: EngineAnswer, answer: Arrays) -> str | None:
    """None: not beyond rounding. A detector's candidates swap places where scores are equal to
    rounding, so of the others only that they are finite.
    """
    for name, expected in known.outputs.items():
        got = answer[name]
        if not np.isfinite(got).all():
            return f"{name} that are not finite"
        if known.artifact.model == DETECTOR and name != "scores":
            continue
        if got.shape != expected.shape:
            return f"{name} of shape {list(got.shape)}, expected {list(expected.shape)}"
        scale = max(1.0, float(np.abs(expected).max(initial=0)))
        error = float(np.abs(got - expected).max(initial=0)) / scale
        if error > _SCORE_TOLERANCE:
            return f"{name} that differ by {error:.2g} from the same engine here"
    return None


# ---------------------------------------------------------------------------------------------
# Pipelines
# ---------------------------------------------------------------------------------------------


def calls_of(candidates: Iterable[str]) -> dict[str, PipelineCall]:
    """How each pipeline is asked, so that the engines of ``candidates`` take part in its answer."""
    with_masks = SAM_IMAGE_ENCODER in candidates
    return {
        WEAKSAM_DETECT.name: PipelineCall(
            here=partial(_detect_here, with_masks=with_masks),
            served=partial(_detect_served, with_masks=with_masks),
            difference=_detections_difference,
        ),
        WEAKSAM_PROPOSE.name: PipelineCall(
            here=_propose_here, served=_propose_served, difference=_proposals_difference
        ),
        WEAKSAM_SEGMENT.name: PipelineCall(
            here=_segment_here, served=_segment_served, difference=_masks_difference
        ),
    }


def _detect_here(pipeline: WeakSamPipeline, data: bytes, *, with_masks: bool) -> Answer:
    image = decode_reduced(data, pipeline.longest_side_seen(with_masks=with_masks))
    found = asyncio.run(
        pipeline.detect(image.pixels, image_size=image.image_size, with_masks=with_masks)
    )
    return _of_detections(found)


def _detect_served(client: WeakSamClient, data: bytes, *, with_masks: bool) -> tuple[int, Answer]:
    result = client.detect(data, with_masks=with_masks)
    return result.version, _of_detections(result.detections)


def _segment_here(pipeline: WeakSamPipeline, data: bytes) -> Answer:
    image = decode_image(data)
    result = asyncio.run(pipeline.segment(image, boxes=_prompted_box(image)))
    return _of_segments(result)


def _segment_served(client: WeakSamClient, data: bytes) -> tuple[None, Answer]:
    result = client.segment(data, boxes=_prompted_box(decode_image(data)))
    return None, _of_segments(result)


def _prompted_box(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The middle of the picture, [1, 4]."""
    height, width = image.shape[:2]
    return np.array([[width, height, 3 * width, 3 * height]], np.float32) / 4


def _of_segments(found: SegmentResult) -> Answer:
    none = np.zeros((0, 4), np.float32)
    return Answer(
        boxes=none, scores=found.scores.ravel(), names=(), mask_boxes=found.boxes.reshape(-1, 4)
    )


def _propose_here(pipeline: WeakSamPipeline, data: bytes) -> Answer:
    result = asyncio.run(pipeline.propose(decode_image(data)))
    return Answer(
        boxes=result.proposals.boxes, scores=result.proposals.scores, names=result.used_tags
    )


def _propose_served(client: WeakSamClient, data: bytes) -> tuple[int, Answer]:
    result = client.propose(data)
    return result.version, Answer(
        boxes=result.proposals.boxes, scores=result.proposals.scores, names=result.used_tags
    )


def _of_detections(found: Detections) -> Answer:
    answer = Answer(
        boxes=found.boxes, scores=found.scores, names=tuple(map(str, found.labels.tolist()))
    )
    if found.masks is None:
        return answer
    masks = decode_rle(found.masks.rle_counts, found.masks.image_size)
    return replace(answer, mask_boxes=mask_to_box(masks))


def _detections_difference(got: Answer, expected: Answer) -> str | None:
    if len(got.boxes) != len(expected.boxes):
        return f"{len(got.boxes)} detections, expected {len(expected.boxes)}"
    if len(got.boxes) == 0:
        return None
    if got.names != expected.names:
        return f"labels {', '.join(got.names)}, expected {', '.join(expected.names)}"
    boxes = float(np.abs(got.boxes - expected.boxes).max())
    if boxes > _BOX_TOLERANCE_PX:
        return f"boxes differ by {boxes:.3g} px"
    scores = float(np.abs(got.scores - expected.scores).max())
    if scores > _SCORE_TOLERANCE:
        return f"scores differ by {scores:.3g}"
    return _masks_difference(got, expected)


def _proposals_difference(got: Answer, expected: Answer) -> str | None:
    if got.names != expected.names:
        return f"tags {list(got.names)}, expected {list(expected.names)}"
    return _boxes_difference("proposals", got.boxes, expected.boxes)


def _masks_difference(got: Answer, expected: Answer) -> str | None:
    return _boxes_difference("masks", got.mask_boxes, expected.mask_boxes)


def _boxes_difference(
    what: str, got: NDArray[np.float32], expected: NDArray[np.float32]
) -> str | None:
    """Of boxes without an order; an empty one is equal to an empty one."""
    if len(got) == 0 or len(expected) == 0:
        same = len(got) == len(expected)
        return None if same else f"{len(got)} {what}, expected {len(expected)}"
    is_empty = [(boxes[:, 2:] <= boxes[:, :2]).any(axis=1) for boxes in (expected, got)]
    is_same = (box_iou(expected, got) >= _SAME_BOX_IOU) | (is_empty[0][:, None] & is_empty[1])
    share = min(float(is_same.any(axis=axis).mean()) for axis in (0, 1))
    if share < _SAME_BOXES:
        return f"{share:.0%} of the {what} are those expected, at least {_SAME_BOXES:.0%} must be"
    return None
