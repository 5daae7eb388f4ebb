"""A folder of tagged images as a data set of all stages: ``python -m training.tag_file --help``.

The tag file has one line an image: ``file,tag;tag``. A first line ``file,tags`` is skipped.
"""

import csv
import logging
from pathlib import Path

import tyro
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.progress import track

from training.merge_data import link_image
from weaksam_rt.files import write_json

_LOGGER = logging.getLogger(__name__)
SKIPPED_NAME = "skipped.json"
"""Why images were left out, by name."""


def read_tag_file(path: Path) -> dict[str, tuple[str, ...]]:
    """Tags by file name, in the file's order.

    Raises:
        ValueError: A line has no tag, is not ``file,tag;tag``, or names a file again.
    """
    tags: dict[str, tuple[str, ...]] = {}
    with path.open(newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if not row or (number == 1 and row[0].strip() == "file"):
                continue
            names = (
                tuple(t.strip() for t in row[1].split(";") if t.strip()) if len(row) == 2 else ()
            )
            if not names:
                raise ValueError(f"{path}:{number}: expected file,tag;tag, got {','.join(row)!r}")
            if row[0] in tags:
                raise ValueError(f"{path}:{number}: {row[0]} was tagged before; join its lines")
            tags[row[0]] = names
    if not tags:
        raise ValueError(f"{path} tags no image; each line is file,tag;tag")
    return tags


def write_tagged_folder(
    images: Path,
    tags: Path,
    output: Path,
    *,
    classes: tuple[str, ...] | None = None,
    skip_bad: bool = False,
) -> None:
    """Link the tagged images and write ``instances.json`` with their tags and no boxes.

    Args:
        images: Folder of the images.
        tags: The tag file.
        output: The data set.
        classes: The classes in this order; None: all tags in alphabetical order. Give a validation
            set the classes of its training set.
        skip_bad: Leave tagged files that are missing or no images out, and list them in
            ``skipped.json`` beside the data set.

    Raises:
        ValueError: A tagged file is missing or is no image and ``skip_bad`` is not set, or a tag is
            not among ``classes``.
    """
    tags_of = read_tag_file(tags)
    seen = sorted({name for names in tags_of.values() for name in names})
    chosen = tuple(seen) if classes is None else classes
    if unknown := [name for name in seen if name not in chosen]:
        raise ValueError(f"{tags} has the tag {unknown[0]!r}; the classes are {list(chosen)}")
    entries, skipped = [], {}
    for image_id, (name, names) in enumerate(
        track(tags_of.items(), description="images", transient=True), start=1
    ):
        try:
            height, width = _image_size(images / name)
        except ValueError as error:
            if not skip_bad:
                raise
            skipped[name] = str(error)
            _LOGGER.warning("left out: %s", error)
            continue
        link_image(images / name, output / "images" / name)
        entries.append(
            {
                "id": image_id,
                "file_name": name,
                "height": height,
                "width": width,
                "tags": sorted(set(names)),
            }
        )
    categories = [{"id": i, "name": name} for i, name in enumerate(chosen, start=1)]
    content = {"images": entries, "annotations": [], "categories": categories}
    write_json(output / "instances.json", content)
    if skip_bad:
        write_json(output / SKIPPED_NAME, skipped)


def _image_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            width, height = ImageOps.exif_transpose(image).size
    except FileNotFoundError as error:
        raise ValueError(f"{path} is in the tag file and not in the folder") from error
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is no image: {error}") from error
    return height, width


if __name__ == "__main__":
    tyro.cli(write_tagged_folder)
