"""What the benchmarks send where they are given no pictures of their own."""

import io
from collections.abc import Sequence
from pathlib import Path

import skimage
from PIL import Image

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def photograph() -> bytes:
    """scikit-image's photograph of an astronaut as a JPEG of 640x480."""
    picture = Image.fromarray(skimage.data.astronaut())
    file = io.BytesIO()
    picture.resize((640, 480), box=(0, 0, 512, 384)).save(file, "JPEG", quality=90)
    return file.getvalue()


def pictures(path: Path | None, limit: int) -> list[bytes]:
    """The files' bytes: of one file, of a folder's first ``limit`` in the order of their names, or
    the photograph where ``path`` is None.

    Raises:
        ValueError: There is no picture.
    """
    if path is None:
        return [photograph()]
    files = picture_files(path)[:limit]
    return [file.read_bytes() for file in files]


def picture_files(path: Path) -> Sequence[Path]:
    """The picture itself, or those of a folder (or of its ``images/``) by name."""
    if path.is_file():
        return [path]
    folder = path / "images" if (path / "images").is_dir() else path
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in _SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds no picture ({', '.join(_SUFFIXES)})")
    return files
