"""Activation maps of one image to point prompts: the model ``prompt_clustering``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.backends.base import Arrays
from weaksam_rt.class_activation_map import (
    CAM_PEAKS,
    CROSS_PEAKS,
    PeakConfig,
    normalize_maps,
    peak_points,
)
from weaksam_rt.contracts import ClusteringParameters, prompt_clustering_contract
from weaksam_rt.preprocessing import resize_maps
from weaksam_rt.prompt_clustering._reference import kmeans
from weaksam_rt.types import NO_CLASS, ImageSize, PointPrompts, PromptSource

__all__ = ["ClusteringConfig", "cluster_prompts", "prompt_clustering_model", "prompts_from_maps"]

_CONTRACT = prompt_clustering_contract(ClusteringParameters())


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusteringConfig:
    """How maps become prompts."""

    cam_peaks: PeakConfig = CAM_PEAKS
    """Peaks of coarse and fine maps."""
    cross_peaks: PeakConfig = CROSS_PEAKS
    """Peaks of cross-attention maps."""
    points_per_cluster: int = 5
    """Cross-attention peaks per cluster: n peaks give max(1, n // points_per_cluster) clusters."""
    backend: Literal["numpy"] = "numpy"
    """What runs it."""

    def __post_init__(self) -> None:
        if self.points_per_cluster < 1:
            raise ValueError(f"points_per_cluster must be positive, got {self.points_per_cluster}")
        if self.backend != "numpy":
            raise ValueError(f"backend must be 'numpy', got {self.backend!r}")


def cluster_prompts(points: NDArray[np.int64], points_per_cluster: int) -> NDArray[np.int64]:
    """Cluster centres of pooled cross-attention peaks.

    Args:
        points: [n, 2], (x, y) pixels. May be empty.
        points_per_cluster: n points give max(1, n // points_per_cluster) clusters.

    Returns:
        Integer centres [m, 2]; empty stays empty.

    Source:
        WeakSAM's k-means with k = n // 5. The released code invents the point (100, 100) for an
        image without peaks; we do not.
    """
    if len(points) == 0:
        return points
    return kmeans(points, max(1, len(points) // points_per_cluster))


def prompts_from_maps(
    *,
    coarse_maps: NDArray[np.float32],
    fine_maps: NDArray[np.float32],
    cross_maps: NDArray[np.float32],
    class_ids: NDArray[np.int32],
    image_size: ImageSize,
    config: ClusteringConfig,
) -> PointPrompts:
    """Peaks of all maps, those of the cross-attention maps clustered over all classes and heads.

    Args:
        coarse_maps: [c, h, w], maps of the c present classes, summed over test-time passes.
        fine_maps: [c, h, w].
        cross_maps: [m, c, h, w], m layers and heads.
        class_ids: [c].
        image_size: (height, width) of the original image, in whose pixels peaks are searched.
        config: Windows, thresholds, cluster size.

    Returns:
        Prompts in the order coarse, fine, cross. Cross prompts have no class.
    """
    parts = [
        _cam_prompts(maps, class_ids, source, image_size, config.cam_peaks)
        for maps, source in ((coarse_maps, PromptSource.COARSE), (fine_maps, PromptSource.FINE))
    ]
    pooled = [
        peak_points(normalized, config.cross_peaks).points
        for maps in cross_maps
        for normalized in _at_image_resolution(maps, image_size)
    ]
    points = np.concatenate([np.zeros((0, 2), np.int64), *pooled])
    centres = cluster_prompts(points, config.points_per_cluster)
    ones = np.ones(len(centres), np.float32)
    return PointPrompts.concatenate([*parts, _prompts(centres, ones, NO_CLASS, PromptSource.CROSS)])


def prompt_clustering_model(
    inputs: Arrays,
    outputs: Sequence[str] | None = None,
    *,
    config: ClusteringConfig = ClusteringConfig(),
) -> dict[str, NDArray[Any]]:
    """``prompts_from_maps`` with the arrays of the contract ``prompt_clustering``."""
    _CONTRACT.check_inputs(inputs)
    height, width = (int(side) for side in inputs["image_size"])
    maps = {name: inputs[name] for name in ("coarse_maps", "fine_maps", "cross_maps", "class_ids")}
    prompts = prompts_from_maps(image_size=(height, width), config=config, **maps)
    names = [spec.name for spec in _CONTRACT.outputs] if outputs is None else outputs
    return {name: getattr(prompts, name) for name in names}


def _at_image_resolution(maps: NDArray[np.float32], image_size: ImageSize) -> NDArray[np.float32]:
    return normalize_maps(resize_maps(maps, image_size))


def _cam_prompts(
    maps: NDArray[np.float32],
    class_ids: NDArray[np.int32],
    source: PromptSource,
    image_size: ImageSize,
    config: PeakConfig,
) -> PointPrompts:
    normalized = _at_image_resolution(maps, image_size)
    found = [peak_points(activation_map, config) for activation_map in normalized]
    return PointPrompts.concatenate(
        [
            _prompts(peaks.points, peaks.scores, int(class_id), source)
            for peaks, class_id in zip(found, class_ids, strict=True)
        ]
    )


def _prompts(
    points: NDArray[np.int64], scores: NDArray[np.float32], class_id: int, source: PromptSource
) -> PointPrompts:
    return PointPrompts(
        points=points.astype(np.float32),
        scores=scores.astype(np.float32),
        class_ids=np.full(len(points), class_id, np.int32),
        sources=np.full(len(points), source, np.int32),
    )
