"""How far two answers of a model lie apart, in numbers that mean the same for every precision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.boxes import box_iou
from weaksam_rt.contracts import DETECTOR

_DETECTIONS = 10
"""Best candidates of an image that are looked for in the other answer."""
Answer = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """One answer beside the one it should be; over several inputs the worst."""

    finite: bool
    """All values are finite."""
    max_error: float
    """Largest difference of any element, relative to its output's largest magnitude; inf where
    not finite."""
    cosine: float
    """Smallest cosine of an output with what it should be, in [-1, 1]; -1 where not finite."""
    distance: float
    """What is judged. Detector: 1 - mean IoU of the best candidates with their partners of the
    same label, times how well the scores agree. Others: norm of the difference over the norm, the
    worst output. inf where not finite.
    """


def agreement(model: str, expected: Answer, got: Answer) -> Agreement:
    """Compare two answers of the served model ``model`` to the same inputs."""
    names = [name for name in expected if np.issubdtype(expected[name].dtype, np.floating)]
    if not all(np.isfinite(got[name]).all() for name in names):
        return Agreement(finite=False, max_error=np.inf, cosine=-1.0, distance=np.inf)
    pairs = [(expected[n].astype(np.float64), got[n].astype(np.float64)) for n in names]
    if model == DETECTOR:
        distance = 1 - _matched_quality(expected, got)
    else:
        distance = max(_ratio(_norm(b - a), _norm(a)) for a, b in pairs)
    return Agreement(
        finite=True,
        max_error=max(_ratio(np.abs(b - a).max(), np.abs(a).max()) for a, b in pairs),
        cosine=min(_cosine(a, b) for a, b in pairs),
        distance=distance,
    )


def worst(parts: Sequence[Agreement]) -> Agreement:
    """Over several inputs; the distance is their mean."""
    return Agreement(
        finite=all(part.finite for part in parts),
        max_error=max(part.max_error for part in parts),
        cosine=min(part.cosine for part in parts),
        distance=float(np.mean([part.distance for part in parts])),
    )


def _matched_quality(expected: Answer, got: Answer) -> float:
    """In [0, 1]; candidates have no order that survives rounding, so each looks for its partner."""
    qualities = []
    for image in range(len(expected["boxes"])):
        best = expected["scores"][image].argsort()[::-1][:_DETECTIONS]
        boxes, labels = expected["boxes"][image][best], expected["labels"][image][best]
        scores = expected["scores"][image][best]
        overlap = box_iou(boxes, got["boxes"][image])
        overlap = np.where(labels[:, None] == got["labels"][image][None], overlap, 0.0)
        partner = overlap.argmax(axis=1)
        change = np.abs(got["scores"][image][partner] - scores)
        qualities.append(overlap[np.arange(len(best)), partner] * (1 - change))
    return float(np.mean(qualities))


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float(part)


def _norm(values: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(values))


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    norms = _norm(a) * _norm(b)
    return float((a * b).sum() / norms) if norms else float(not a.any() and not b.any())
