"""What decoding no more than the model sees costs in accuracy (ADR 0008).

``python -m benchmarks reduced_decoding assets/demo_models --data FOLDER`` detects on every image
twice, through the served pipeline in this process: decoded in full, and as ``weaksam_detect`` does.
"""

import asyncio
import dataclasses
import time
from pathlib import Path

from rich.progress import track

from benchmarks.entry import enter
from benchmarks.reporting import Where, report
from benchmarks.results import BenchmarkResult, Metric, Recorder, Table, artifact_record
from training.data.coco import ImageRecord, load_coco_folder
from training.evaluate import evaluate, summary
from weaksam_rt.backends.local import LocalBackend
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.contracts import DETECTOR
from weaksam_rt.images import DecodedImage, decode_image, decode_reduced
from weaksam_rt.model_repository import ExportedModels, load_exported_models, pipeline_models
from weaksam_rt.pipeline import WeakSamPipeline
from weaksam_rt.types import Detections

_SCORES = {"voc_ap50": "AP50", "corloc": "CorLoc", "coco_ap": "COCO AP"}


def main(where: Where, *, data: Path) -> None:
    """Measure and report.

    Args:
        where: Models with a detector, and output.
        data: Folder with ``images/`` and ``instances.json`` that has the detector's classes.
    """
    report(measure(load_exported_models(where.models), data), where.output)


def measure(exported: ExportedModels, data: Path) -> BenchmarkResult:
    """Both ways of decoding on every image, in turns."""
    detector = next(a for a in exported.artifacts if a.model == DETECTOR)
    known = pipeline_models({DETECTOR: detector})
    assert known.detector is not None
    folder = load_coco_folder(data, classes=known.detector.class_names)
    detection = dataclasses.replace(exported.config.detection, score_thresh=0.01)
    config = dataclasses.replace(exported.config, detection=detection)
    pipeline = WeakSamPipeline(LocalBackend({DETECTOR: OnnxRuntimeModel(detector)}), known, config)
    side = pipeline.longest_side_seen(with_masks=False)
    recorder = Recorder(
        what="reduced_decoding",
        title="Decoding no more of an image than the detector sees",
        config={"images": len(folder.records), "detector side": side},
        artifacts=(artifact_record(detector),),
    )
    sides = {"in full": None, "reduced": side}
    times: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, dict[int, Detections]] = {name: {} for name in sides}
    for number, record in enumerate(track(folder.records, "detecting", transient=True)):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            start = time.perf_counter()
            image = _decode(record, sides[name])
            times[name].append(1e3 * (time.perf_counter() - start))
            found[name][record.image_id] = asyncio.run(
                pipeline.detect(image.pixels, image_size=image.image_size)
            )
    rows = []
    for name, detections in found.items():
        scores = summary(evaluate(folder, detections))
        rows.append((name, *(f"{100 * scores[key]:.1f}" for key in _SCORES)))  # type: ignore[operator]
    metrics = [
        Metric(name=f"decoding {n}", unit="ms", repeats=(tuple(t),)) for n, t in times.items()
    ]
    accuracy = Table(
        title="Accuracy, percent", header=("decoding", *_SCORES.values()), rows=tuple(rows)
    )
    return recorder.result(metrics, tables=[accuracy])


def _decode(record: ImageRecord, longest_side: int | None) -> DecodedImage:
    data = record.path.read_bytes()
    if longest_side is not None:
        return decode_reduced(data, longest_side)
    return DecodedImage(pixels=decode_image(data), image_size=record.image_size)


if __name__ == "__main__":
    enter(main)
