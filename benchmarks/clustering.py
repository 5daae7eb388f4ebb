"""How tight the deterministic k-means is, beside scikit-learn's with 10 random starts.

Run ``python -m benchmarks.clustering --images FOLDER``. Three kinds of points: peaks of the demo
classifier's attention maps on photographs (of the 1, 2 and 4 most likely classes), generated ones
that imitate them (a few parts of objects that several maps agree on, and strays), and uniform ones,
which have no clusters to find. k is n // 5 throughout.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from sklearn.cluster import KMeans

from benchmarks.entry import enter
from training.engine.stage import git_commit
from weaksam_rt.artifacts import load_artifact
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.class_activation_map import CROSS_PEAKS
from weaksam_rt.files import atomic_path
from weaksam_rt.images import decode_image
from weaksam_rt.preprocessing import resize_to_square, sum_over_flip
from weaksam_rt.prompt_clustering import cluster_prompts
from weaksam_rt.prompt_clustering._low_res_peaks import low_res_peaks
from weaksam_rt.prompt_clustering._reference import _farthest_seeds

Points = NDArray[np.int64]
POINTS_PER_CLUSTER = 5
_CLASSIFIER = Path("assets/demo_models/vit_classifier")


def attention_peaks(images: Sequence[Path], num_classes: Sequence[int]) -> Iterator[Points]:
    """Pooled cross-attention peaks of each image, for so many of its most likely classes.

    Args:
        images: Photographs.
        num_classes: How many classes count as present; one result for each number.
    """
    classifier = OnnxRuntimeModel(load_artifact(_CLASSIFIER), num_threads=1)
    side = classifier.contract.inputs[0].shape[0]
    for path in images:
        image = decode_image(path.read_bytes())
        pixels = resize_to_square(image, side)
        answer = classifier({"image": np.stack([pixels, pixels[:, ::-1]])})
        order = np.argsort(-answer["logits"][0], kind="stable")
        maps = sum_over_flip(answer["cross_maps"])
        for count in num_classes:
            nodes = np.ascontiguousarray(maps[:, order[:count]].reshape(-1, *maps.shape[-2:]))
            size = image.shape[0], image.shape[1]
            yield np.concatenate([p.points for p in low_res_peaks(nodes, size, CROSS_PEAKS)])


def imitated_peaks(rng: np.random.Generator) -> Points:
    """Peaks of 12, 24 or 60 maps on 375x500 pixels: 70 % near one of 2 to 6 parts."""
    size = np.array([500, 375])
    parts = rng.integers(30, size - 30, (int(rng.integers(2, 7)), 2))
    num_maps = int(rng.choice([12, 24, 60]))
    count = int(rng.integers(1, 4, num_maps).sum())
    near = parts[rng.integers(0, len(parts), count)] + rng.normal(0, 18, (count, 2))
    stray = rng.integers(0, size, (count, 2))
    points = np.where(rng.random((count, 1)) < 0.7, near, stray)
    return points.clip(0, size - 1).astype(np.int64)


def uniform_points(rng: np.random.Generator) -> Points:
    """40 points anywhere."""
    return rng.integers(0, 400, (40, 2))


def inertia_ratio(points: Points) -> float:
    """Our sum of squared distances to the clusters' means over scikit-learn's."""
    ours = cluster_prompts(points, POINTS_PER_CLUSTER)
    nearest = np.square(points[:, None] - ours[None]).sum(axis=2).argmin(axis=1)
    theirs = KMeans(len(ours), random_state=0, n_init=10).fit(points).labels_
    return (_inertia(points, nearest) + 1e-9) / (_inertia(points, theirs) + 1e-9)


def single_start_ratio(points: Points) -> float:
    """The same for one start only: farthest points, from the one nearest to the mean."""
    num_clusters = len(cluster_prompts(points, POINTS_PER_CLUSTER))
    distances = np.square(points[:, None] - points[None]).sum(axis=2).astype(np.float64)
    first = int(np.square(points - points.mean(axis=0)).sum(axis=1).argmin())
    centres = points[_farthest_seeds(distances, first, num_clusters)].astype(np.float64)
    ours = KMeans(num_clusters, init=centres, n_init=1, tol=0).fit(points).labels_
    theirs = KMeans(num_clusters, random_state=0, n_init=10).fit(points).labels_
    return (_inertia(points, ours) + 1e-9) / (_inertia(points, theirs) + 1e-9)


def _inertia(points: Points, labels: NDArray[np.integer[Any]]) -> float:
    groups = [points[labels == label] for label in np.unique(labels)]
    return float(sum(np.square(g - g.mean(axis=0)).sum() for g in groups))


def _line(kind: str, sets: Sequence[Points]) -> str:
    ratios = np.array([inertia_ratio(points) for points in sets])
    sizes = [len(points) for points in sets]
    return (
        f"| {kind} | {len(sets)} | {min(sizes)} to {max(sizes)} | {ratios.mean():.4f} | "
        f"{np.median(ratios):.4f} | {np.percentile(ratios, 90):.3f} | {ratios.max():.3f} | "
        f"{100 * np.mean(ratios <= 1.02):.0f} % | {np.mean([*map(single_start_ratio, sets)]):.3f} |"
    )


def main(images: Path, num_images: int = 120, output: Path | None = None) -> None:
    """Print a table; with ``output``, also write it.

    Args:
        images: Folder of photographs.
        num_images: So many of them, evenly spaced by name.
        output: Markdown file.
    """
    paths = sorted(p for p in images.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    chosen = paths[:: max(1, len(paths) // num_images)][:num_images]
    rng = np.random.default_rng(0)
    # Below 10 points there is one cluster, and one answer.
    real = [points for points in attention_peaks(chosen, (1, 2, 4)) if len(points) >= 10]
    lines = [
        "# k-means without random numbers beside scikit-learn's",
        "",
        f"`python -m benchmarks.clustering --images FOLDER`, commit {git_commit()[:12]}; "
        f"{len(chosen)} images of `{images.parent.parent.name}/{images.parent.name}`. Inertia of "
        "ours over that of `KMeans(n_init=10, random_state=0)`, k = n // 5.",
        "",
        "| points | sets | n | mean | median | 90 % | worst | within 2 % | "
        "one farthest-point start, mean |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        _line("peaks of attention maps", real),
        _line("imitated peaks", [imitated_peaks(rng) for _ in range(100)]),
        _line("uniform", [uniform_points(rng) for _ in range(100)]),
    ]
    text = "\n".join(lines) + "\n"
    Console(width=200).print(text, markup=False)
    if output is not None:
        with atomic_path(output) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    enter(main)
