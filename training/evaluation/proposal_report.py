"""One page that shows where proposals come from: maps, peaks, prompts, masks and boxes of a few
images, for a browser without network.

Names of classes and files come from users; every text is escaped.
"""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from training.data.coco import CocoFolder, ImageRecord
from training.data.proposal_shards import ImagePart
from weaksam_rt.boxes import box_iou
from weaksam_rt.files import atomic_path
from weaksam_rt.types import ImageSize, PointPrompts, PromptSource

_COLOURS = {
    PromptSource.GRID: (160, 160, 160),
    PromptSource.COARSE: (0, 190, 255),
    PromptSource.FINE: (255, 64, 129),
    PromptSource.CROSS: (255, 200, 0),
}
_TRUTH = (255, 255, 255)
_PANEL_PX = 300
_MOST_MASKS = 16
"""Masks in one picture; more cannot be told apart."""
_THRESHOLDS = (0.5, 0.75)
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Proposals</title>
<style>
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:82rem;padding:0 1rem}
table{border-collapse:collapse;margin:.6rem 0 1.6rem}
th,td{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right}
th:first-child,td:first-child{text-align:left}
.row{display:flex;flex-wrap:wrap;gap:.7rem;margin-bottom:1.6rem}
figure{margin:0;max-width:300px}figcaption{font-size:.8rem;color:#555}
img{display:block;max-width:100%}h3{margin:.4rem 0;overflow-wrap:anywhere}
.k{display:inline-block;width:.8rem;height:.8rem;margin:0 .3rem 0 1rem}
</style></head><body>
<h1>Where the proposals come from</h1>
"""


@dataclass(frozen=True, kw_only=True)
class ImageMaps:
    """What was searched for peaks in one image, [h, w] at its size in [0, 1]: the maximum over the
    used classes.
    """

    coarse: NDArray[np.float32]
    fine: NDArray[np.float32]
    cross: NDArray[np.float32]
    """The mean over layers and heads, which are searched one by one."""


@dataclass(frozen=True, kw_only=True)
class ImageEvidence:
    """Everything the page shows of one image."""

    record: ImageRecord
    image: NDArray[np.uint8]
    part: ImagePart
    maps: ImageMaps
    masks: NDArray[np.bool_]
    """[n, h, w], a mask of each of the first prompts from maps, in their order."""


def write_page(path: Path, folder: CocoFolder, sample: Sequence[ImageEvidence]) -> None:
    """Write the page, atomically.

    Args:
        path: An ``.html`` file; pictures are inside it.
        folder: The data set; its boxes are drawn and counted, nothing is learnt from them.
        sample: The images to show, in order; may be empty.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(html_page(folder, sample), encoding="utf-8")


def html_page(folder: CocoFolder, sample: Sequence[ImageEvidence]) -> str:
    """The page as text."""
    keys = "".join(
        f'<span class="k" style="background:rgb{colour}"></span>{source.name.lower()}'
        for source, colour in _COLOURS.items()
    )
    lines = [
        _HEAD,
        f"<p>{len(sample)} images of {html.escape(folder.root.name)}. Colours:{keys}. True boxes "
        "are white; they are for evaluation only.</p>",
        "" if _has_boxes(sample) else "<p>No true boxes are known here.</p>",
        _summary_table(sample),
    ]
    for evidence in sample:
        lines += [
            f"<h3>{html.escape(evidence.record.path.name)}</h3>",
            f"<p>{_caption(evidence, folder)}</p>",
            f'<div class="row">{_figures(evidence)}</div>',
        ]
    return "\n".join([*lines, "</body></html>", ""])


def most_masks(prompts: PointPrompts) -> PointPrompts:
    """The prompts whose masks are shown: the first of each class and source in turn, so that none
    is left out for another's many.
    """
    groups: dict[tuple[int, int], int] = {}
    turns = []
    for source, class_id in zip(prompts.sources.tolist(), prompts.class_ids.tolist(), strict=True):
        turns.append(groups.get((source, class_id), 0))
        groups[source, class_id] = turns[-1] + 1
    order = np.argsort(np.array(turns, np.int64), kind="stable")[:_MOST_MASKS]
    return prompts.subset(np.sort(order))


def coverage(evidence: Sequence[ImageEvidence], source: PromptSource | None) -> dict[float, float]:
    """Share of the true boxes with a proposal of ``source`` (None: of any) at each IoU; nan without
    true boxes.
    """
    best = [np.zeros(0, np.float32)]
    for one in evidence:
        proposals = one.part.proposals
        chosen = np.ones(len(proposals), bool) if source is None else proposals.sources == source
        overlap = box_iou(one.record.boxes[~one.record.is_crowd], proposals.boxes[chosen])
        best.append(overlap.max(axis=1, initial=0.0))
    found = np.concatenate(best)
    return {t: float((found >= t).mean()) if len(found) else float("nan") for t in _THRESHOLDS}


def _has_boxes(sample: Sequence[ImageEvidence]) -> bool:
    return any(len(evidence.record.boxes) for evidence in sample)


def _summary_table(sample: Sequence[ImageEvidence]) -> str:
    header = "".join(
        f"<th>{text}</th>"
        for text in (
            "source",
            "prompts from maps",
            "proposals",
            *(f"true boxes at {t}" for t in _THRESHOLDS),
        )
    )
    rows = [_summary_row(source.name.lower(), sample, source) for source in PromptSource]
    return "\n".join(
        ["<table><tr>", header, "</tr>", *rows, _summary_row("all", sample, None), "</table>"]
    )


def _summary_row(name: str, sample: Sequence[ImageEvidence], source: PromptSource | None) -> str:
    """Numbers per image; each source as if it were alone."""
    num = max(1, len(sample))
    prompts = _count([e.part.prompts.sources for e in sample], source) / num
    proposals = _count([e.part.proposals.sources for e in sample], source) / num
    counts = ["" if source is PromptSource.GRID else f"{prompts:.1f}", f"{proposals:.1f}"]
    shares = [
        "-" if math.isnan(share) else f"{100 * share:.0f} %"
        for share in coverage(sample, source).values()
    ]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in (name, *counts, *shares))}</tr>"


