"""The method's claims on generated scenes, each over several seeds.

``python -m benchmarks.scene_claims search|mil|labels|noise|report --help``. Every trial is a stage
below ``--output``: finished ones are skipped, so that an interrupted experiment goes on. ``report``
reads what is finished and writes ``benchmarks/results/scene_claims.md`` and ``.json``.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.progress import track
from scipy import stats

from benchmarks.label_noise import with_label_noise
from benchmarks.proposal_recall import first_proposals, selective_search
from training.data.coco import CocoFolder, load_coco_folder
from training.data.results import read_detections, read_proposals, write_detections, write_proposals
from training.detect import detect_folder
from training.engine.stage import MANIFEST_NAME, Stage, open_stage, read_manifest
from training.evaluate import evaluate, summary
from training.generate_pseudo_labels import (
    ANNOTATIONS_NAME,
    PseudoLabelRecipe,
    choose,
    coco_annotations,
    statistics,
)
from training.models.detector_adapter import DetectorAdapter
from training.models.wsod_trunks import load_trunk
from training.pseudo_labels.adaptive import AdaptiveConfig
from training.retrain_detector import DetectorRecipe, initial_model, train
from training.retraining.drop_truth import drop_report
from training.retraining.faster_rcnn import FasterRcnnConfig
from training.retraining.roi_drop import RoiDropConfig
from training.train_wsod import WsodRecipe, detect, load_samples
from training.train_wsod import train as train_wsod
from weaksam_rt.files import atomic_path, write_json
from weaksam_rt.types import Detections

_LOGGER = logging.getLogger(__name__)
_DETECTIONS_NAME = "detections.json"
_MIL_METHODS: tuple[Literal["oicr", "mist"], ...] = ("oicr", "mist")
_LABEL_METHODS: Mapping[str, PseudoLabelRecipe] = {
    "adaptive_0.3": PseudoLabelRecipe(),
    "top_1": PseudoLabelRecipe(method="top_1"),
    "threshold_0.2": PseudoLabelRecipe(method="threshold", fixed_thresh=0.2),
    "threshold_0.5": PseudoLabelRecipe(method="threshold", fixed_thresh=0.5),
    "adaptive_0.5": PseudoLabelRecipe(adaptive=AdaptiveConfig(score_thresh=0.5)),
}
_NOISE_SHARES = (0.0, 0.1, 0.2, 0.4)
_NEVER = 1e9
"""A loss that none reaches."""
_DROP_METHODS: Mapping[str, RoiDropConfig] = {
    "no_drop": RoiDropConfig(enabled=False),
    "drop": RoiDropConfig(),
    "drop_class": RoiDropConfig(regression_thresh=_NEVER),
    "drop_class_2": RoiDropConfig(classification_thresh=2.0, regression_thresh=_NEVER),
}
_COLUMNS = ("label", "num_seeds", "score", "difference", "verdict")
_FRAME_SIDE = 192
"""Side of the small detector's input: a third of the work of the 320 pixels elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What all trials share."""

    data: Path
    """Output of ``training.generate_scenes``."""
    output: Path
    """Gets one folder for each trial."""
    trunk_weights: Path
    """Pretrained SqueezeNet 1.0."""
    proposals: Path | None = None
    """Proposals of the training images (COCO results); for ``search`` and ``mil``."""
    proposals_name: str = "weaksam"
    """Names them in the report."""
    num_seeds: int = 5
    """Seeds 0 to this number less one."""
    num_images: int = 300
    """The detectors train on the first so many of the training images."""
    num_threads: int = 1
    """CPU threads of torch."""


def search(experiment: Experiment) -> None:
    """Selective Search's proposals for the training images, as many as ``--proposals`` has for each
    image; ``mil --proposals OUTPUT/selective_search.json --proposals-name selective_search`` learns
    on them.
    """
    folder = load_coco_folder(experiment.data / "train")
    ours = read_proposals(_proposals_of(experiment), folder=folder)
    found = {
        record.image_id: first_proposals(
            selective_search(record, WsodRecipe().min_side_px), len(ours[record.image_id])
        )
        for record in track(folder.records, description="Selective Search")
    }
    write_proposals(experiment.output / "selective_search.json", found)


