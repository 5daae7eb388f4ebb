"""From a new checkpoint to the version that is served: build, verify, compare, publish, watch.

Knows nothing about journals and switching (``weaksam_rt.releases``); decides whether a candidate is
good enough to be handed to them, and what its answers on the server must be.
"""

import asyncio
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from export.accept import accept_onnx
from export.exportable import Exportable
from export.half_weights import round_weights_
from export.refit import RefitError, refit_onnx
from training.data.coco import CocoFolder
from training.engine.stage import fingerprint
from training.evaluation.voc_ap import voc_ap
from weaksam_rt.artifacts import ModelArtifact, load_artifact, write_manifest
from weaksam_rt.backends.local import LocalBackend
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.client import WeakSamClient
from weaksam_rt.config import DetectionConfig, PipelineConfig
from weaksam_rt.contracts import DETECTOR, WEAKSAM_DETECT, DetectorParameters
from weaksam_rt.errors import ArtifactError, ReleaseError, WeakSamError
from weaksam_rt.images import decode_reduced
from weaksam_rt.live_repository import engine_versions_needed, pipeline_file
from weaksam_rt.model_control import ModelControl
from weaksam_rt.pipeline import PipelineModels, WeakSamPipeline, select_detections
from weaksam_rt.preprocessing import resize_for_detector
from weaksam_rt.releases import ReleaseReport, publish
from weaksam_rt.types import Detections

_LOGGER = logging.getLogger(__name__)

Method = Literal["auto", "refit", "export"]
ExportModel = Callable[[Exportable, Path, bool], ModelArtifact]
"""Module, folder and whether weights are stored in half precision, to a verified artifact."""

_METRIC_SCORE_THRESH = 0.01
"""AP looks at weak detections too."""
_BOX_TOLERANCE_PX = 0.05
_SCORE_TOLERANCE = 1e-3
_WATCH_PAUSE_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A verified engine that is not served yet."""

    artifact: ModelArtifact
    method: Literal["refit", "export"]
    seconds: float
    """To build and verify it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A picture and the answers that the candidate gives to it outside the server."""

    name: str
    data: bytes
    model_input: NDArray[np.uint8]
    """[s, s, 3], what the engine sees."""
    candidates: Mapping[str, NDArray[Any]]
    """The engine's outputs, without batch axis."""
    detections: Detections


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseSummary:
    """What a release did, for a person and for a machine."""

    report: ReleaseReport
    method: str
    build_seconds: float
    """To build and verify the candidate."""
    live_build_seconds: float | None
    """What building the live engine from nothing took, as its passport says."""
    parity: float | None
    ap50: float
    live_ap50: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        content = asdict(self)
        del content["report"]["release"]["configs"]  # the repository has them
        return content


def live_detector(repository: Path) -> ModelArtifact:
    """The detector that ``repository`` serves, verified.

    Raises:
        ArtifactError: It serves none, or the engine cannot be trusted.
    """
    versions = engine_versions_needed(repository, DETECTOR)
    if not versions:
        raise ArtifactError(
            f"{repository} serves no {DETECTOR}; build it with `python -m export repository`"
        )
    return load_artifact(repository / DETECTOR / str(versions[-1]))


def build_candidate(
    exportable: Exportable,
    live: ModelArtifact,
    directory: Path,
    *,
    method: Method,
    export: ExportModel,
) -> Candidate:
    """Build the engine of a new checkpoint, by the cheapest way that is right.

    Args:
        exportable: The new checkpoint.
        live: The engine that is served; a refit takes its graph.
        directory: Gets the artifact.
        method: ``auto`` refits where the weights fit the graph and exports otherwise.
        export: Builds from nothing.

    Raises:
        RefitError: ``method`` is ``refit`` and the weights do not fit.
        ParityError: The engine's answers are not PyTorch's.
    """
    half = bool(live.passport.exporter.get("half_weights", False))
    start = time.perf_counter()
    if method != "export":
        try:
            artifact = _refit(exportable, live, directory, half=half)
            return Candidate(artifact=artifact, method="refit", seconds=time.perf_counter() - start)
        except RefitError as error:
            if method == "refit":
                raise
            _LOGGER.info("no refit: %s", error)
    artifact = export(exportable, directory, half)
    return Candidate(artifact=artifact, method="export", seconds=time.perf_counter() - start)


