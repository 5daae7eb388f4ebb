"""One finished image of the proposals stage as one small file: whole or absent, never half."""

import dataclasses
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weaksam_rt.errors import ArtifactError
from weaksam_rt.files import atomic_path
from weaksam_rt.types import ImageSize, PointPrompts, Proposals

_BOX_ARRAYS = ("boxes", "scores", "sources")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePart:
    """What is kept of one image."""

    proposals: Proposals
    prompts: PointPrompts
    """All points that SAM was prompted with, without the grid."""
    used_tags: tuple[str, ...]


def write_part(path: Path, part: ImagePart) -> None:
    """Write ``part`` to an ``.npz`` file, atomically."""
    arrays = {f"box.{name}": getattr(part.proposals, name) for name in _BOX_ARRAYS}
    arrays |= {f"point.{name}": getattr(part.prompts, name) for name in _point_arrays()}
    arrays["used_tags"] = np.array(part.used_tags, dtype=np.str_)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_part(path: Path, image_size: ImageSize) -> ImagePart | None:
    """What ``write_part`` wrote, or None where there is no file yet.

    Raises:
        ArtifactError: The file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return ImagePart(
                proposals=Proposals(
                    image_size=image_size, **{name: arrays[f"box.{name}"] for name in _BOX_ARRAYS}
                ),
                prompts=PointPrompts(**{n: arrays[f"point.{n}"] for n in _point_arrays()}),
                used_tags=tuple(str(tag) for tag in arrays["used_tags"]),
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path} is damaged ({error}); delete it to make it again") from error


def _point_arrays() -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(PointPrompts))
