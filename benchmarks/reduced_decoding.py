"""What decoding no more than the model sees costs in accuracy (ADR 0008).

``python -m benchmarks.reduced_decoding assets/demo_models --data FOLDER`` detects on every image
twice, through the served pipeline in this process: decoded in full, and as ``weaksam_detect`` does.
"""

import asyncio
import dataclasses
import time
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import track

from training.data.coco import ImageRecord, load_coco_folder
from training.engine.stage import git_commit
from training.evaluate import evaluate, summary
from weaksam_rt.backends.local import LocalBackend
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.contracts import DETECTOR
from weaksam_rt.images import DecodedImage, decode_image, decode_reduced
from weaksam_rt.model_repository import load_exported_models, pipeline_models
from weaksam_rt.pipeline import WeakSamPipeline
from weaksam_rt.types import Detections


def main(
    models: Annotated[Path, tyro.conf.Positional], *, data: Path, output: Path | None = None
) -> None:
    """Measure and print; with ``output``, also write Markdown.

    Args:
        models: Folder of exported models with a detector.
        data: Folder with ``images/`` and ``instances.json`` that has the detector's classes.
        output: Markdown file.
    """
    exported = load_exported_models(models)
    detector = next(a for a in exported.artifacts if a.model == DETECTOR)
    known = pipeline_models({DETECTOR: detector})
    assert known.detector is not None
    folder = load_coco_folder(data, classes=known.detector.class_names)
    detection = dataclasses.replace(exported.config.detection, score_thresh=0.01)
    config = dataclasses.replace(exported.config, detection=detection)
    pipeline = WeakSamPipeline(LocalBackend({DETECTOR: OnnxRuntimeModel(detector)}), known, config)
    side = pipeline.longest_side_seen(with_masks=False)
    lines = [
        "# Decoding no more of an image than the detector sees",
        "",
        f"`python -m benchmarks.reduced_decoding assets/demo_models --data {data.name}`, commit "
        f"{git_commit()[:12]}; {len(folder.records)} images, detector side {side}.",
        "",
        "| decoding | ms an image | AP50 | CorLoc | COCO AP |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in ("in full", "reduced"):
        spent = 0.0
        found: dict[int, Detections] = {}
        for record in track(folder.records, name, transient=True):
            start = time.perf_counter()
            image = _decode(record, None if name == "in full" else side)
            spent += time.perf_counter() - start
            found[record.image_id] = asyncio.run(
                pipeline.detect(image.pixels, image_size=image.image_size)
            )
        scores = summary(evaluate(folder, found))
        cells = " | ".join(f"{100 * scores[key]:.1f}" for key in ("voc_ap50", "corloc", "coco_ap"))  # type: ignore[operator]
        lines.append(f"| {name} | {1e3 * spent / len(folder.records):.1f} | {cells} |")
    text = "\n".join(lines) + "\n"
    Console().print(text, markup=False)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)


def _decode(record: ImageRecord, longest_side: int | None) -> DecodedImage:
    data = record.path.read_bytes()
    if longest_side is not None:
        return decode_reduced(data, longest_side)
    return DecodedImage(pixels=decode_image(data), image_size=record.image_size)


if __name__ == "__main__":
    tyro.cli(main)
