"""``weaksam detect``, ``propose`` and ``segment``: files in, tables, JSON and pictures out."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from weaksam_rt.cli._connection import Connection
from weaksam_rt.client import DetectOutcome, WeakSamClient
from weaksam_rt.coco_output import LabelledImage, coco_dataset
from weaksam_rt.drawing import PALETTE, draw_instances, draw_points
from weaksam_rt.errors import WeakSamError
from weaksam_rt.files import write_json
from weaksam_rt.images import decode_image
from weaksam_rt.types import Detections, InstanceMasks, PromptSource

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_DEFAULT_CONNECTION = Connection()

Images = Annotated[tuple[Path, ...], tyro.conf.Positional]


def detect(
    images: Images,
    *,
    output: Path | None = None,
    score_thresh: float | None = None,
    max_detections: int | None = None,
    masks: bool = False,
    max_in_flight: int = 4,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    connection: Annotated[Connection, tyro.conf.arg(name="")] = _DEFAULT_CONNECTION,
) -> int:
    """Detect objects on images.

    Examples: `weaksam detect photo.jpg`; `weaksam detect photos/ --output out --masks`. Exits with
    1 if an image failed; the others are done all the same.

    Args:
        images: Files, or folders whose JPEG, PNG and WebP files are taken.
        output: Folder for annotated pictures and detections.json (COCO format).
        score_thresh: Lowest score to show, in [0, 1]; by default the server's setting.
        max_detections: Most detections of an image; by default the server's setting.
        masks: Also segment every detection with SAM.
        max_in_flight: Requests sent at a time.
        as_json: Print the COCO JSON instead of a table.
        connection: Where the server is.
    """
    files = image_files(images)
    with connection.client() as client:
        outcomes = client.detect_many(
            files,
            max_in_flight=max_in_flight,
            score_thresh=score_thresh,
            max_detections=max_detections,
            with_masks=masks,
        )
        done = list(_with_progress(outcomes, len(files)))
    return report_detections(done, output=output, as_json=as_json)


def propose(
    images: Images,
    *,
    tags: tuple[str, ...] | None = None,
    output: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    connection: Annotated[Connection, tyro.conf.arg(name="")] = _DEFAULT_CONNECTION,
) -> int:
    """Propose class-agnostic boxes, for labelling and retraining.

    Example: `weaksam propose photo.jpg --tags dog bicycle --output out`.

    Args:
        images: Files, or folders whose JPEG, PNG and WebP files are taken.
        tags: Classes in the images; without them the classifier decides image by image.
        output: Folder for annotated pictures and proposals.json (COCO format, the source of each
            box as its category).
        as_json: Print the COCO JSON instead of a table.
        connection: Where the server is.
    """
    files, labelled, num_failed = image_files(images), [], 0
    table = Table("file", "proposals", *(s.name.lower() for s in PromptSource), "tags")
    with connection.client() as client:
        for path in _with_progress(files, len(files)):
            try:
                result = client.propose(path, tags)
            except WeakSamError as error:
                table.add_row(str(path), f"[red]{type(error).__name__}: {error}")
                num_failed += 1
                continue
            proposals = result.proposals
            counts = np.bincount(proposals.sources, minlength=len(PromptSource))
            numbers = [str(len(proposals)), *map(str, counts)]
            table.add_row(str(path), *numbers, ", ".join(result.used_tags))
            names = tuple(PromptSource(s).name.lower() for s in proposals.sources)
            detections = Detections(
                boxes=proposals.boxes,
                scores=proposals.scores,
                labels=proposals.sources.astype(np.int64),
                image_size=proposals.image_size,
            )
            labelled.append(
                LabelledImage(file_name=str(path), detections=detections, label_names=names)
            )
    _write(labelled, output, "proposals.json", captions=False)
    _print(table, labelled, as_json)
    return int(num_failed > 0)


def segment(
    image: Annotated[Path, tyro.conf.Positional],
    *,
    points: tuple[tuple[float, float], ...] = (),
    background: tuple[tuple[float, float], ...] = (),
    boxes: tuple[tuple[float, float, float, float], ...] = (),
    multimask: bool = False,
    output: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    connection: Annotated[Connection, tyro.conf.arg(name="")] = _DEFAULT_CONNECTION,
) -> int:
    """Segment what points or boxes mark on one image.

    All points together are one prompt; each box is a prompt of its own. Examples:
    `weaksam segment photo.jpg --points 320 240`, `weaksam segment photo.jpg --boxes 10 20 200 300`.

    Args:
        image: One file.
        points: x y pairs on the object, in pixels.
        background: x y pairs beside the object.
        boxes: x1 y1 x2 y2 of each object, in pixels.
        multimask: Three masks (part, whole and between) instead of one.
        output: Folder for the annotated picture and masks.json (COCO format).
        as_json: Print the COCO JSON instead of a table.
        connection: Where the server is.
    """
    with connection.client() as client:
        labelled = _segment(client, image, points, background, boxes, multimask)
    detections = labelled.detections
    table = Table("mask", "predicted IoU", "box")
    for i in range(len(detections)):
        box = " ".join(f"{v:.0f}" for v in detections.boxes[i])
        table.add_row(labelled.label_names[i], f"{detections.scores[i]:.3f}", box)
    marks = np.array([*points, *background], np.float32).reshape(-1, 2)
    colors = [(40, 200, 90)] * len(points) + [(220, 40, 40)] * len(background)
    _write([labelled], output, "masks.json", captions=True, points=marks, point_colors=colors)
    _print(table, [labelled], as_json)
    return 0


def image_files(images: Sequence[Path]) -> list[Path]:
    """Files as given, folders replaced by their images in order of name.

    Raises:
        ValueError: A path does not exist, or nothing is left.
    """
    files: list[Path] = []
    for path in images:
        if path.is_dir():
            files += sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
        elif path.exists():
            files.append(path)
        else:
            raise ValueError(f"{path} does not exist")
    if not files:
        raise ValueError(f"no images: give files or folders with {', '.join(_SUFFIXES)} files")
    return files


def report_detections(
    outcomes: Sequence[DetectOutcome], *, output: Path | None, as_json: bool = False
) -> int:
    """Print the outcomes of ``detect_many`` over files, write pictures and ``detections.json``.

    Returns:
        1 if an image failed, else 0.
    """
    table = Table("file", "label", "score", "box (x1 y1 x2 y2)", "latency ms")
    labelled = []
    shown = _short_names([str(outcome.image) for outcome in outcomes])
    for outcome in outcomes:
        name = shown[str(outcome.image)]
        latency = f"{outcome.latency_ms:.0f}"
        if outcome.result is None:
            message = f"[red]{type(outcome.error).__name__}: {outcome.error}"
            table.add_row(name, message, "", "", latency)
            continue
        detections, names = outcome.result.detections, outcome.result.label_names
        for i in range(len(detections)):
            box = " ".join(f"{v:.0f}" for v in detections.boxes[i])
            score = f"{detections.scores[i]:.2f}"
            is_first = i == 0
            table.add_row(
                name if is_first else "", names[i], score, box,
                latency if is_first else "",
            )  # fmt: skip
        if len(detections) == 0:
            table.add_row(name, "[dim]nothing found", "", "", latency)
        labelled.append(
            LabelledImage(file_name=str(outcome.image), detections=detections, label_names=names)
        )
    _write(labelled, output, "detections.json", captions=True)
    _print(table, labelled, as_json)
    return int(len(labelled) < len(outcomes))


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """File names without folders, where no two files share one."""
    names = [Path(path).name for path in paths]
    is_clear = len(set(names)) == len(set(paths))
    return {path: name if is_clear else path for path, name in zip(paths, names, strict=True)}


def _segment(
    client: WeakSamClient,
    image: Path,
    points: Sequence[tuple[float, float]],
    background: Sequence[tuple[float, float]],
    boxes: Sequence[tuple[float, float, float, float]],
    multimask: bool,
) -> LabelledImage:
    """One call for the points, one for the boxes: prompts of one call have one shape."""
    results, names = [], []
    if points or background:
        coords = np.array([[*points, *background]], np.float32)
        labels = np.array([[1] * len(points) + [0] * len(background)], np.int32)
        results.append(
            client.segment(image, point_coords=coords, point_labels=labels, multimask=multimask)
        )
        names.append("points")
    if boxes:
        given = np.array(boxes, np.float32)
        results.append(client.segment(image, boxes=given, multimask=multimask))
        names += [f"box {i + 1}" for i in range(len(boxes))]
    if not results:
        raise ValueError("nothing to segment: give --points or --boxes")
    counts = [prompt for result in results for prompt in result.mask_counts]
    num_masks = len(counts[0])
    image_size = results[0].image_size
    masks = InstanceMasks(
        rle_counts=tuple(mask for prompt in counts for mask in prompt), image_size=image_size
    )
    detections = Detections(
        boxes=np.concatenate([r.boxes.reshape(-1, 4) for r in results]),
        scores=np.concatenate([r.scores.ravel() for r in results]),
        labels=np.repeat(np.arange(len(counts)), num_masks),
        image_size=image_size,
        masks=masks,
    )
    label_names = tuple(name for name in names for _ in range(num_masks))
    return LabelledImage(file_name=str(image), detections=detections, label_names=label_names)


def _write(
    labelled: list[LabelledImage],
    output: Path | None,
    json_name: str,
    *,
    captions: bool,
    points: Any = None,
    point_colors: Sequence[tuple[int, int, int]] = (),
) -> None:
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for image in labelled:
        detections = image.detections
        texts = [
            f"{name} {score:.2f}" if captions else ""
            for name, score in zip(image.label_names, detections.scores, strict=True)
        ]
        pixels = decode_image(Path(image.file_name).read_bytes())
        labels = [int(label) for label in detections.labels]
        picture = draw_instances(pixels, detections.boxes, texts, labels, detections.masks)
        if points is not None:
            draw_points(picture, points, list(point_colors) or [PALETTE[0]] * len(points))
        picture.save(output / _free_name(Path(image.file_name).stem, taken), quality=92)
    write_json(output / json_name, coco_dataset(labelled))


def _free_name(stem: str, taken: set[str]) -> str:
    """A file name that no image of this run has taken: two folders may hold the same name."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return f"{name}.jpg"


def _print(table: Table, labelled: list[LabelledImage], as_json: bool) -> None:
    if as_json:
        print(json.dumps(coco_dataset(labelled)))
    else:
        Console().print(table)


def _with_progress(items: Iterable[Any], total: int) -> Iterable[Any]:
    """``items`` with a bar on standard error, if there are many and someone is watching."""
    console = Console(stderr=True)
    if total < 4 or not console.is_terminal:
        yield from items
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(items, total=total)
