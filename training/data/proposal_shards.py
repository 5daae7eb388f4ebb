"""Results of the proposals stage while it runs: files that only grow, one line an image.

A process owns one file. A kill can tear its last line only, which is cut off before the next one is
written; everything before it stays. Which file holds an image does not matter, so the number of
processes may change between runs. In memory are image ids and places in files, never results.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from weaksam_rt.errors import ArtifactError
from weaksam_rt.types import ImageSize, PointPrompts, Proposals

_SUFFIX = ".jsonl"
_DIGITS = 4
"""Decimals of pixels and scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePart:
    """What is kept of one image."""

    proposals: Proposals
    prompts: PointPrompts
    """All points that SAM was prompted with, without the grid."""
    used_tags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """An image that was left out."""

    file_name: str
    reason: str


def encode_line(image_id: int, result: ImagePart | Skipped) -> str:
    """One line, without its end."""
    if isinstance(result, Skipped):
        content: dict[str, Any] = {"skipped": result.file_name, "reason": result.reason}
    else:
        proposals, prompts = result.proposals, result.prompts
        content = {
            "tags": list(result.used_tags),
            "boxes": _rounded(proposals.boxes),
            "scores": _rounded(proposals.scores),
            "sources": proposals.sources.tolist(),
            "points": _rounded(prompts.points),
            "point_scores": _rounded(prompts.scores),
            "point_classes": prompts.class_ids.tolist(),
            "point_sources": prompts.sources.tolist(),
        }
    return json.dumps({"image_id": image_id, **content}, separators=(",", ":"))


def decode_line(line: str, image_size: ImageSize) -> ImagePart | Skipped:
    """What ``encode_line`` wrote of an image of ``image_size``.

    Raises:
        KeyError, TypeError, ValueError: It is another line.
    """
    content = json.loads(line)
    if "skipped" in content:
        return Skipped(file_name=content["skipped"], reason=content["reason"])
    return ImagePart(
        proposals=Proposals(
            boxes=_array(content["boxes"], np.float32, 4),
            scores=_array(content["scores"], np.float32),
            sources=_array(content["sources"], np.int32),
            image_size=image_size,
        ),
        prompts=PointPrompts(
            points=_array(content["points"], np.float32, 2),
            scores=_array(content["point_scores"], np.float32),
            class_ids=_array(content["point_classes"], np.int32),
            sources=_array(content["point_sources"], np.int32),
        ),
        used_tags=tuple(content["tags"]),
    )


class ShardWriter:
    """One growing file, for one process at a time; a context manager.

    Args:
        directory: Made if needed.
        name: Of the file, without suffix.
    """

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f"{name}{_SUFFIX}"
        self._file = self._path.open("a+b")

    def __enter__(self) -> "ShardWriter":
        """Lock the file and cut off a torn line.

        Raises:
            ArtifactError: Another process writes it.
        """
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ArtifactError(
                f"another process writes {self._path}; wait for it, or end it"
            ) from error
        self._file.truncate(_end_of_last_line(self._path))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close, which unlocks."""
        self._file.close()

    def write(self, line: str) -> None:
        """Append one line; it is on the disk when this returns."""
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardIndex:
    """Where each image's line is."""

    places: Mapping[int, tuple[Path, int]]
    """File and offset in bytes of each finished image."""
    skipped: Mapping[int, tuple[Path, int]]
    """The same of each image that was left out and is not finished elsewhere."""

    def read(self, image_id: int, image_size: ImageSize) -> ImagePart | Skipped | None:
        """The result of one image; None where there is none yet."""
        place = self.places.get(image_id, self.skipped.get(image_id))
        if place is None:
            return None
        path, offset = place
        with path.open("rb") as file:
            file.seek(offset)
            return decode_line(file.readline().decode(), image_size)


def index_shards(directory: Path) -> ShardIndex:
    """Read all files once; torn last lines do not count. An empty index where nothing is.

    Raises:
        ArtifactError: A whole line is damaged.
    """
    places: dict[int, tuple[Path, int]] = {}
    skipped: dict[int, tuple[Path, int]] = {}
    for path in sorted(directory.glob(f"*{_SUFFIX}")):
        for number, offset, line in _lines(path):
            try:
                content = json.loads(line)
                found = skipped if "skipped" in content else places
                found.setdefault(int(content["image_id"]), (path, offset))
            except (ValueError, KeyError, TypeError) as error:
                raise ArtifactError(
                    f"line {number} of {path} is damaged ({error}); delete the file to make its "
                    "images again"
                ) from error
    left_out = {image_id: place for image_id, place in skipped.items() if image_id not in places}
    return ShardIndex(places=places, skipped=left_out)


class ShardWatch:
    """How many lines there are, at the cost of the new ones."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: dict[Path, int] = {}
        self._count = 0

    def count(self) -> int:
        """Whole lines in all files."""
        for path in self._directory.glob(f"*{_SUFFIX}"):
            with path.open("rb") as file:
                file.seek(self._seen.get(path, 0))
                while part := file.read(1 << 20):
                    self._count += part.count(b"\n")
                self._seen[path] = file.tell()
        return self._count


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number from 1, offset and bytes of each whole line."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield number, offset, line
            offset += len(line)


def _end_of_last_line(path: Path) -> int:
    """Bytes up to and with the last end of a line."""
    position = path.stat().st_size
    with path.open("rb") as file:
        while position > 0:
            start = max(0, position - (1 << 16))
            file.seek(start)
            found = file.read(position - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            position = start
    return 0


def _rounded(values: Any) -> Any:
    return values.astype(np.float64).round(_DIGITS).tolist()


def _array(values: list[Any], dtype: Any, width: int | None = None) -> Any:
    array = np.array(values, dtype=dtype)
    return array if width is None else array.reshape(-1, width)
