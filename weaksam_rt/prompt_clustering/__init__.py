"""Activation maps to point prompts: the model ``prompt_clustering``, and batches of it.

One entry for each step, over the backend that the configuration names: NumPy or CUDA.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.backends.base import Arrays
from weaksam_rt.contracts import ClusteringParameters, prompt_clustering_contract
from weaksam_rt.preprocessing import ModelFrame
from weaksam_rt.prompt_clustering._backends import PromptBackend, prompt_backend
from weaksam_rt.prompt_clustering._reference import cluster_points
from weaksam_rt.prompt_clustering.batch import (
    EncodedMasks,
    MapBatch,
    MaskSummary,
    PromptBatch,
    check_image_maps,
    check_mask_pixels,
    check_masks,
    check_scored_boxes,
)
from weaksam_rt.prompt_clustering.config import BackendName, ClusteringConfig
from weaksam_rt.prompt_clustering.device_arrays import (
    AnyArray,
    DeviceArray,
    JoinedArrays,
    as_array,
    device_of,
    host_array,
)
from weaksam_rt.types import ImageSize, PointPrompts, PromptSource

__all__ = [
    "ClusteringConfig",
    "EncodedMasks",
    "MapBatch",
    "MaskSummary",
    "PromptBatch",
    "as_array",
    "class_nms",
    "cluster_prompts",
    "encode_masks",
    "prompt_backend",
    "prompt_batch",
    "prompt_clustering_model",
    "prompts_from_maps",
    "summarize_masks",
]

_DEFAULT = ClusteringConfig()
_CONTRACT = prompt_clustering_contract(ClusteringParameters())


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
    return cluster_points(points, points_per_cluster)


def prompts_from_maps(
    *,
    coarse_maps: Any,
    fine_maps: Any,
    cross_maps: Any,
    class_ids: NDArray[np.int32],
    image_size: ImageSize,
    config: ClusteringConfig,
) -> PointPrompts:
    """Peaks of all maps, those of the cross-attention maps clustered over all classes and heads.

    Maps are float32 arrays of NumPy or, for the backend ``cuda``, of any library, on the GPU.

    Args:
        coarse_maps: [c, h, w], maps of the c present classes, summed over test-time passes.
        fine_maps: [c, h, w].
        cross_maps: [m, c, h, w], m layers and heads.
        class_ids: [c].
        image_size: (height, width) of the original image, in whose pixels peaks are searched.
        config: Windows, thresholds, cluster size, backend.

    Returns:
        Prompts in the order coarse, fine, cross. Cross prompts have no class.

    Raises:
        ValueError: Shapes or dtypes do not fit each other, or are not for the kernels where the
            backend is ``cuda``.
        BackendUnavailableError: The configured backend cannot run here.
    """
    frame = ModelFrame(image_size=image_size, valid_size=image_size, model_size=max(image_size))
    batch = _batch_of_image(
        as_array("coarse_maps", coarse_maps),
        as_array("fine_maps", fine_maps),
        as_array("cross_maps", cross_maps),
        class_ids,
        frame,
    )
    return _backend_of(config, batch.maps).point_prompts(batch, config)


def prompt_batch(batch: MapBatch, config: ClusteringConfig) -> PromptBatch:
    """Prompts of several images at once, packed for SAM's decoder.

    Args:
        batch: Checked maps. A map with a value that is not finite has no peaks.
        config: Windows, thresholds, cluster size, backend.

    Raises:
        ValueError: The maps are not for the kernels, and the backend is ``cuda``.
        BackendUnavailableError: The configured backend cannot run here.
        InferenceError: The GPU failed, or its memory does not hold the batch.
    """
    return _backend_of(config, batch.maps).prompt_batch(batch, config)


def summarize_masks(
    logits: Any,
    mask_images: NDArray[np.int32],
    frames: Sequence[ModelFrame],
    *,
    backend: BackendName,
    device: int = 0,
) -> MaskSummary:
    """Box, stability score and area of masks of several images, from SAM's own resolution.

    Args:
        logits: float32 [n, m, m] over the model frame, of any library (``as_array``). NaN is
            outside its mask.
        mask_images: [n], position of each mask's image in ``frames``.
        frames: For each image its frame.
        backend: What runs it.
        device: Number of the GPU for logits that lie on none.

    Raises:
        ValueError: Shapes, dtypes or positions do not fit each other.
    """
    logits = as_array("logits", logits)
    check_masks(logits, mask_images, len(frames))
    chosen = prompt_backend(backend, device_of(logits, default=device))
    return chosen.summarize_masks(logits, mask_images, frames)


def encode_masks(
    logits: Any,
    mask_images: NDArray[np.int32],
    frames: Sequence[ModelFrame],
    *,
    backend: BackendName,
    device: int = 0,
    with_bits: bool = True,
) -> EncodedMasks:
    """Masks of several images at the images' resolution, as bits and as COCO's run lengths.

    Args:
        logits: float32 [n, m, m] over the model frame, of any library (``as_array``). NaN is
            outside its mask.
        mask_images: [n], position of each mask's image in ``frames``.
        frames: For each image its frame; all of one model size.
        backend: What runs it.
        device: Number of the GPU for logits that lie on none.
        with_bits: Whether the bits are wanted too; they are many more bytes than the runs.

    Raises:
        ValueError: Shapes, dtypes or positions do not fit each other, or the masks have more
            pixels together than can be counted.
    """
    logits = as_array("logits", logits)
    check_masks(logits, mask_images, len(frames))
    check_mask_pixels(mask_images, frames)
    chosen = prompt_backend(backend, device_of(logits, default=device))
    return chosen.encode_masks(logits, mask_images, frames, with_bits=with_bits)


def class_nms(
    boxes: Any,
    scores: Any,
    labels: Any,
    *,
    iou_thresh: float,
    backend: BackendName,
    device: int = 0,
) -> NDArray[np.int64]:
    """Greedy non-maximum suppression within each label.

    For callers whose boxes lie on the GPU; the pipeline has its boxes on the host, where
    ``boxes.batched_nms`` does the same.

    Args:
        boxes: float32 [n, 4], XYXY, any frame; these three of any library (``as_array``). One with
            a coordinate that is not finite overlaps none.
        scores: float32 [n]; ties go to the lower index, NaN comes last.
        labels: int32 [n].
        iou_thresh: In [0, 1]; a box goes when its IoU with a kept, better one is above this.
        backend: What runs it.
        device: Number of the GPU for arrays that lie on none.

    Returns:
        Indices of the kept boxes, best score first.

    Raises:
        ValueError: Shapes or dtypes do not fit each other, or the threshold is out of its range.
    """
    boxes, scores = as_array("boxes", boxes), as_array("scores", scores)
    labels = as_array("labels", labels)
    check_scored_boxes(boxes, scores, labels, iou_thresh)
    chosen = prompt_backend(backend, device_of(boxes, scores, labels, default=device))
    return chosen.class_nms(boxes, scores, labels, iou_thresh)


def prompt_clustering_model(
    inputs: Arrays,
    outputs: Sequence[str] | None = None,
    *,
    config: ClusteringConfig = _DEFAULT,
) -> dict[str, NDArray[Any]]:
    """``prompts_from_maps`` with the arrays of the contract ``prompt_clustering``.

    Maps may be ``DeviceArray``; ``class_ids`` and ``image_size`` may not.
    """
    _CONTRACT.check_inputs(inputs)
    height, width = (int(side) for side in host_array("image_size", inputs["image_size"]))
    prompts = prompts_from_maps(
        **{name: inputs[name] for name in ("coarse_maps", "fine_maps", "cross_maps")},
        class_ids=host_array("class_ids", inputs["class_ids"]),
        image_size=(height, width),
        config=config,
    )
    names = [spec.name for spec in _CONTRACT.outputs] if outputs is None else outputs
    return {name: getattr(prompts, name) for name in names}


def _backend_of(config: ClusteringConfig, maps: AnyArray) -> PromptBackend:
    return prompt_backend(config.backend, device_of(maps, default=config.device))


def _batch_of_image(
    coarse_maps: NDArray[Any] | DeviceArray,
    fine_maps: NDArray[Any] | DeviceArray,
    cross_maps: NDArray[Any] | DeviceArray,
    class_ids: NDArray[np.int32],
    frame: ModelFrame,
) -> MapBatch:
    check_image_maps(coarse_maps, fine_maps, cross_maps, class_ids)
    num_layers, num_classes, height, width = cross_maps.shape
    counts = [num_classes, num_classes, num_layers * num_classes]
    parts = (coarse_maps, fine_maps, cross_maps.reshape(counts[2], height, width))
    sources = (PromptSource.COARSE, PromptSource.FINE, PromptSource.CROSS)
    return MapBatch(
        maps=_joined(parts, (1, sum(counts), height, width)),
        map_images=np.zeros(sum(counts), np.int32),
        map_sources=np.repeat(np.array(sources, np.int32), counts),
        map_classes=np.concatenate([class_ids, class_ids, np.tile(class_ids, num_layers)]),
        frames=(frame,),
    )


def _joined(
    parts: tuple[NDArray[Any] | DeviceArray, ...], shape: tuple[int, ...]
) -> NDArray[Any] | JoinedArrays:
    on_host = [part for part in parts if isinstance(part, np.ndarray)]
    if len(on_host) == len(parts):
        return np.concatenate(on_host).reshape(shape)
    return JoinedArrays(parts=parts, shape=shape)
