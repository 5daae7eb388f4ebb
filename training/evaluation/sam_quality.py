"""How good a SAM's masks are: ``python -m training.evaluation.sam_quality --help``.

Every object gets one centre point and one box as prompts; masks are compared with the truth at the
image's own resolution, by the runtime's own functions. Two baselines that need no model stand
beside: a disc of the usual size at the point, and the filled box.
"""

import dataclasses
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.progress import track
from segment_anything.modeling import Sam

from training.data.coco import CocoFolder, ImageRecord, load_coco_folder
from training.data.prompt_samples import most_interior_point
from training.engine.stage import git_commit
from training.models.sam import load_sam
from training.models.sam_adapters import SamImageEncoderAdapter, SamMaskDecoderAdapter
from weaksam_rt.files import atomic_path, sha256_of_file, write_json
from weaksam_rt.masks import image_logits, mask_to_box
from weaksam_rt.preprocessing import resize_longest_side

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SamQualityConfig:
    """Measure the masks of a SAM from point and box prompts."""

    weights: Path
    """A ``sam.safetensors`` of ``training.train_sam``, or an official checkpoint."""
    data: tuple[Path, ...]
    """Validation folders with masks; the baseline's disc is measured on ``train`` beside each."""
    output: Path = Path("benchmarks/results/sam_quality")
    """Report without its endings; ``.md`` and ``.json`` are written."""
    max_images: int | None = None
    """Images per data set, spread evenly over it; all where not given."""
    max_instances: int = 8
    """Objects per image, chosen at random where there are more."""
    seed: int = 0
    """Of this choice."""
    num_threads: int = 2
    """CPU threads of torch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptedIou:
    """IoU of each object's masks with the truth, in [0, 1]; all [n]."""

    single: NDArray[np.float64]
    """The single-mask output."""
    chosen: NDArray[np.float64]
    """The multimask output with the highest predicted IoU."""
    best: NDArray[np.float64]
    """The multimask output with the highest true IoU: what a perfect choice would give."""
    baseline: NDArray[np.float64]
    """What needs no model."""


def evaluate_folder(
    sam: Sam, folder: CocoFolder, disc_radius: float, config: SamQualityConfig
) -> dict[str, PromptedIou]:
    """IoU of all (chosen) objects of a data set, by prompt: ``point`` and ``box``.

    Args:
        sam: In evaluation mode.
        folder: With masks.
        disc_radius: Of the point's baseline, as a share of an image's longest side.
        config: Number of objects per image and seed.
    """
    encoder, decoder = SamImageEncoderAdapter(sam), SamMaskDecoderAdapter(sam)
    rows = []
    for record in track(folder.records, description=str(folder.root)):
        truth = _some_masks(record, config)
        if len(truth):
            rows.append(_evaluate_image(encoder, decoder, record, truth, disc_radius))
    names = [f.name for f in dataclasses.fields(PromptedIou)]
    return {
        prompt: PromptedIou(
            **{n: np.concatenate([getattr(row[prompt], n) for row in rows]) for n in names}
        )
        for prompt in ("point", "box")
    }


def median_radius(folder: CocoFolder) -> float:
    """Median over objects of the radius of the disc of equal area, by the image's longest side."""
    shares = [
        np.sqrt(mask.sum() / np.pi) / max(record.image_size)
        for record in folder.records
        for mask in record.masks()[~record.is_crowd]
    ]
    return float(np.median(shares))


def disc(
    image_size: tuple[int, int], centre: NDArray[np.float32], radius: float
) -> NDArray[np.bool_]:
    """Pixels within ``radius`` of ``centre`` (x, y), [h, w]."""
    y, x = np.ogrid[: image_size[0], : image_size[1]]
    inside: NDArray[np.bool_] = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2
    return inside