def mil(experiment: Experiment) -> None:
    """Train OICR and MIST on the same proposals, all training images."""
    proposals = _proposals_of(experiment)
    folder = load_coco_folder(experiment.data / "train")
    trunk = load_trunk(WsodRecipe().model.trunk, experiment.trunk_weights)
    store = experiment.output / f"descriptions_{experiment.proposals_name}.bin"
    samples = load_samples(folder, proposals, trunk, WsodRecipe(), store=store)
    for seed in range(experiment.num_seeds):
        for method in _MIL_METHODS:
            recipe = WsodRecipe(method=method, epochs=12, seed=seed)
            name = f"{method}_{experiment.proposals_name}"
            stage = _open(experiment, "mil", name, seed, {"wsod": recipe})
            if stage.finished:
                continue
            head = train_wsod(stage, samples, recipe, num_classes=len(folder.class_names))
            found = {r.image_id: Detections.empty(r.image_size) for r in folder.records}
            found |= {s.record.image_id: detect(head, s, recipe) for s in samples}
            write_detections(stage.directory / _DETECTIONS_NAME, found, folder=folder)
            metrics = summary(evaluate(folder, found))
            _finish(stage, metrics, [_DETECTIONS_NAME])


def labels(experiment: Experiment) -> None:
    """Train a detector on pseudo boxes chosen in several ways from the same detections of OICR."""
    folder = load_coco_folder(experiment.data / "train")
    for name, choice in _LABEL_METHODS.items():
        for seed in range(experiment.num_seeds):
            source = _directory(experiment, "mil", f"oicr_{experiment.proposals_name}", seed)
            read_manifest(source)
            detections = read_detections(source / _DETECTIONS_NAME, folder=folder)
            recipe = small_detector(seed)
            stage = _open(experiment, "labels", name, seed, {"detector": recipe, "choice": choice})
            if stage.finished:
                continue
            chosen = choose(folder, detections, choice)
            annotations = stage.directory / ANNOTATIONS_NAME
            write_json(annotations, coco_annotations(folder.root, folder, chosen))
            quality = statistics(folder, chosen)["evaluation_only"]
            pseudo = load_coco_folder(folder.root, annotations=annotations)
            metrics = _train_and_evaluate(experiment, stage, _first(pseudo, experiment), recipe)
            kept = {key: quality[key] for key in ("precision_iou50", "recall_iou50")}
            _finish(stage, {**metrics, **kept})


def noise(
    experiment: Experiment,
    *,
    methods: tuple[str, ...] = ("no_drop", "drop"),
    shares: tuple[float, ...] = _NOISE_SHARES,
) -> None:
    """Train a detector with and without RoI drop on true boxes of which a known share is wrong.

    Args:
        experiment: What all trials share.
        methods: Of no_drop, drop, drop_class (no box loss is dropped), drop_class_2 (at 2, not 4).
        shares: Of the boxes, in [0, 1].
    """
    truth = _first(load_coco_folder(experiment.data / "train"), experiment)
    trials = [(share, method) for share in shares for method in methods]
    for seed in range(experiment.num_seeds):
        for share, method in trials:
            recipe = small_detector(seed, roi_drop=_DROP_METHODS[method])
            config = {"detector": recipe, "share": share}
            stage = _open(experiment, "noise", f"{method}_{share:.1f}", seed, config)
            if stage.finished:
                continue
            spoilt = with_label_noise(truth, share, seed)
            _finish(stage, _train_and_evaluate(experiment, stage, spoilt, recipe, truth=truth))


def small_detector(seed: int, *, roi_drop: RoiDropConfig | None = None) -> DetectorRecipe:
    """The detector of the recipes on a smaller input, with its anchors scaled alike."""
    full = FasterRcnnConfig()
    scale = _FRAME_SIDE / full.image_size
    anchors = tuple(tuple(round(side * scale) for side in level) for level in full.anchor_sizes)
    model = replace(full, image_size=_FRAME_SIDE, anchor_sizes=anchors, proposals_per_image=150)
    drop = RoiDropConfig() if roi_drop is None else roi_drop
    return DetectorRecipe(model=model, roi_drop=drop, epochs=6, warmup_steps=30, seed=seed)


