"""Evaluate detections against a data set: ``python -m training.evaluate --help``.

Writes ``evaluation.json``, ``evaluation.md``, ``pictures.jpg`` and ``report.html``, one page that
needs no other file.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from training.data.bad_images import usable_images
from training.data.coco import CocoFolder, ImageRecord, load_coco_folder
from training.data.results import read_detections
from training.engine.stage import undefined_as_none
from training.evaluation.coco_ap import coco_ap
from training.evaluation.corloc import corloc
from training.evaluation.error_breakdown import confusion_matrix, error_breakdown
from training.evaluation.examples import choose_examples, image_quality
from training.evaluation.html_report import Example, html_page, note_on_truth
from training.evaluation.pictures import Picture, save_contact_sheet
from training.evaluation.voc_ap import voc_ap
from weaksam_rt.files import atomic_path, write_json
from weaksam_rt.types import Detections

_LOGGER = logging.getLogger(__name__)

MASK_IOU_THRESHOLDS = (0.25, 0.5, 0.7, 0.75)
"""At which average precision of masks is reported."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compare a COCO results file with the boxes of a data set, and with its masks where both have
    some.
    """

    data: Path
    """Folder with ``images/`` and ``instances.json``."""
    detections: Path
    """COCO results file of the same images."""
    output: Path
    """Folder for the report."""
    num_pictures: int = 25
    """Images on the contact sheet, spread evenly over the set."""
    picture_score_thresh: float = 0.3
    """Boxes below this score, in [0, 1], are not drawn, and do not count in the confusion matrix
    and in the choice of the best and worst images."""
    num_examples: int = 8
    """Best and worst images in the page, of each so many."""
    skip_bad: bool = False
    """Leave unreadable images out, with their objects."""


def evaluate(
    folder: CocoFolder, detections: Mapping[int, Detections], *, score_thresh: float = 0.3
) -> dict[str, Any]:
    """All metrics of ``detections`` on ``folder`` as JSON values, shares in [0, 1], None if
    undefined; only the confusion matrix leaves out detections below ``score_thresh``. ``masks`` is
    there where all detections and all records with objects have masks.

    Images with tags and no boxes count nowhere. Without any true box, shares are None, ``errors``
    is empty and ``confusion`` None.
    """
    judged = replace(folder, records=tuple(r for r in folder.records if r.has_known_boxes))
    num_images, num_judged = len(folder.records), len(judged.records)
    has_truth = any((~record.is_crowd).any() for record in judged.records)
    if has_truth:  # else nothing is compared, and detections are counted on all images
        ids = {record.image_id for record in judged.records}
        folder = judged
        detections = {i: found for i, found in detections.items() if i in ids}
    ap, correct = voc_ap(folder, detections), corloc(folder, detections)
    coco = coco_ap(folder, detections)
    by_class = {
        name: {**asdict(class_ap), "corloc": class_corloc, "coco_ap": class_coco}
        for name, class_ap, class_corloc, class_coco in zip(
            folder.class_names, ap.by_class, correct.by_class, coco.by_class, strict=True
        )
    }
    report = {
        "num_images": num_images,
        "num_images_without_boxes": num_images - num_judged,
        "voc_ap50_11_point": ap.mean_11_point,
        "voc_ap50": ap.mean_all_point,
        "corloc": correct.mean,
        "coco": dict(coco.summary),
        "by_class": by_class,
        "errors": {},
        "confusion": None,
    }
    if has_truth:
        errors = error_breakdown(folder, detections).errors
        report["errors"] = {name: asdict(error) for name, error in errors.items()}
        matrix = confusion_matrix(folder, detections, score_thresh=score_thresh)
        report["confusion"] = matrix.tolist()
    if _have_masks(folder, detections):
        report["masks"] = evaluate_masks(folder, detections)
    defined: dict[str, Any] = undefined_as_none(report)
    return defined


def evaluate_masks(folder: CocoFolder, detections: Mapping[int, Detections]) -> dict[str, Any]:
    """Average precision by the overlap of masks: VOC's at ``MASK_IOU_THRESHOLDS``, and COCO's.

    Raises:
        ValueError: A record or a detection has no mask.

    Source:
        The thresholds are those of weakly-supervised instance segmentation on VOC 2012; WeakSAM
        (arXiv:2402.14812) evaluates by COCO's curve, here it is VOC's (all points).
    """
    by_thresh = {
        _name_of_thresh(thresh): voc_ap(folder, detections, iou_thresh=thresh, shape="mask")
        for thresh in MASK_IOU_THRESHOLDS
    }
    coco = coco_ap(folder, detections, shape="mask")
    return {
        "voc": {name: ap.mean_all_point for name, ap in by_thresh.items()},
        "coco": dict(coco.summary),
        "by_class": {
            class_name: {
                **{name: ap.by_class[label].ap_all_point for name, ap in by_thresh.items()},
                "coco_ap": coco.by_class[label],
            }
            for label, class_name in enumerate(folder.class_names)
        },
    }


def summary(report: Mapping[str, Any]) -> dict[str, float | None]:
    """The headline figures of ``evaluate``, for a manifest; those of masks where it has some."""
    masks = report.get("masks")
    of_masks = {}
    if masks is not None:
        of_masks = {f"mask_{name.lower()}": value for name, value in masks["voc"].items()}
        of_masks["mask_coco_ap"] = masks["coco"]["AP"]
    return {
        **of_masks,
        "voc_ap50": report["voc_ap50"],
        "voc_ap50_11_point": report["voc_ap50_11_point"],
        "corloc": report["corloc"],
        "coco_ap": report["coco"]["AP"],
    }


def markdown(report: Mapping[str, Any], *, title: str) -> str:
    """``evaluate``'s figures as a Markdown page, in percent."""
    lines = [
        f"# {title}",
        "",
        f"{report['num_images']} images. All figures in percent. {note_on_truth(report)}".rstrip(),
        "",
        "| class | AP50 | AP50 (11 points) | COCO AP | CorLoc | true boxes | detections |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for name, row in report["by_class"].items():
        lines.append(
            f"| {name} | {_percent(row['ap_all_point'])} | {_percent(row['ap_11_point'])} "
            f"| {_percent(row['coco_ap'])} | {_percent(row['corloc'])} | {row['num_truth']} "
            f"| {row['num_detections']} |"
        )
    lines.append(
        f"| **mean** | **{_percent(report['voc_ap50'])}** "
        f"| **{_percent(report['voc_ap50_11_point'])}** | **{_percent(report['coco']['AP'])}** "
        f"| **{_percent(report['corloc'])}** | | |"
    )
    coco = ", ".join(f"{name} {_percent(value)}" for name, value in report["coco"].items())
    errors = [
        f"| {name} | {error['count']} | {_percent(error['ap_gain'])} |"
        for name, error in report["errors"].items()
    ]
    if errors:
        errors = ["| error | count | AP50 gained without it |", "| --- | --: | --: |", *errors]
    masks = _mask_lines(report["masks"]) if "masks" in report else []
    return "\n".join([*lines, "", f"COCO: {coco}.", "", *masks, *errors, ""])


def _mask_lines(masks: Mapping[str, Any]) -> list[str]:
    names = [*masks["voc"]]
    rows = [
        f"| {class_name} | {' | '.join(_percent(row[name]) for name in (*names, 'coco_ap'))} |"
        for class_name, row in masks["by_class"].items()
    ]
    means = [*masks["voc"].values(), masks["coco"]["AP"]]
    return [
        f"| class, by masks | {' | '.join(names)} | COCO AP |",
        f"| --- |{' --: |' * (len(names) + 1)}",
        *rows,
        f"| **mean** | {' | '.join(f'**{_percent(value)}**' for value in means)} |",
        "",
    ]


def write_report(
    output: Path,
    folder: CocoFolder,
    detections: Mapping[int, Detections],
    *,
    num_pictures: int = 25,
    picture_score_thresh: float = 0.3,
    num_examples: int = 8,
) -> dict[str, Any]:
    """Write the four files of a report into ``output``; gives back ``evaluate``'s figures."""
    report = evaluate(folder, detections, score_thresh=picture_score_thresh)
    if note := note_on_truth(report):
        _LOGGER.warning("%s: %s", folder.root, note)
    write_json(output / "evaluation.json", report)
    with atomic_path(output / "evaluation.md") as temporary:
        temporary.write_text(markdown(report, title=f"Detections on {folder.root.name}"))
    chosen = np.unique(
        np.linspace(0, len(folder.records) - 1, num_pictures).round().astype(int)
    ) if folder.records else []  # fmt: skip
    pictures = [
        _picture(folder.records[index], detections, picture_score_thresh) for index in chosen
    ]
    save_contact_sheet(output / "pictures.jpg", pictures, class_names=folder.class_names)
    examples = choose_examples(
        folder, detections, count=num_examples, score_thresh=picture_score_thresh
    )
    page = html_page(
        report,
        title=f"Detections on {folder.root.name}",
        class_names=folder.class_names,
        best=[_example(folder.records[i], detections, picture_score_thresh) for i in examples.best],
        worst=[
            _example(folder.records[i], detections, picture_score_thresh) for i in examples.worst
        ],
    )
    with atomic_path(output / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return report


def main(config: EvaluateConfig) -> None:
    """Run the command."""
    loaded = load_coco_folder(config.data)
    report = write_report(
        config.output,
        usable_images(loaded, skip_bad=config.skip_bad).folder,
        read_detections(config.detections, folder=loaded),
        num_pictures=config.num_pictures,
        picture_score_thresh=config.picture_score_thresh,
        num_examples=config.num_examples,
    )
    _LOGGER.info("\n%s", markdown(report, title=f"{config.detections} on {config.data}"))


def _picture(
    record: ImageRecord, detections: Mapping[int, Detections], score_thresh: float
) -> Picture:
    found = detections.get(record.image_id, Detections.empty(record.image_size))
    return Picture(
        image=record.image(),
        detections=found.take(found.scores >= score_thresh),
        truth_boxes=record.boxes,
    )


def _example(
    record: ImageRecord, detections: Mapping[int, Detections], score_thresh: float
) -> Example:
    picture = _picture(record, detections, score_thresh)
    quality = image_quality(record, picture.detections, score_thresh=score_thresh)
    return Example(name=record.path.name, picture=picture, quality=quality)


def _have_masks(folder: CocoFolder, detections: Mapping[int, Detections]) -> bool:
    objects = [record for record in folder.records if len(record.boxes)]
    found = [of_image for of_image in detections.values() if len(of_image)]
    return (
        all(record.has_masks for record in objects)
        and all(of_image.masks is not None for of_image in found)
        and bool(objects and found)
    )


def _name_of_thresh(thresh: float) -> str:
    return f"AP{round(100 * thresh)}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(tyro.cli(EvaluateConfig, description=__doc__))