def filled_box(image_size: tuple[int, int], box: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The pixels of an XYXY ``box`` on pixel borders, [h, w]."""
    mask = np.zeros(image_size, dtype=bool)
    left, top, right, bottom = box.astype(int)
    mask[top:bottom, left:right] = True
    return mask


def mask_iou(masks: NDArray[np.bool_], truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """IoU over the last two axes, in [0, 1]; 0 for two empty masks."""
    intersection = (masks & truth).sum(axis=(-2, -1))
    union = (masks | truth).sum(axis=(-2, -1))
    return np.asarray(intersection / np.maximum(union, 1))


def report(
    results: Mapping[str, Mapping[str, PromptedIou]], *, command: str, facts: Mapping[str, str]
) -> str:
    """The results as Markdown: one row per data set and prompt, mean IoU in percent."""
    lines = [
        "# Quality of SAM's masks",
        "",
        f"`{command}`",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        "Mean IoU in percent at the image's resolution. *Self-chosen*: the multimask output with",
        "the highest predicted IoU; *best*: with the highest true IoU; *single*: the single-mask",
        "output. Baselines: a disc of the training split's median size at the point; the filled",
        "box. A point is the most interior pixel of the object, a box its tight box.",
        "",
        "| data | objects | prompt | self-chosen | best | single | baseline |",
        "|---|---|---|---|---|---|---|",
    ]
    for data, by_prompt in results.items():
        for prompt, iou in by_prompt.items():
            cells = (iou.chosen, iou.best, iou.single, iou.baseline)
            figures = " | ".join(f"{100 * cell.mean():.1f}" for cell in cells)
            lines.append(f"| {data} | {len(iou.best)} | {prompt} | {figures} |")
    return "\n".join(lines) + "\n"


def main(config: SamQualityConfig) -> None:
    """Measure and write the report."""
    torch.set_num_threads(config.num_threads)
    sam = load_sam(config.weights)
    results = {}
    for path in config.data:
        radius = median_radius(_spread(load_coco_folder(path.parent / "train"), config.max_images))
        name = f"{path.parent.name}/{path.name}"
        folder = _spread(load_coco_folder(path), config.max_images)
        results[name] = evaluate_folder(sam, folder, radius, config)
        _LOGGER.info("%s: %s", name, _means({name: results[name]})[name])
    facts = {
        "weights": f"{config.weights.name}, SHA-256 {sha256_of_file(config.weights)[:16]}",
        "commit": git_commit(),
        "images per data set": "all"
        if config.max_images is None
        else f"at most {config.max_images}, spread evenly",
        "objects per image": f"at most {config.max_instances}, chosen with seed {config.seed}",
    }
    command = shlex.join(["python", "-m", "training.evaluation.sam_quality", *sys.argv[1:]])
    with atomic_path(config.output.with_suffix(".md")) as temporary:
        temporary.write_text(report(results, command=command, facts=facts))
    write_json(
        config.output.with_suffix(".json"),
        {"command": command, **facts, "mean_iou": _means(results)},
    )
    _LOGGER.info("written to %s.md and .json", config.output)


def _evaluate_image(
    encoder: SamImageEncoderAdapter,
    decoder: SamMaskDecoderAdapter,
    record: ImageRecord,
    truth: NDArray[np.bool_],
    disc_radius: float,
) -> dict[str, PromptedIou]:
    padded, frame = resize_longest_side(record.image(), encoder.image_encoder.img_size)
    points = np.stack([most_interior_point(mask) for mask in truth])
    boxes = mask_to_box(truth)
    coords = np.concatenate(
        [
            np.stack([frame.to_model(points), np.zeros_like(points)], axis=1),
            frame.to_model(boxes).reshape(-1, 2, 2),
        ]
    )
    labels = np.repeat(np.array([[1, -1], [2, 3]], dtype=np.int32), len(truth), axis=0)
    with torch.no_grad():
        embeddings = encoder(
            torch.from_numpy(padded)[None],
            torch.tensor([frame.valid_size], dtype=torch.int32),
        )
        prediction = decoder(
            embeddings,
            torch.zeros(len(coords), dtype=torch.int32),
            torch.from_numpy(coords),
            torch.from_numpy(labels),
        )
    scores = prediction.iou_predictions.numpy()
    iou = np.stack(
        [
            mask_iou(image_logits(logits, frame) > 0, truth[i % len(truth)])
            for i, logits in enumerate(prediction.low_res_logits.numpy())
        ]
    )  # [2n, 4]
    size = record.image_size
    radius = disc_radius * max(size)
    baselines = {
        "point": [mask_iou(disc(size, p, radius), m) for p, m in zip(points, truth, strict=True)],
        "box": [mask_iou(filled_box(size, b), m) for b, m in zip(boxes, truth, strict=True)],
    }
    return {
        prompt: _prompted(iou[rows], scores[rows], baselines[prompt])
        for prompt, rows in (
            ("point", slice(None, len(truth))),
            ("box", slice(len(truth), None)),
        )
    }


def _prompted(
    iou: NDArray[np.float64], scores: NDArray[np.float32], baseline: Sequence[Any]
) -> PromptedIou:
    chosen = 1 + scores[:, 1:].argmax(axis=1)
    return PromptedIou(
        single=iou[:, 0],
        chosen=iou[np.arange(len(iou)), chosen],
        best=iou[:, 1:].max(axis=1),
        baseline=np.array(baseline, dtype=np.float64),
    )


def _spread(folder: CocoFolder, max_images: int | None) -> CocoFolder:
    """``folder`` with at most ``max_images`` records, evenly spaced."""
    if max_images is None or len(folder.records) <= max_images:
        return folder
    chosen = np.linspace(0, len(folder.records) - 1, max_images).round().astype(int)
    return dataclasses.replace(folder, records=tuple(folder.records[i] for i in chosen))


def _some_masks(record: ImageRecord, config: SamQualityConfig) -> NDArray[np.bool_]:
    masks = record.masks()[~record.is_crowd]
    masks = masks[masks.any(axis=(1, 2))]
    if len(masks) <= config.max_instances:
        return masks
    generator = np.random.default_rng([config.seed, record.image_id])
    return masks[generator.choice(len(masks), config.max_instances, replace=False)]


def _means(results: Mapping[str, Mapping[str, PromptedIou]]) -> dict[str, Any]:
    return {
        data: {
            prompt: {
                "objects": len(iou.best),
                **{k: round(float(v.mean()), 4) for k, v in dataclasses.asdict(iou).items()},
            }
            for prompt, iou in by_prompt.items()
        }
        for data, by_prompt in results.items()
    }


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    main(tyro.cli(SamQualityConfig))
