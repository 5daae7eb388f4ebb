"""From a new checkpoint to the version that is served: build, verify, compare, publish, watch.

Knows nothing about journals and switching (``weaksam_rt.releases``). Whether a candidate is good
enough is for its judge (``export.judges``), what the server must answer for its probes
(``export.probes``).
"""

import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from export.accept import accept_onnx
from export.engines.base import EngineBuildError
from export.engines.build import build_engine_like, check_buildable, was_built
from export.exportable import Exportable
from export.half_weights import round_weights_
from export.judges import Metrics, check_data, in_words, judge_of, losses, measured, with_metrics
from export.probes import calls_of, check_engine_answers, make_probes, watch_answers
from export.refit import RefitError, refit_onnx
from training.data.coco import CocoFolder
from training.engine.stage import fingerprint
from weaksam_rt.artifacts import ModelArtifact, load_artifact
from weaksam_rt.client import WeakSamClient
from weaksam_rt.contracts import PROMPT_CLUSTERING
from weaksam_rt.errors import ArtifactError, ReleaseError, WeakSamError
from weaksam_rt.live_repository import engine_versions_needed, pipeline_file, pipelines_of
from weaksam_rt.model_control import ModelControl
from weaksam_rt.releases import ReleaseReport, publish

_LOGGER = logging.getLogger(__name__)