def _train_and_evaluate(
    experiment: Experiment,
    stage: Stage,
    folder: CocoFolder,
    recipe: DetectorRecipe,
    *,
    truth: CocoFolder | None = None,
) -> dict[str, Any]:
    start = initial_model(recipe, folder.class_names, experiment.trunk_weights)
    model = train(stage, folder, recipe, start, truth=truth)
    val = load_coco_folder(experiment.data / "val", classes=folder.class_names)
    adapter = DetectorAdapter(model).eval()
    found = detect_folder(adapter, val, image_size=_FRAME_SIDE, config=recipe.detection)
    scores: dict[str, Any] = summary(evaluate(val, found))
    return {**scores, "roi_drop": drop_report(stage.metrics())}


def _proposals_of(experiment: Experiment) -> Path:
    if experiment.proposals is None:
        raise ValueError("proposals of the training images are needed here: give --proposals")
    return experiment.proposals


def _first(folder: CocoFolder, experiment: Experiment) -> CocoFolder:
    return replace(folder, records=folder.records[: experiment.num_images])


def _directory(experiment: Experiment, kind: str, variant: str, seed: int) -> Path:
    return experiment.output / kind / f"{variant}_s{seed}"


def _open(
    experiment: Experiment, kind: str, variant: str, seed: int, config: Mapping[str, Any]
) -> Stage:
    torch.set_num_threads(experiment.num_threads)
    inputs = {"data": experiment.data / "train", "trunk_weights": experiment.trunk_weights}
    if kind == "mil" and experiment.proposals is not None:
        inputs["proposals"] = experiment.proposals
    return open_stage(
        f"scene_claims {kind}",
        _directory(experiment, kind, variant, seed),
        config={
            "num_images": experiment.num_images,
            **{key: _plain(part) for key, part in config.items()},
        },
        inputs=inputs,
    )


def _plain(part: Any) -> Any:
    is_record = is_dataclass(part) and not isinstance(part, type)
    return asdict(part) if is_record else part


def _finish(stage: Stage, metrics: Mapping[str, Any], outputs: Sequence[str] = ()) -> None:
    _LOGGER.info("%s: AP50 %.3f", stage.directory.name, metrics["voc_ap50"])
    stage.finish(outputs=outputs, metrics=metrics)
    (stage.directory / "checkpoint.safetensors").unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One variant beside its reference, over the seeds that both have."""

    label: str
    kind: str
    variant: str
    reference: str | None
    """Variant to subtract; None for a reference itself."""


def report(
    output: Path, command: str, results: Path = Path("benchmarks/results"), key: str = "voc_ap50"
) -> None:
    """Write the tables of all finished trials.

    Args:
        output: Folder of the trials.
        command: How they were made, for the report.
        results: Gets ``scene_claims.md`` and ``.json``.
        key: The metric of a trial to compare.
    """
    sections = {
        title: [_row(output, comparison, key) for comparison in comparisons]
        for title, comparisons in _COMPARISONS.items()
    }
    lines = [
        "# The method's claims on generated scenes",
        "",
        f"`{command}`; trials at commit {', '.join(_commits(output))}. AP50 in percent: mean over "
        "the seeds and its 95 % interval (Student's t). Differences are paired by seed; a "
        "difference counts where its interval leaves out 0.",
    ]
    for title, rows in sections.items():
        done = [row for row in rows if row is not None]
        if not done:
            continue
        lines += [
            "",
            f"## {title}",
            "",
            "| | seeds | AP50 | difference | |",
            "| --- | ---: | ---: | ---: | --- |",
        ]
        lines += [f"| {' | '.join(str(row[column]) for column in _COLUMNS)} |" for row in done]
    with atomic_path(results / "scene_claims.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    write_json(results / "scene_claims.json", {"command": command, "sections": sections})


def _commits(output: Path) -> list[str]:
    manifests = output.glob(f"*/*/{MANIFEST_NAME}")
    found = {str(read_manifest(path.parent).get("commit", "unknown")) for path in manifests}
    return sorted(commit[:12] + "+changes" * commit.endswith("+changes") for commit in found)


def _row(output: Path, comparison: Comparison, key: str) -> dict[str, Any] | None:
    samples = scores_by_seed(output, comparison.kind, comparison.variant, key)
    if not samples:
        return None
    row: dict[str, Any] = {
        "label": comparison.label,
        "num_seeds": len(samples),
        "samples": samples,
        "score": interval_text(list(samples.values())),
        "difference": "",
        "verdict": "",
    }
    if comparison.reference is not None:
        reference = scores_by_seed(output, comparison.kind, comparison.reference, key)
        pairs = [samples[seed] - reference[seed] for seed in sorted(samples & reference.keys())]
        row |= {"difference": interval_text(pairs, signed=True), "verdict": verdict(pairs)}
    return row


def interval_95(samples: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval by Student's t; the half width of one sample is
    infinite.
    """
    mean = float(np.mean(samples))
    if len(samples) < 2:
        return mean, math.inf
    width = stats.t.ppf(0.975, len(samples) - 1) * stats.sem(samples)
    return mean, float(width)