def _refit(
    exportable: Exportable, live: ModelArtifact, directory: Path, *, half: bool
) -> ModelArtifact:
    same_names = replace(live.parameters, **_names_of(exportable))
    if exportable.parameters != same_names:  # sizes are constants of the graph
        raise RefitError(
            f"the checkpoint has {exportable.parameters}, the engine {live.parameters}; export it"
        )
    if half:
        round_weights_(exportable.module)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / live.path.name
    start = time.perf_counter()
    count = refit_onnx(live, exportable.module, path)
    seconds = round(time.perf_counter() - start, 3)
    exporter = {
        **live.passport.exporter,
        "refit": {"weights": count, "seconds": seconds, "from_sha256": live.sha256},
    }
    provenance = {
        "exporter": exporter,
        "precision": live.passport.precision,
        "weights": live.passport.weights,
    }
    return accept_onnx(path, exportable, provenance)


def _names_of(exportable: Exportable) -> dict[str, Any]:
    names = getattr(exportable.parameters, "class_names", None)
    return {} if names is None else {"class_names": names}


# ---------------------------------------------------------------------------------------------
# Is it as good as the live one?
# ---------------------------------------------------------------------------------------------


def ap50_of_engine(artifact: ModelArtifact, folder: CocoFolder, config: DetectionConfig) -> float:
    """AP50 (Pascal VOC, area form) of a detector's engine on ``folder``, in [0, 1].

    The engine runs in this process, with serving's decoding, resizing and suppression. Classes are
    matched by name: what the detector does not know counts as not found.
    """
    parameters = artifact.parameters
    assert isinstance(parameters, DetectorParameters)
    engine = OnnxRuntimeModel(artifact, num_threads=1)
    weak = replace(config, score_thresh=_METRIC_SCORE_THRESH)
    label_of_name = {name: label for label, name in enumerate(folder.class_names)}
    labels = np.array([label_of_name.get(name, -1) for name in parameters.class_names])
    found = {}
    for record in folder.records:
        detections = _detect_with(engine, record.path.read_bytes(), parameters.image_size, weak)
        known = detections.take(labels[detections.labels] >= 0)
        found[record.image_id] = replace(known, labels=labels[known.labels])
    return voc_ap(folder, found).mean_all_point


def measured_ap50(artifact: ModelArtifact, folder: CocoFolder, config: DetectionConfig) -> float:
    """``ap50_of_engine``, or what the passport says if it was measured on the same data and
    settings.
    """
    known = artifact.passport.task_metrics
    wanted = _metric_identity(folder, config)
    if "ap50" in known and {key: known.get(key) for key in wanted} == wanted:
        return float(known["ap50"])
    return ap50_of_engine(artifact, folder, config)


def with_ap50(
    artifact: ModelArtifact, ap50: float, folder: CocoFolder, config: DetectionConfig
) -> ModelArtifact:
    """The same artifact, with its task metric in the passport on disk."""
    metrics = {"ap50": ap50, **_metric_identity(folder, config)}
    return write_manifest(
        artifact.path,
        model=artifact.model,
        engine=artifact.engine,
        parameters=artifact.parameters,
        provenance=replace(artifact.passport, task_metrics=metrics),
    )


def _metric_identity(folder: CocoFolder, config: DetectionConfig) -> dict[str, Any]:
    return {
        "data": fingerprint(folder.root),
        "num_images": len(folder.records),
        "nms_thresh": config.nms_thresh,
        "max_detections": config.max_detections,
    }


