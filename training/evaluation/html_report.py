"""One page with everything about one evaluation, for a browser without network: pictures are inside
the page, and it has no scripts.

Names of classes and files come from users; every text is escaped.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.evaluation.error_breakdown import CAUSES
from training.evaluation.examples import ImageQuality
from training.evaluation.pictures import Picture, draw_picture

_PICTURE_PX = 360
_MOST_CLASSES_OF_CONFUSION = 30
"""A larger matrix cannot be read."""
_HEADLINES = {
    "voc_ap50": "AP50, all points",
    "voc_ap50_11_point": "AP50, 11 points",
    "corloc": "CorLoc",
}
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body{{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:78rem;padding:0 1rem}}
table{{border-collapse:collapse;margin:.6rem 0 1.6rem}}
th,td{{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right}}
th:first-child,td:first-child,.text{{text-align:left}}
.bar{{display:inline-block;height:.7rem;background:#d65a31;vertical-align:middle}}
.pictures{{display:flex;flex-wrap:wrap;gap:1rem}}
figure{{margin:0;max-width:{picture_px}px}}figcaption{{font-size:.85rem;overflow-wrap:anywhere}}
img{{max-width:100%}}.scroll{{overflow-x:auto}}
</style></head><body>
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One picture of the page."""

    name: str
    """File name."""
    picture: Picture
    quality: ImageQuality


def html_page(
    report: Mapping[str, Any],
    *,
    title: str,
    class_names: Sequence[str],
    best: Sequence[Example],
    worst: Sequence[Example],
) -> str:
    """The page.

    Args:
        report: Of ``training.evaluate.evaluate``; its shares are shown in percent.
        title: Plain text.
        class_names: In the order of the labels.
        best: Images to show as the best, best first; may be empty.
        worst: Images to show as the worst, worst first; may be empty.
    """
    parts = [
        _HEAD.format(title=html.escape(title), picture_px=_PICTURE_PX),
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{report['num_images']} images. Figures in percent.</p>",
        *([] if not (note := note_on_truth(report)) else [f"<p>{note}</p>"]),
        _headline_table(report),
        "<h2>Classes</h2>",
        _class_table(report),
        *_mask_parts(report.get("masks")),
    ]
    if report["errors"]:
        parts += [
            "<h2>Errors</h2>",
            "<p>What is wrong with detections of any score, and by how much AP50 would rise "
            "without it.</p>",
            _error_table(report),
        ]
    if report["confusion"] and len(class_names) <= _MOST_CLASSES_OF_CONFUSION:
        parts += [
            "<h2>Confusion</h2>",
            "<p>Rows: what is there. Columns: what was found, by confident detections.</p>",
            _confusion_table(report, class_names),
        ]
    for heading, examples in (("Best images", best), ("Worst images", worst)):
        parts += [
            f"<h2>{heading}</h2>",
            "<p>White: true boxes. Coloured: confident detections.</p>" if examples else "None.",
            '<div class="pictures">',
            *(_figure(example, class_names) for example in examples),
            "</div>",
        ]
    return "\n".join([*parts, "</body></html>", ""])


def note_on_truth(report: Mapping[str, Any]) -> str:
    """What a reader must know where boxes of images are not known; empty where all are."""
    unknown = report["num_images_without_boxes"]
    if not unknown:
        return ""
    if unknown == report["num_images"]:
        return (
            "These images have tags and no boxes: whatever is measured by comparing boxes is left "
            "out."
        )
    return f"{unknown} images have tags and no boxes; no figure counts them."


def _headline_table(report: Mapping[str, Any]) -> str:
    rows = [[text, _percent(report[key])] for key, text in _HEADLINES.items()]
    rows += [[f"COCO {name}", _percent(value)] for name, value in report["coco"].items()]
    return _table(["measure", "value"], rows)


def _class_table(report: Mapping[str, Any]) -> str:
    header = ["class", "AP50", "AP50, 11 points", "COCO AP", "CorLoc", "true boxes", "detections"]
    rows = [
        [
            name,
            _percent(row["ap_all_point"]),
            _percent(row["ap_11_point"]),
            _percent(row["coco_ap"]),
            _percent(row["corloc"]),
            str(row["num_truth"]),
            str(row["num_detections"]),
        ]
        for name, row in report["by_class"].items()
    ]
    return _table(header, rows)


def _mask_parts(masks: Mapping[str, Any] | None) -> list[str]:
    if masks is None:
        return []
    names = [*masks["voc"]]
    rows = [
        [class_name, *(_percent(row[name]) for name in (*names, "coco_ap"))]
        for class_name, row in masks["by_class"].items()
    ]
    means = [*masks["voc"].values(), masks["coco"]["AP"]]
    rows.append(["mean", *map(_percent, means)])
    return [
        "<h2>Masks</h2>",
        "<p>Average precision where masks, not boxes, overlap by so much.</p>",
        _table(["class", *names, "COCO AP"], rows),
    ]


def _error_table(report: Mapping[str, Any]) -> str:
    header = "".join(f"<th>{text}</th>" for text in ("count", "AP50 gained", ""))
    lines = [f'<table><tr><th>error</th><th class="text">means</th>{header}</tr>']
    for name, error in report["errors"].items():
        gain = error["ap_gain"] or 0.0
        bar = f'<span class="bar" style="width:{max(0.0, gain) * 100:.1f}px"></span>'
        numbers = "".join(
            f"<td>{n}</td>" for n in (error["count"], _percent(error["ap_gain"]), bar)
        )
        means = f'<td class="text">{html.escape(CAUSES[name])}</td>'
        lines.append(f"<tr><td>{html.escape(name)}</td>{means}{numbers}</tr>")
    return "\n".join([*lines, "</table>"])


def _confusion_table(report: Mapping[str, Any], class_names: Sequence[str]) -> str:
    header = ["", *class_names, "nothing"]
    rows = [
        [name, *(str(count) for count in counts)]
        for name, counts in zip([*class_names, "nothing"], report["confusion"], strict=True)
    ]
    rows[-1][-1] = ""  # nothing found as nothing has no number
    return f'<div class="scroll">{_table(header, rows)}</div>'


def _figure(example: Example, class_names: Sequence[str]) -> str:
    image = draw_picture(example.picture, class_names=class_names, longest_px=_PICTURE_PX)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    quality, name = example.quality, html.escape(example.name)
    caption = (
        f"{name}: {quality.num_right} right, {quality.num_wrong} wrong, "
        f"{quality.num_missed} missed (F1 {_percent(quality.f1)})"
    )
    source = f"data:image/jpeg;base64,{data}"
    return f'<figure><img src="{source}" alt="{name}"><figcaption>{caption}</figcaption></figure>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    names = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    return "\n".join([f"<table><tr>{names}</tr>", *map(_row, rows), "</table>"])


def _row(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in cells)}</tr>"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
