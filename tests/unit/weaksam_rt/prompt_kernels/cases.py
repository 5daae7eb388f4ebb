"""Random batches: smooth, noisy, full of plateaus, constant, broken; of every odd size."""

import numpy as np

from weaksam_rt.class_activation_map import PeakConfig
from weaksam_rt.preprocessing import longest_side_frame
from weaksam_rt.prompt_clustering import ClusteringConfig, MapBatch
from weaksam_rt.types import PromptSource

_KINDS = ("smooth", "smooth", "plateaus", "sparse", "constant", "zero", "nan", "inf", "huge")


def random_nodes(rng, shape, kind):
    values = rng.random(shape, dtype=np.float32)
    if kind == "plateaus":
        values = rng.choice(np.array([0, 0.5, 0.9, 0.95, 1], np.float32), shape)
    elif kind == "sparse":
        values = np.where(values > 0.9, values, np.float32(0))
    elif kind in ("constant", "zero"):
        values = np.full(shape, 3.7 if kind == "constant" else 0, np.float32)
    elif kind in ("nan", "inf"):
        broken = {"nan": np.nan, "inf": rng.choice([np.inf, -np.inf])}[kind]
        values.flat[rng.integers(values.size)] = broken
    elif kind == "huge":
        # Differences of these overflow, or nearly do.
        values = (values - np.float32(0.5)) * np.float32(rng.choice([3e38, 6e37]))
    return values


def random_rule(rng):
    return PeakConfig(
        kernel_size=int(rng.choice([1, 3, 5, 9, 17, 33, 129])),
        value_thresh=float(rng.choice([0.05, 0.5, 0.8, 0.9, 1.0])),
        max_candidates=int(rng.choice([1, 3, 25])),
        distance=str(rng.choice(["l1", "l2"])),
    )


def random_config(rng):
    return ClusteringConfig(
        cam_peaks=random_rule(rng),
        cross_peaks=random_rule(rng),
        points_per_cluster=int(rng.integers(1, 6)),
    )


def random_batch(rng, *, max_side=40, max_maps=24, kinds=_KINDS):
    """1 to 4 images with up to ``max_maps`` maps; some images have none."""
    num_images = int(rng.integers(1, 5))
    sizes = [tuple(int(s) for s in rng.integers(1, max_side, 2)) for _ in range(num_images)]
    shape = tuple(int(s) for s in rng.integers(1, 10, 2))
    if rng.random() < 0.2:
        # Nodes are the pixels themselves: any picture can be a map.
        shape = sizes[0] = tuple(int(s) for s in rng.integers(1, 20, 2))
    num_passes = int(rng.integers(1, 4))
    num_maps = int(rng.integers(1, max_maps + 1))
    images = np.sort(rng.integers(0, num_images, num_maps)).astype(np.int32)
    sources = rng.choice([PromptSource.COARSE, PromptSource.FINE, PromptSource.CROSS], num_maps)
    order = np.lexsort([sources, images])
    maps = np.stack(
        [random_nodes(rng, (num_passes, *shape), str(rng.choice(kinds))) for _ in range(num_maps)],
        axis=1,
    )
    return MapBatch(
        maps=np.ascontiguousarray(maps),
        map_images=images,
        map_sources=sources[order].astype(np.int32),
        map_classes=rng.permutation(num_maps).astype(np.int32),
        frames=tuple(longest_side_frame(size, 64) for size in sizes),
        mirrored_passes=tuple(p for p in range(num_passes) if rng.random() < 0.5),
    )