def _detect_with(
    engine: OnnxRuntimeModel, data: bytes, image_size: int, config: DetectionConfig
) -> Detections:
    image = decode_reduced(data, image_size)
    pixels, frame = resize_for_detector(image.pixels, image_size, image_size=image.image_size)
    answer = engine({"image": pixels[None]})
    return select_detections(
        answer["boxes"][0], answer["scores"][0], answer["labels"][0], frame,
        score_thresh=config.score_thresh, nms_thresh=config.nms_thresh,
        max_detections=config.max_detections,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Does the server answer as the candidate does?
# ---------------------------------------------------------------------------------------------


def make_probes(
    artifact: ModelArtifact,
    config: PipelineConfig,
    images: Sequence[Path],
) -> list[Probe]:
    """What the server will have to answer, computed in this process."""
    parameters = artifact.parameters
    assert isinstance(parameters, DetectorParameters)
    engine = OnnxRuntimeModel(artifact, num_threads=1)
    pipeline = WeakSamPipeline(
        LocalBackend({DETECTOR: engine}), PipelineModels(detector=parameters), config
    )
    probes = []
    for path in images:
        data = path.read_bytes()
        image = decode_reduced(data, pipeline.longest_side_seen(with_masks=False))
        pixels, _ = resize_for_detector(
            image.pixels, parameters.image_size, image_size=image.image_size
        )
        answer = engine({"image": pixels[None]})
        probes.append(
            Probe(
                name=path.name,
                data=data,
                model_input=pixels,
                candidates={name: array[0] for name, array in answer.items()},
                detections=asyncio.run(pipeline.detect(image.pixels, image_size=image.image_size)),
            )
        )
    return probes


def check_engine_answers(
    control: ModelControl, artifact: ModelArtifact, probes: Sequence[Probe], version: int
) -> None:
    """Ask the loaded, not yet used engine on the server; raises ``ReleaseError`` at the first
    answer that is not the candidate's.
    """
    for probe in probes:
        answer = control.infer(artifact.contract, version, {"image": probe.model_input})
        for name, expected in probe.candidates.items():
            if name == "scores":
                error = float(np.abs(answer[name] - expected).max(initial=0))
                if error > _SCORE_TOLERANCE:
                    raise ReleaseError(
                        f"{probe.name}: the engine on the server gives scores that differ by "
                        f"{error:.2g} from the same engine here"
                    )
            elif not np.isfinite(answer[name]).all():
                raise ReleaseError(f"{probe.name}: the engine on the server gives {name} that are "
                                   "not finite")  # fmt: skip


def watch_answers(
    client: WeakSamClient, probes: Sequence[Probe], version: int, *, watch_s: float
) -> None:
    """Ask the switched pipeline again and again for ``watch_s`` seconds, at least once each.

    Raises:
        ReleaseError: An answer came from another version, or is not the candidate's.
        WeakSamError: The server failed a probe.
    """
    deadline = time.monotonic() + watch_s
    while True:
        for probe in probes:
            result = client.detect(probe.data)
            if result.version != version:
                raise ReleaseError(
                    f"{probe.name} was answered by version {result.version} of "
                    f"{WEAKSAM_DETECT.name}, expected {version}"
                )
            if difference := answer_difference(result.detections, probe.detections):
                raise ReleaseError(f"{probe.name}: {difference}")
        if time.monotonic() >= deadline:
            return
        time.sleep(min(_WATCH_PAUSE_S, max(deadline - time.monotonic(), 0)))


def answer_difference(got: Detections, expected: Detections) -> str | None:
    """How a served answer differs from the expected one; None: not beyond rounding."""
    if len(got) != len(expected):
        return f"{len(got)} detections, expected {len(expected)}"
    if len(got) == 0:
        return None
    if not np.array_equal(got.labels, expected.labels):
        return f"labels {got.labels.tolist()}, expected {expected.labels.tolist()}"
    boxes = float(np.abs(got.boxes - expected.boxes).max())
    if boxes > _BOX_TOLERANCE_PX:
        return f"boxes differ by {boxes:.3g} px"
    scores = float(np.abs(got.scores - expected.scores).max())
    return f"scores differ by {scores:.3g}" if scores > _SCORE_TOLERANCE else None


# ---------------------------------------------------------------------------------------------
# The whole way
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseRules:
    """What a candidate must fulfil, and how long it is watched."""

    max_loss: float = 0.01
    """AP50 that the candidate may lose against the live version, in [0, 1]."""
    watch_s: float = 10.0
    """Seconds on probation after the switch, at least 0."""
    num_probes: int = 4
    """Pictures that the server's answers are compared on, at least 1."""
    keep: int = 3
    """Versions that stay on disk, at least 2."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_loss <= 1 or self.watch_s < 0:
            raise ValueError(
                f"max_loss is {self.max_loss} and watch_s {self.watch_s}, expected a share in "
                "[0, 1] and at least 0 seconds"
            )
        if self.num_probes < 1 or self.keep < 2:
            raise ValueError(
                f"num_probes is {self.num_probes} and keep {self.keep}, expected at least 1 and 2"
            )


def release_detector(
    repository: Path,
    exportable: Exportable,
    folder: CocoFolder,
    control: ModelControl,
    *,
    export: ExportModel,
    method: Method = "auto",
    rules: ReleaseRules | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> ReleaseSummary:
    """Serve a new detector, if it is verified and not worse than the live one.

    Args:
        repository: Live, served by the server of ``control``.
        exportable: The new checkpoint.
        folder: Pictures with true boxes, for the metric and the probes.
        control: The server.
        export: Builds from nothing.
        method: See ``build_candidate``.
        rules: What it must fulfil; None: the defaults.
        on_step: See ``weaksam_rt.releases.publish``.

    Raises:
        ReleaseError: It is worse than the live one, or a check failed; the live version is served
            as before.
        ParityError: The engine's answers are not PyTorch's.
    """
    rules = rules or ReleaseRules()
    live = live_detector(repository)
    config = pipeline_file(repository, WEAKSAM_DETECT.name).config
    with tempfile.TemporaryDirectory(prefix="weaksam-release-") as scratch:
        candidate = build_candidate(
            exportable, live, Path(scratch) / DETECTOR, method=method, export=export
        )
        _LOGGER.info("%s and verification: %.1f s", candidate.method, candidate.seconds)
        ap50 = ap50_of_engine(candidate.artifact, folder, config.detection)
        live_ap50 = measured_ap50(live, folder, config.detection)
        _LOGGER.info("AP50 %.2f, live %.2f", 100 * ap50, 100 * live_ap50)
        if not ap50 >= live_ap50 - rules.max_loss:
            raise ReleaseError(
                f"AP50 on {folder.root.name} is {100 * ap50:.2f}, the live version has "
                f"{100 * live_ap50:.2f} and {100 * rules.max_loss:.2f} may be lost; nothing was "
                "changed"
            )
        artifact = with_ap50(candidate.artifact, ap50, folder, config.detection)
        probes = make_probes(artifact, config, _spread(folder, rules.num_probes))
        with WeakSamClient(control.address, control.config) as client:
            report = publish(
                repository,
                artifact,
                control,
                check_engine=lambda v: check_engine_answers(control, artifact, probes, v),
                watch=lambda v: watch_answers(client, probes, v, watch_s=rules.watch_s),
                keep=rules.keep,
                on_step=on_step,
            )
    return ReleaseSummary(
        report=report,
        method=candidate.method,
        build_seconds=round(candidate.seconds, 3),
        live_build_seconds=live.passport.exporter.get("seconds"),
        parity=artifact.passport.worst_parity,
        ap50=ap50,
        live_ap50=live_ap50,
    )


def _spread(folder: CocoFolder, count: int) -> list[Path]:
    records = folder.records
    if not records:
        raise WeakSamError(f"{folder.root} has no images")
    chosen = np.unique(np.linspace(0, len(records) - 1, count).round().astype(int))
    return [records[index].path for index in chosen]
