"""How far two answers of a model lie apart, in numbers that mean the same for every precision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.boxes import box_iou
from weaksam_rt.config import PipelineConfig
from weaksam_rt.contracts import DETECTOR
from weaksam_rt.preprocessing import maps_of_classes
from weaksam_rt.prompt_clustering import prompts_from_maps
from weaksam_rt.types import PointPrompts

_DETECTIONS = 10
"""Best candidates of an image that are looked for in the other answer."""
_CELL_PX = 16
"""Pixels of a map's cell where prompts are compared."""
_MASKS = "mask_logits"
Answer = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """One answer beside the one it should be; for several inputs see ``worst`` and
    ``on_average``.
    """

    finite: bool
    """All values are finite."""
    max_error: float
    """Largest difference of any element, relative to its output's largest magnitude; inf where
    not finite."""
    cosine: float
    """Smallest cosine of an output with what it should be, in [-1, 1]; -1 where not finite."""
    distance: float
    """What is judged. Detector: 1 - mean IoU of the best candidates with their partners of the
    same label, times how well the scores agree; where it has masks, or 1 - mean IoU of the
    partners' masks if that is more. Others: norm of the difference over the norm, the worst output.
    inf where not finite.
    """


def agreement(model: str, expected: Answer, got: Answer) -> Agreement:
    """Compare two answers of the served model ``model`` to the same inputs."""
    names = [name for name in expected if np.issubdtype(expected[name].dtype, np.floating)]
    if not all(np.isfinite(got[name]).all() for name in names):
        return Agreement(finite=False, max_error=np.inf, cosine=-1.0, distance=np.inf)
    pairs = [(expected[n].astype(np.float64), got[n].astype(np.float64)) for n in names]
    if model == DETECTOR:
        distance = 1 - min(_matched_qualities(expected, got))
    else:
        distance = max(_ratio(_norm(b - a), _norm(a)) for a, b in pairs)
    return Agreement(
        finite=True,
        max_error=max(_ratio(np.abs(b - a).max(), np.abs(a).max()) for a, b in pairs),
        cosine=min(_cosine(a, b) for a, b in pairs),
        distance=distance,
    )


def worst(parts: Sequence[Agreement]) -> Agreement:
    """Each figure of several inputs at its worst: one broken batch size is not hidden by others."""
    return Agreement(
        finite=all(part.finite for part in parts),
        max_error=max(part.max_error for part in parts),
        cosine=min(part.cosine for part in parts),
        distance=max(part.distance for part in parts),
    )


def on_average(parts: Sequence[Agreement]) -> Agreement:
    """Several inputs of one kind, such as photographs: their mean distance, the rest at its
    worst.
    """
    return replace(worst(parts), distance=float(np.mean([part.distance for part in parts])))


def prompt_agreement(expected: Answer, got: Answer, config: PipelineConfig | None = None) -> float:
    """Share of the prompts, in [0, 1], that two answers of the classifier have in common.

    Prompts are made of each answer's maps for the classes that it sees. One is common if the other
    answer has one of the same class and source less than half a map's cell away. 1 where neither
    has any.

    Args:
        expected: Outputs of ``vit_classifier``, with batch axis.
        got: Of the other engine, to the same inputs.
        config: Of the pipeline; None: the defaults.
    """
    settings = config or PipelineConfig()
    pairs = [
        (_prompts(expected, image, settings), _prompts(got, image, settings))
        for image in range(len(expected["logits"]))
    ]
    return common_share(pairs)


def common_share(pairs: Sequence[tuple[PointPrompts, PointPrompts]]) -> float:
    """Share of the prompts of images, in [0, 1], that two answers to each have in common, as in
    ``prompt_agreement``.
    """
    total = sum(len(first) + len(second) for first, second in pairs)
    common = sum(_num_found(one, two) + _num_found(two, one) for one, two in pairs)
    return common / total if total else 1.0


def _prompts(answer: Answer, image: int, config: PipelineConfig) -> PointPrompts:
    present = np.flatnonzero(answer["logits"][image] > config.present_logit_thresh)
    if len(present) == 0:
        return PointPrompts.concatenate([])
    of_image = {name: values[image : image + 1] for name, values in answer.items()}
    maps = maps_of_classes(of_image, present)
    side = _CELL_PX * maps["coarse_maps"].shape[-1]
    return prompts_from_maps(
        **maps,
        class_ids=present.astype(np.int32),
        image_size=(side, side),
        config=config.clustering,
    )


def _num_found(wanted: PointPrompts, there: PointPrompts) -> int:
    """How many of ``wanted`` have a partner in ``there``."""
    apart = np.abs(wanted.points[:, None] - there.points[None]).max(axis=2, initial=0)
    is_partner = (
        (apart < _CELL_PX / 2)
        & (wanted.class_ids[:, None] == there.class_ids[None])
        & (wanted.sources[:, None] == there.sources[None])
    )
    return int(is_partner.any(axis=1).sum())


def _matched_qualities(expected: Answer, got: Answer) -> list[float]:
    """Of the boxes and, where there are any, of the masks; in [0, 1]. Candidates have no order that
    survives rounding, so each looks for its partner.
    """
    of_boxes, of_masks = [], []
    for image in range(len(expected["boxes"])):
        best = expected["scores"][image].argsort()[::-1][:_DETECTIONS]
        boxes, labels = expected["boxes"][image][best], expected["labels"][image][best]
        scores = expected["scores"][image][best]
        overlap = box_iou(boxes, got["boxes"][image])
        is_same = (boxes[:, None] == got["boxes"][image][None]).all(axis=2)
        overlap = np.where(is_same, 1.0, overlap)  # a box without area has no overlap with itself
        overlap = np.where(labels[:, None] == got["labels"][image][None], overlap, 0.0)
        partner = overlap.argmax(axis=1)
        change = np.abs(got["scores"][image][partner] - scores)
        found = overlap[np.arange(len(best)), partner]
        of_boxes.append(found * (1 - change))
        if _MASKS in expected:
            pairs = expected[_MASKS][image][best], got[_MASKS][image][partner]
            of_masks.append(_mask_iou(*pairs)[found > 0])  # the rest has no partner
    return [_mean(np.concatenate(parts)) for parts in (of_boxes, of_masks) if parts]


def _mean(qualities: NDArray[np.float64]) -> float:
    return float(qualities.mean()) if len(qualities) else 0.0


def _mask_iou(expected: NDArray[Any], got: NDArray[Any]) -> NDArray[np.float64]:
    """IoU of each mask with its partner, [n], from logits [n, m, m]; 1 where both are empty."""
    a, b = expected > 0, got > 0
    common = (a & b).sum(axis=(1, 2))
    either = (a | b).sum(axis=(1, 2))
    return np.divide(common, either, out=np.ones(len(a)), where=either > 0)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float(part)


def _norm(values: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(values))


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    norms = _norm(a) * _norm(b)
    return float((a * b).sum() / norms) if norms else float(not a.any() and not b.any())