Method = Literal["auto", "refit", "export"]
ExportModel = Callable[[Exportable, Path, bool], ModelArtifact]
"""Module, folder and whether weights are stored in half precision, to a verified artifact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A verified engine that is not served yet."""

    artifact: ModelArtifact
    method: Literal["refit", "export", "build"]
    seconds: float
    """To build and verify it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseSummary:
    """What a release did, for a person and for a machine."""

    report: ReleaseReport
    methods: Mapping[str, str]
    """By model: ``refit``, ``export`` or ``build``."""
    build_seconds: float
    """To build and verify the candidates."""
    live_build_seconds: float | None
    """What building the live engines from nothing took, as their passports say."""
    parity: float | None
    metrics: Metrics
    """Of the candidates, by key of ``METRIC_NAMES``."""
    live_metrics: Metrics

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        content = asdict(self)
        del content["report"]["release"]["configs"]  # the repository has them
        return content


def live_engines(repository: Path, models: Sequence[str]) -> dict[str, ModelArtifact]:
    """The engines that ``repository`` serves, verified, by model.

    Args:
        repository: Live.
        models: To be replaced.

    Returns:
        These, and all others that a pipeline with one of them calls.

    Raises:
        ArtifactError: It serves none of ``models``, or an engine cannot be trusted.
        BackendUnavailableError: This machine cannot build engines like these.
    """
    for model in models:
        if not engine_versions_needed(repository, model):
            raise ArtifactError(
                f"{repository} serves no {model}; build it with `python -m export repository`"
            )
    members = {
        member: version
        for model in models
        for pipeline in pipelines_of(repository, model)
        for member, version in pipeline_file(repository, pipeline).members.items()
        if member != PROMPT_CLUSTERING
    }
    found = {m: load_artifact(repository / m / str(v)) for m, v in members.items()}
    for model in models:
        if was_built(found[model]):
            check_buildable(found[model])
    return found


def check_calibration(
    live: Mapping[str, ModelArtifact], folder: CocoFolder, calibration: CocoFolder | None
) -> None:
    """Raise ``ValueError`` where a quantised successor would get no ranges, or take them from the
    images that it is judged on, which would favour it.

    Args:
        live: By model.
        folder: What candidate and live version are judged on.
        calibration: What ranges are taken from.
    """
    quantised = [m for m, engine in live.items() if engine.passport.precision in ("int8", "fp8")]
    if not quantised:
        return
    reason = None
    if calibration is None:
        reason = "none was given"
    elif fingerprint(calibration.root) == fingerprint(folder.root):
        reason = f"{calibration.root} has the images that the candidate is judged on"
    if reason is not None:
        raise ValueError(
            f"the live {' and '.join(quantised)} is quantised, and its successor needs a folder "
            f"of images to take its ranges from: {reason}; give --calibration with other images, "
            "such as those of the training"
        )


def build_candidate(
    exportable: Exportable,
    live: ModelArtifact,
    directory: Path,
    *,
    method: Method,
    export: ExportModel,
    calibration: CocoFolder | None = None,
) -> Candidate:
    """Build the engine of a new checkpoint, by the cheapest way that is right.

    A live engine that was built from an exported model (another runtime, a lower precision) gets a
    successor like it.

    Args:
        exportable: The new checkpoint.
        live: The engine that is served; a refit takes its graph.
        directory: Gets the artifact.
        method: ``auto`` refits where the weights fit the graph and exports otherwise.
        export: Builds from nothing.
        calibration: Images for the ranges of a quantised engine.

    Raises:
        RefitError: ``method`` is ``refit`` and the weights do not fit.
        ParityError: The engine's answers are not PyTorch's.
    """
    if was_built(live):
        return _build(exportable, live, directory, method, export, calibration)
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


def _build(
    exportable: Exportable,
    live: ModelArtifact,
    directory: Path,
    method: Method,
    export: ExportModel,
    calibration: CocoFolder | None,
) -> Candidate:
    start = time.perf_counter()
    source = export(exportable, directory.with_name(f"{directory.name}-exported"), False)
    if method != "export":
        try:
            engine = build_engine_like(live, source, directory, calibration=calibration, refit=True)
            return Candidate(artifact=engine, method="refit", seconds=time.perf_counter() - start)
        except (RefitError, EngineBuildError) as error:
            if method == "refit":
                raise
            _LOGGER.info("no refit: %s", error)
    engine = build_engine_like(live, source, directory, calibration=calibration)
    return Candidate(artifact=engine, method="build", seconds=time.perf_counter() - start)


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
# The whole way
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseRules:
    """What a candidate must fulfil, and how long it is watched."""

    max_loss: float = 0.01
    """What the candidate may lose of each task metric against the live version, in [0, 1]."""
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


def release(
    repository: Path,
    exportables: Sequence[Exportable],
    folder: CocoFolder,
    control: ModelControl,
    *,
    export: ExportModel,
    method: Method = "auto",
    calibration: CocoFolder | None = None,
    rules: ReleaseRules | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> ReleaseSummary:
    """Serve a new model, if it is verified and not worse than the live one.

    Args:
        repository: Live, served by the server of ``control``.
        exportables: The new checkpoint: a detector, a classifier, or both halves of a SAM.
        folder: Pictures with true boxes (detector), tags (classifier) or masks (SAM), for the
            metrics and the probes.
        control: The server.
        export: Builds from nothing.
        method: See ``build_candidate``.
        calibration: Other pictures, for the ranges of a candidate whose live engine is quantised.
        rules: What it must fulfil; None: the defaults.
        on_step: See ``weaksam_rt.releases.publish``.

    Raises:
        ReleaseError: It is worse than the live one, or a check failed; the live version is served
            as before.
        ParityError: An engine's answers are not PyTorch's.
        ArtifactError: The repository does not serve the model.
        BackendUnavailableError: This machine cannot build an engine like the live one.
        ValueError: ``folder`` has nothing to judge by, or the live engine is quantised and
            ``calibration`` is missing or ``folder``.
    """
    rules, judge = rules or ReleaseRules(), judge_of(exportables)
    check_data(judge, folder)
    engines = live_engines(repository, judge.models)
    live = {model: engines.pop(model) for model in judge.models}
    check_calibration(live, folder, calibration)
    pipelines = list(dict.fromkeys(p for m in live for p in pipelines_of(repository, m)))
    config = pipeline_file(repository, pipelines[0]).config
    with tempfile.TemporaryDirectory(prefix="weaksam-release-") as scratch:
        candidates = {
            e.model: build_candidate(
                e,
                live[e.model],
                Path(scratch) / e.model,
                method=method,
                export=export,
                calibration=calibration,
            )
            for e in exportables
        }
        built = {model: candidate.artifact for model, candidate in candidates.items()}
        metrics = judge.measure(built, folder, config)
        live_metrics = measured(judge, live, folder, config)
        _LOGGER.info("%s; live: %s", in_words(metrics), in_words(live_metrics))
        if lost := losses(metrics, live_metrics, rules.max_loss):
            raise ReleaseError(f"on {folder.root.name} {'; '.join(lost)}; nothing was changed")
        new = with_metrics(judge, built, metrics, folder, config)
        probes = make_probes(new, engines, pipelines, config, _spread(folder, rules.num_probes))
        calls = calls_of(new)
        with WeakSamClient(control.address, control.config) as client:
            report = publish(
                repository,
                list(new.values()),
                control,
                check_engine=lambda v: check_engine_answers(control, probes, v),
                watch=lambda v: watch_answers(client, probes, calls, v, watch_s=rules.watch_s),
                keep=rules.keep,
                on_step=on_step,
            )
    exported_in = [engine.passport.exporter.get("seconds", math.nan) for engine in live.values()]
    return ReleaseSummary(
        report=report,
        methods={model: candidate.method for model, candidate in candidates.items()},
        build_seconds=round(sum(c.seconds for c in candidates.values()), 3),
        live_build_seconds=None if math.isnan(sum(exported_in)) else sum(exported_in),
        parity=max((e.passport.worst_parity or 0.0 for e in new.values()), default=None),
        metrics=metrics,
        live_metrics=live_metrics,
    )


def _spread(folder: CocoFolder, count: int) -> list[Path]:
    records = folder.records
    if not records:
        raise WeakSamError(f"{folder.root} has no images")
    chosen = np.unique(np.linspace(0, len(records) - 1, count).round().astype(int))
    return [records[index].path for index in chosen]
