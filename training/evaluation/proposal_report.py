"""A page that shows where proposals come from: maps, peaks and boxes of a few images."""

import asyncio
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from training.data.coco import CocoFolder, ImageRecord
from training.data.proposal_parts import ImagePart
from training.torch_backend import TrainedModels
from weaksam_rt.boxes import box_iou
from weaksam_rt.class_activation_map import normalize_maps
from weaksam_rt.contracts import VIT_CLASSIFIER
from weaksam_rt.files import atomic_path
from weaksam_rt.preprocessing import resize_maps, resize_to_square
from weaksam_rt.types import PointPrompts, PromptSource

_COLOURS = {
    PromptSource.GRID: (160, 160, 160),
    PromptSource.COARSE: (0, 200, 255),
    PromptSource.FINE: (255, 64, 129),
    PromptSource.CROSS: (255, 214, 0),
}
_TRUTH = (255, 255, 255)
_PANEL_PX = 280
_HEAD = """<!doctype html><meta charset="utf-8"><title>Proposals</title>
<style>body{font:14px sans-serif;background:#1b1b1f;color:#ddd;margin:24px}
img{display:block;margin:4px 0 24px;max-width:100%}code{color:#fff}
.k{display:inline-block;width:12px;height:12px;margin:0 4px 0 14px}</style>
<h1>Where the proposals come from</h1>
<p>From left to right: the picture with its true boxes (white, for evaluation only), coarse map,
fine map, mean class attention, each with its peaks; and for every true box the best proposal.
"""


def write_report(
    directory: Path,
    folder: CocoFolder,
    records: Sequence[ImageRecord],
    parts: Mapping[int, ImagePart],
    trained: TrainedModels,
) -> None:
    """Write ``index.html`` and one picture per record.

    Args:
        directory: Made if needed.
        folder: The data set.
        records: The images to show.
        parts: What the stage found, by image id.
        trained: Gives the maps once more.
    """
    keys = "".join(
        f'<span class="k" style="background:rgb{colour}"></span>{source.name.lower()}'
        for source, colour in _COLOURS.items()
    )
    lines = [_HEAD, keys, "</p>"]
    for record in records:
        part = parts[record.image_id]
        panels = _panels(record, part, folder.class_names, trained)
        name = f"{record.image_id}.jpg"
        with atomic_path(directory / name) as temporary:
            Image.fromarray(panels).save(temporary, format="JPEG", quality=85)
        lines.append(f'{_caption(record, part, folder)}<img src="{name}" alt="">')
    with atomic_path(directory / "index.html") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def _caption(record: ImageRecord, part: ImagePart, folder: CocoFolder) -> str:
    truth = ", ".join(folder.class_names[tag] for tag in record.tags)
    counts = ", ".join(
        f"{np.count_nonzero(part.proposals.sources == source)} {source.name.lower()}"
        for source in PromptSource
    )
    used = ", ".join(part.used_tags) or "none"
    text = f"{record.path.name}: tags {truth}; used {used}; proposals: {counts}"
    return f"<code>{html.escape(text)}</code>"


def _panels(
    record: ImageRecord, part: ImagePart, class_names: tuple[str, ...], trained: TrainedModels
) -> NDArray[np.uint8]:
    image = record.image()
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2).astype(np.float32)
    maps = _maps(image, [class_names.index(tag) for tag in part.used_tags], trained)
    panels = [_drawn(image, boxes=record.boxes, colour=_TRUTH)]
    for source, activation in maps.items():
        heated = grey * 0.6 + _heat(activation) * 0.6
        panels.append(_drawn(np.clip(heated, 0, 255).astype(np.uint8), prompts=part.prompts,
                             source=source))  # fmt: skip
    panels.append(_best_proposals(image, record, part))
    return np.concatenate(panels, axis=1)


def _maps(
    image: NDArray[np.uint8], class_ids: list[int], trained: TrainedModels
) -> dict[PromptSource, NDArray[np.float32]]:
    """The maximum over the used classes of each kind of map, in [0, 1], at the image's size."""
    parameters = trained.models.vit_classifier
    assert parameters is not None
    pixels = resize_to_square(image, parameters.image_size)[None]
    answer = asyncio.run(trained.backend.infer(VIT_CLASSIFIER, {"image": pixels}))
    kinds = {
        PromptSource.COARSE: answer["coarse_maps"][0],
        PromptSource.FINE: answer["fine_maps"][0],
        PromptSource.CROSS: answer["cross_maps"][0].mean(axis=0),
    }
    size = (image.shape[0], image.shape[1])
    empty = np.zeros(size, np.float32)
    return {
        source: normalize_maps(resize_maps(maps[class_ids], size)).max(axis=0)
        if class_ids
        else empty
        for source, maps in kinds.items()
    }


def _heat(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Black, red, yellow, white for 0 to 1."""
    shifted = values[..., None] * 3 - np.array([0, 1, 2], np.float32)
    return np.clip(shifted, 0, 1) * np.float32(255)


def _best_proposals(
    image: NDArray[np.uint8], record: ImageRecord, part: ImagePart
) -> NDArray[np.uint8]:
    panel = Image.fromarray(image).convert("RGB")
    draw = ImageDraw.Draw(panel)
    overlap = box_iou(record.boxes, part.proposals.boxes)
    if overlap.size:
        for row, best in zip(overlap, overlap.argmax(axis=1), strict=True):
            box = part.proposals.boxes[best]
            colour = _COLOURS[PromptSource(int(part.proposals.sources[best]))]
            draw.rectangle(box.tolist(), outline=colour, width=3)
            draw.text((float(box[0]) + 5, float(box[1]) + 4), f"IoU {row[best]:.2f}", fill=colour)
    return _fitted(panel)


def _drawn(
    image: NDArray[np.uint8],
    *,
    boxes: NDArray[np.float32] | None = None,
    colour: tuple[int, int, int] = _TRUTH,
    prompts: PointPrompts | None = None,
    source: PromptSource = PromptSource.GRID,
) -> NDArray[np.uint8]:
    panel = Image.fromarray(image)
    draw = ImageDraw.Draw(panel)
    for box in [] if boxes is None else boxes:
        draw.rectangle(box.tolist(), outline=colour, width=2)
    points = [] if prompts is None else prompts.points[prompts.sources == source]
    for x, y in points:
        draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=_COLOURS[source], outline=(0, 0, 0))
    return _fitted(panel)


def _fitted(panel: Image.Image) -> NDArray[np.uint8]:
    panel.thumbnail((_PANEL_PX, _PANEL_PX))
    square = Image.new("RGB", (_PANEL_PX + 4, _PANEL_PX), (27, 27, 31))
    square.paste(panel, (0, 0))
    return np.asarray(square)