def verdict(differences: Sequence[float]) -> str:
    """Whether paired differences are surely above 0, below, or neither."""
    mean, half_width = interval_95(differences)
    if abs(mean) <= half_width:
        return "undecided"
    return "better" if mean > 0 else "worse"


def interval_text(samples: Sequence[float], *, signed: bool = False) -> str:
    """Shares as percent: ``44.1 ± 0.6``."""
    mean, half_width = interval_95(samples)
    number = f"{100 * mean:+.1f}" if signed else f"{100 * mean:.1f}"
    return number if math.isinf(half_width) else f"{number} ± {100 * half_width:.1f}"


def scores_by_seed(output: Path, kind: str, variant: str, key: str) -> dict[int, float]:
    """One metric of the finished trials of a variant."""
    found = {}
    for directory in (output / kind).glob(f"{variant}_s*"):
        seed = directory.name.removeprefix(f"{variant}_s")
        if seed.isdigit() and (directory / MANIFEST_NAME).is_file():
            found[int(seed)] = float(read_manifest(directory)["metrics"][key])
    return found


_COMPARISONS: Mapping[str, Sequence[Comparison]] = {
    "Multiple-instance detectors, on the training images": [
        Comparison(label=label, kind="mil", variant=variant, reference=reference)
        for label, variant, reference in (
            ("OICR on WeakSAM's proposals", "oicr_weaksam", None),
            ("MIST on WeakSAM's proposals", "mist_weaksam", "oicr_weaksam"),
            ("OICR on Selective Search, as many", "oicr_selective_search", "oicr_weaksam"),
            ("MIST on Selective Search, as many", "mist_selective_search", "mist_weaksam"),
        )
    ],
    "Choice of pseudo boxes: the detector trained on them, held-out images": [
        Comparison(label=label, kind="labels", variant=variant, reference=reference)
        for label, variant, reference in (
            ("adaptive, 0.3", "adaptive_0.3", None),
            ("adaptive, 0.5", "adaptive_0.5", "adaptive_0.3"),
            ("best box of each tag", "top_1", "adaptive_0.3"),
            ("fixed threshold 0.2", "threshold_0.2", "adaptive_0.3"),
            ("fixed threshold 0.5", "threshold_0.5", "adaptive_0.3"),
        )
    ],
    "RoI drop on true boxes made wrong, held-out images": [
        Comparison(
            label=f"{label}, {share:.0%} of the boxes wrong",
            kind="noise",
            variant=f"{method}_{share:.1f}",
            reference=None if method == "no_drop" else f"no_drop_{share:.1f}",
        )
        for share in _NOISE_SHARES
        for method, label in (
            ("no_drop", "none"),
            ("drop", "RoI drop"),
            ("drop_class", "RoI drop, class losses alone"),
            ("drop_class_2", "RoI drop, class losses alone, above 2"),
        )
    ],
}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tyro.extras.subcommand_cli_from_dict(
        {"search": search, "mil": mil, "labels": labels, "noise": noise, "report": report}
    )