def _count(sources: Sequence[NDArray[np.int32]], source: PromptSource | None) -> int:
    return sum(len(s) if source is None else int(np.count_nonzero(s == source)) for s in sources)


def _caption(evidence: ImageEvidence, folder: CocoFolder) -> str:
    truth = ", ".join(folder.class_names[tag] for tag in evidence.record.tags)
    used = ", ".join(evidence.part.used_tags) or "none"
    counts = ", ".join(
        f"{np.count_nonzero(evidence.part.proposals.sources == source)} {source.name.lower()}"
        for source in PromptSource
    )
    return html.escape(f"tags {truth or 'none'}; used {used}; proposals: {counts}")


def _figures(evidence: ImageEvidence) -> str:
    image, part, record = evidence.image, evidence.part, evidence.record
    maps: Mapping[PromptSource, NDArray[np.float32]] = {
        PromptSource.COARSE: evidence.maps.coarse,
        PromptSource.FINE: evidence.maps.fine,
        PromptSource.CROSS: evidence.maps.cross,
    }
    figures = [_figure(_with_boxes(image, record.boxes, _TRUTH), "true boxes")]
    for source, values in maps.items():
        num = np.count_nonzero(part.prompts.sources == source)
        kind = "cluster centres" if source is PromptSource.CROSS else "peaks"
        picture = _with_points(_heated(image, values), part.prompts, source)
        figures.append(_figure(picture, f"{source.name.lower()} map, {num} {kind}"))
    num = len(evidence.masks)
    figures.append(_figure(_with_masks(evidence), f"masks of {num} prompts"))
    figures.append(_figure(_all_boxes(evidence), f"all {len(part.proposals)} proposals"))
    figures.append(_figure(_best_boxes(evidence), "the best proposal of each true box"))
    return "".join(figures)


def _figure(picture: Image.Image, caption: str) -> str:
    picture.thumbnail((_PANEL_PX, _PANEL_PX))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    text = html.escape(caption)
    source = f"data:image/jpeg;base64,{data}"
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _heated(image: NDArray[np.uint8], values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A grey image under black, red, yellow, white for 0 to 1."""
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    heat = np.clip(values[..., None] * 3 - np.array([0, 1, 2], np.float32), 0, 1) * 255
    return np.clip(0.6 * grey + 0.6 * heat, 0, 255).astype(np.uint8)


def _line_width(size: ImageSize) -> int:
    """Two pixels after scaling."""
    return max(1, round(2 * max(size) / _PANEL_PX))


def _with_boxes(
    image: NDArray[np.uint8], boxes: NDArray[np.float32], colour: tuple[int, int, int]
) -> Image.Image:
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for box in boxes:
        draw.rectangle(box.tolist(), outline=colour, width=_line_width(picture.size))
    return picture


def _with_points(
    image: NDArray[np.uint8], prompts: PointPrompts, source: PromptSource
) -> Image.Image:
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    radius = 2 * _line_width(picture.size)
    for x, y in prompts.points[prompts.sources == source]:
        place = [x - radius, y - radius, x + radius, y + radius]
        draw.ellipse(place, fill=_COLOURS[source], outline=(0, 0, 0))
    return picture


def _with_masks(evidence: ImageEvidence) -> Image.Image:
    """Each mask in the colour of its prompt's source, with the prompt."""
    shown = most_masks(evidence.part.prompts)
    values = 0.55 * evidence.image.astype(np.float32)
    for mask, source in zip(evidence.masks, shown.sources.tolist(), strict=True):
        colour = np.array(_COLOURS[PromptSource(source)], np.float32)
        values[mask] = 0.7 * values[mask] + 0.3 * colour
    picture = Image.fromarray(values.astype(np.uint8))
    for source in (PromptSource.COARSE, PromptSource.FINE, PromptSource.CROSS):
        picture = _with_points(np.asarray(picture), shown, source)
    return picture


def _all_boxes(evidence: ImageEvidence) -> Image.Image:
    picture = Image.fromarray(evidence.image)
    draw = ImageDraw.Draw(picture)
    proposals = evidence.part.proposals
    for box, source in zip(proposals.boxes, proposals.sources.tolist(), strict=True):
        draw.rectangle(box.tolist(), outline=_COLOURS[PromptSource(source)])
    return picture


def _best_boxes(evidence: ImageEvidence) -> Image.Image:
    proposals = evidence.part.proposals
    picture = Image.fromarray(evidence.image)
    draw = ImageDraw.Draw(picture)
    overlap = box_iou(evidence.record.boxes, proposals.boxes)
    if overlap.size:
        for row, best in zip(overlap, overlap.argmax(axis=1), strict=True):
            box = proposals.boxes[best]
            colour = _COLOURS[PromptSource(int(proposals.sources[best]))]
            draw.rectangle(box.tolist(), outline=colour, width=_line_width(picture.size))
            draw.text(
                (float(box[0]) + 5, float(box[1]) + 4),
                f"IoU {row[best]:.2f}",
                fill=(255, 255, 255),
                stroke_fill=(0, 0, 0),
                stroke_width=_line_width(picture.size),
                font_size=7 * _line_width(picture.size),
            )
    return picture
