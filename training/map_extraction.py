"""Peaks of a classifier's maps as the paper takes them: many passes over the image in its shape.

It knows models, passes and maps; peaks and clusters are the runtime's. Serving takes one square
pass and its mirror image instead (``weaksam_rt.pipeline``).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from training.data.augment import normalize_images
from training.evaluation.proposal_report import ImageMaps
from training.models.vit_adapter import LoadedClassifier
from weaksam_rt.class_activation_map import PeakConfig, normalize_maps, peak_points
from weaksam_rt.prompt_clustering import ClusteringConfig, cluster_prompts
from weaksam_rt.types import NO_CLASS, ImageSize, PointPrompts, PromptSource


@dataclass(frozen=True, kw_only=True, slots=True)
class MapPasses:
    """How often, and how large, the classifier sees an image.

    Source:
        WeakTr: scales 1, 0.8 and 1.2, each also mirrored, at the image's own shape. The bound is
        ours; no image of VOC or COCO reaches it.
    """

    scales: tuple[float, ...] = (1.0, 0.8, 1.2)
    """Sides of the image in each pass, relative to its own; the first decides about predicted
    tags."""
    flip: bool = True
    """Each scale is also seen mirrored."""
    longest_side: int = 1000
    """Larger images count as if scaled down to this, pixels: attention grows with the fourth power
    of it."""

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales must be positive and at least one, got {self.scales}")
        if self.longest_side < 1:
            raise ValueError(f"longest_side must be positive, got {self.longest_side}")


@dataclass(frozen=True, kw_only=True)
class PassMaps:
    """Raw maps of one pass, turned back if it was mirrored."""

    coarse: Float[Tensor, "c h w"]
    fine: Float[Tensor, "c h w"]
    cross: Float[Tensor, "m c h w"]


def peak_prompts(
    classifier: LoadedClassifier,
    image: NDArray[np.uint8],
    class_ids: Sequence[int] | None,
    *,
    passes: MapPasses,
    clustering: ClusteringConfig,
    present_logit_thresh: float,
) -> tuple[PointPrompts, tuple[int, ...]]:
    """Prompts from all passes, in the order coarse, fine, cross; and the classes that were used.

    Each map is brought to the image's size, summed over the passes, normalised, searched. One map
    is held at full size at a time.

    Args:
        classifier: Any size of its input but less than one patch works.
        image: RGB uint8 [h, w, 3].
        class_ids: 0-based classes in the image; None: those with a logit above the threshold in the
            first pass.
        passes: Scales and mirror images.
        clustering: Settings of peaks and clusters.
        present_logit_thresh: For ``class_ids=None``.
    """
    size = (image.shape[0], image.shape[1])
    logits, maps = _all_passes(classifier, image, passes)
    if class_ids is None:
        class_ids = torch.nonzero(logits > present_logit_thresh).flatten().tolist()
    parts: list[PointPrompts] = []
    for source, of_pass in (
        (PromptSource.COARSE, [m.coarse for m in maps]),
        (PromptSource.FINE, [m.fine for m in maps]),
    ):
        for c in class_ids:
            summed = summed_map([m[c] for m in of_pass], size)
            parts.append(_cam_prompts(summed, c, source, clustering.cam_peaks))
    crosses = (
        summed_map([m.cross[head, c] for m in maps], size)
        for head in range(len(maps[0].cross))
        for c in class_ids
    )
    parts.append(_cross_prompts(crosses, clustering))
    return PointPrompts.concatenate(parts), tuple(class_ids)


def summed_maps(
    classifier: LoadedClassifier,
    image: NDArray[np.uint8],
    class_ids: Sequence[int],
    *,
    passes: MapPasses,
) -> ImageMaps:
    """The maps that ``peak_prompts`` searches, for people: the maximum over ``class_ids``, the mean
    over cross maps.
    """
    size = (image.shape[0], image.shape[1])
    _, maps = _all_passes(classifier, image, passes)
    coarse, fine, cross = (np.zeros(size, np.float32) for _ in range(3))
    for c in class_ids:
        coarse = np.maximum(coarse, summed_map([m.coarse[c] for m in maps], size))
        fine = np.maximum(fine, summed_map([m.fine[c] for m in maps], size))
        heads = [summed_map([m.cross[h, c] for m in maps], size) for h in range(len(maps[0].cross))]
        cross = np.maximum(cross, np.mean(heads, axis=0, dtype=np.float32))
    return ImageMaps(coarse=coarse, fine=fine, cross=cross)


def summed_map(maps: Sequence[Float[Tensor, "..."]], size: ImageSize) -> NDArray[np.float32]:
    """Maps [h, w] of several passes at ``size``, summed, then min-max normalised to [0, 1]."""
    total = torch.zeros(size)
    for one in maps:
        total += functional.interpolate(
            one[None, None], size=size, mode="bilinear", align_corners=False
        )[0, 0]
    return normalize_maps(total.numpy())


def _all_passes(
    classifier: LoadedClassifier, image: NDArray[np.uint8], passes: MapPasses
) -> tuple[Float[Tensor, " c"], list[PassMaps]]:
    """Logits of the first pass, and all maps."""
    served = classifier.served().eval()
    device = next(served.parameters()).device
    found: list[PassMaps] = []
    logits = None
    for scale in passes.scales:
        pixels = _scaled(image, scale, passes.longest_side, classifier.model.config.vit.patch_size)
        for is_mirrored in (False, True) if passes.flip else (False,):
            seen = np.ascontiguousarray(pixels[:, ::-1]) if is_mirrored else pixels
            with torch.inference_mode():
                answer = served.forward_normalized(
                    normalize_images(torch.from_numpy(seen)[None].to(device))
                )
            turned = [m[0].flip(-1) if is_mirrored else m[0] for m in answer[1:]]
            coarse, fine, cross = (m.float().cpu() for m in turned)
            found.append(PassMaps(coarse=coarse, fine=fine, cross=cross))
            logits = answer[0][0].float().cpu() if logits is None else logits
    assert logits is not None
    return logits, found


def _scaled(
    image: NDArray[np.uint8], scale: float, longest_side: int, patch_size: int
) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    scale *= min(1.0, longest_side / max(height, width))
    size = (max(patch_size, round(width * scale)), max(patch_size, round(height * scale)))
    if size == (width, height):
        return image
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _cam_prompts(
    values: NDArray[np.float32], class_id: int, source: PromptSource, config: PeakConfig
) -> PointPrompts:
    peaks = peak_points(values, config)
    num = len(peaks.points)
    return PointPrompts(
        points=peaks.points.astype(np.float32),
        scores=peaks.scores.astype(np.float32),
        class_ids=np.full(num, class_id, np.int32),
        sources=np.full(num, source, np.int32),
    )


def _cross_prompts(
    maps: Iterable[NDArray[np.float32]], clustering: ClusteringConfig
) -> PointPrompts:
    pooled = [peak_points(values, clustering.cross_peaks).points for values in maps]
    points = np.concatenate([np.zeros((0, 2), np.int64), *pooled])
    centres = cluster_prompts(points, clustering.points_per_cluster)
    return PointPrompts(
        points=centres.astype(np.float32),
        scores=np.ones(len(centres), np.float32),
        class_ids=np.full(len(centres), NO_CLASS, np.int32),
        sources=np.full(len(centres), PromptSource.CROSS, np.int32),
    )
