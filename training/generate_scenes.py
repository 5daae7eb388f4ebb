"""Stage: draw a training and a validation set of scenes as COCO folders.

    python -m training.generate_scenes --output runs/scenes --num-train 600 --num-val 200

writes ``train/`` and ``val/``, each with ``images/*.jpg`` and ``instances.json``.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image
from pycocotools import mask as coco_mask
from rich.logging import RichHandler
from rich.progress import track

from training.data.scenes import SCENE_CLASSES, Scene, SceneConfig, render_scene
from training.engine.stage import open_stage
from weaksam_rt.files import write_json

_VAL_START = 1_000_000
"""First scene of the validation set: far from every training set of any size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateScenesConfig:
    """What to draw."""

    num_train: int = 600
    """Training images, 1 to 1,000,000."""
    num_val: int = 200
    """Validation images; the first ones are the same for every number."""
    seed: int = 0
    """Chooses the set."""
    scene: SceneConfig = field(default_factory=SceneConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.num_train <= _VAL_START:
            raise ValueError(f"num_train must lie in 1..{_VAL_START}; got {self.num_train}")
        if self.num_val < 0:
            raise ValueError(f"num_val must not be negative; got {self.num_val}")


def generate_scenes(output: Path, config: GenerateScenesConfig) -> None:
    """Write both splits below ``output``; nothing is drawn again where they are complete."""
    stage = open_stage("generate_scenes", output, config=config, inputs={})
    if stage.finished:
        return
    splits = {"train": (0, config.num_train), "val": (_VAL_START, config.num_val)}
    for name, (start, num) in splits.items():
        scenes = (
            (i, render_scene(config.seed, i, config.scene)) for i in range(start, start + num)
        )
        write_coco_folder(output / name, track(scenes, description=name, total=num))
    stage.finish(outputs=[f"{name}/instances.json" for name in splits])


def write_coco_folder(root: Path, scenes: Iterable[tuple[int, Scene]]) -> None:
    """Write ``root/images/*.jpg``, then ``root/instances.json``.

    Args:
        root: Made if needed.
        scenes: (image id, scene) pairs.
    """
    (root / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, scene in scenes:
        file_name = f"{image_id:07d}.jpg"
        picture = Image.fromarray(scene.image)
        picture.save(root / "images" / file_name, quality=scene.jpeg_quality)
        height, width = scene.image.shape[:2]
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for annotation in _annotations(image_id, scene):
            annotations.append({"id": len(annotations) + 1, **annotation})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(SCENE_CLASSES)]
    write_json(
        root / "instances.json",
        {"categories": categories, "images": images, "annotations": annotations},
    )


def _annotations(image_id: int, scene: Scene) -> list[dict[str, Any]]:
    annotations = []
    for mask, label in zip(scene.masks, scene.labels, strict=True):
        rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        annotations.append(
            {
                "image_id": image_id,
                "category_id": int(label) + 1,
                "bbox": [float(v) for v in coco_mask.toBbox(rle)],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
            }
        )
    return annotations


def main(output: Path, config: tyro.conf.OmitArgPrefixes[GenerateScenesConfig]) -> None:
    """Draw a training and a validation set of generated scenes as COCO folders.

    Args:
        output: Folder for ``train/``, ``val/`` and the manifest.
        config: What to draw.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])
    generate_scenes(output, config)


if __name__ == "__main__":
    tyro.cli(main)
