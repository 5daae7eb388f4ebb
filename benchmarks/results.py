"""One form for every measurement: what ran, where, on which artifacts, and all raw samples.

A result is one JSON file. Everything else that is shown of it (tables, pages, comparisons) is made
from that file, so it can be made again, or otherwise, by whoever doubts it.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.machine import Clocks, Machine, read_clocks, read_machine, read_versions
from benchmarks.statistics import Estimate, quantile_estimate
from training.engine.stage import git_commit
from weaksam_rt.artifacts import ModelArtifact
from weaksam_rt.errors import ArtifactError
from weaksam_rt.files import sha256_of_file, write_json

FORMAT = 1
QUANTILES = (0.5, 0.9, 0.99, 0.999)
_SIGNIFICANT_DIGITS = 5
_NO_ACCURACY = ("loss", "learning_rate", "gradient_norm")
"""Metrics of a training run that say how it went, not how good its model is."""
_QUIET_LOAD = 0.5
"""Load average for each core above which a machine is not quiet."""
_SAMPLES_BEYOND = 1
"""A quantile is shown only if at least so many samples lie beyond it."""

Better = Literal["lower", "higher"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactRecord:
    """A model that took part: its hash, and how accurate that very file is."""

    model: str
    engine: str
    sha256: str
    accuracy: Mapping[str, float]
    """What its manifest says was measured of its weights; empty where it says nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """Samples of one quantity, by repeat."""

    name: str
    unit: str
    repeats: tuple[tuple[float, ...], ...]
    """Raw samples; repeats are separated in time and take turns with those of other metrics."""
    better: Better = "lower"
    floor: float | None = None
    """The least (or, where higher is better, the most) that physics allows, in ``unit``."""
    floor_reason: str = ""
    """What sets the floor."""

    def __post_init__(self) -> None:
        if not self.repeats or not all(self.repeats):
            raise ValueError(f"metric {self.name!r} has a repeat without samples")

    @property
    def samples(self) -> tuple[float, ...]:
        """Of all repeats."""
        return tuple(value for repeat in self.repeats for value in repeat)

    def quantile(self, q: float) -> Estimate | None:
        """The quantile and its interval; None where too few samples lie beyond it."""
        # Of a single sample the median is shown: it is the sample.
        if q > 0.5 and (1 - q) * len(self.samples) < _SAMPLES_BEYOND:
            return None
        return quantile_estimate(self.repeats, q)

    @property
    def percent_of_floor(self) -> float | None:
        """How near the median comes to the floor, in percent; 100 is as good as physics allows, and
        more means that the floor was measured wrongly.
        """
        if self.floor is None:
            return None
        median = float(np.median(self.samples))
        part, whole = (self.floor, median) if self.better == "lower" else (median, self.floor)
        return 100 * part / whole if whole > 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One point of a curve."""

    x: float
    y: float
    low: float
    """Lower end of the interval of ``y``."""
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """A curve; those with equal ``plot`` share axes."""

    plot: str
    """Title of the plot."""
    name: str
    x_label: str
    y_label: str
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One step of a request."""

    name: str
    milliseconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Waterfall:
    """The steps of a request, one after the other."""

    title: str
    stages: tuple[Stage, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Figures that are no samples."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkResult:
    """Everything that one run of one benchmark found out."""

    what: str
    """The name behind ``python -m benchmarks``."""
    title: str
    command: str
    commit: str
    machine: Machine
    versions: Mapping[str, str]
    clocks: tuple[Clocks, ...]
    """At the start and at the end."""
    config: Mapping[str, Any]
    artifacts: tuple[ArtifactRecord, ...]
    metrics: tuple[Metric, ...]
    series: tuple[Series, ...] = ()
    waterfalls: tuple[Waterfall, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    """Conclusions and reservations, one sentence each."""
    format: int = field(default=FORMAT)

    def metric(self, name: str) -> Metric:
        """The metric called ``name``; raises ``ValueError`` that lists the names."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise ValueError(f"no metric {name!r}; there are {[m.name for m in self.metrics]}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorder:
    """Collects what surrounds a measurement; made before it, used once after it."""

    what: str
    title: str
    config: Mapping[str, Any]
    artifacts: tuple[ArtifactRecord, ...]
    clocks: Clocks = field(default_factory=read_clocks)

    def result(
        self,
        metrics: Sequence[Metric],
        *,
        series: Sequence[Series] = (),
        waterfalls: Sequence[Waterfall] = (),
        tables: Sequence[Table] = (),
        notes: Sequence[str] = (),
    ) -> BenchmarkResult:
        """The result of this run; it says by itself if others used the machine."""
        machine = read_machine()
        return BenchmarkResult(
            what=self.what,
            title=self.title,
            command=command_line(self.what, sys.argv[1:]),
            commit=git_commit(),
            machine=machine,
            versions=read_versions(),
            clocks=(self.clocks, read_clocks()),
            config=self.config,
            artifacts=self.artifacts,
            metrics=tuple(metrics),
            series=tuple(series),
            waterfalls=tuple(waterfalls),
            tables=tuple(tables),
            notes=(*notes, *_reservations(self.clocks, machine, metrics)),
        )


def _reservations(before: Clocks, machine: Machine, metrics: Sequence[Metric]) -> list[str]:
    """What must be said where others were at work when the measurement began, or meanwhile."""
    said = []
    if before.load_average > _QUIET_LOAD * machine.cores:
        said.append(
            f"The machine was busy before this began (load average {before.load_average:.1f} on "
            f"{machine.cores} cores): read ratios within this run only, and measure again when "
            "quiet."
        )
    beyond = [m.name for m in metrics if (m.percent_of_floor or 0) > 100]
    if beyond:
        said.append(
            f"{', '.join(beyond)}: better than the floor, so the limits were measured too low; the "
            "machine was busy then, measure again when quiet."
        )
    return said


def artifact_record(artifact: ModelArtifact) -> ArtifactRecord:
    """What a result says about an exported model."""
    metrics = artifact.provenance.get("source", {})
    metrics = metrics.get("metrics", {}) if isinstance(metrics, Mapping) else {}
    return ArtifactRecord(
        model=artifact.model,
        engine=artifact.engine,
        sha256=sha256_of_file(artifact.path),
        accuracy={
            name: value
            for name, value in _flat_numbers(metrics).items()
            if not name.startswith(_NO_ACCURACY)
        },
    )


def file_record(model: str, path: Path) -> ArtifactRecord:
    """What a result says about a file of weights without a manifest."""
    return ArtifactRecord(
        model=model, engine=path.suffix.lstrip("."), sha256=sha256_of_file(path), accuracy={}
    )


def command_line(what: str, arguments: Sequence[str]) -> str:
    """The command to run again; absolute paths are cut to their last two parts, so that a result
    names no machine's folders.
    """
    rest = arguments[1:] if arguments[:1] == [what] else arguments
    shown = ["/".join(Path(a).parts[-2:]) if a.startswith("/") else a for a in rest]
    return " ".join(["python -m benchmarks", what, *shown])


def write_result(result: BenchmarkResult, path: Path) -> None:
    """Write ``path`` as JSON, atomically; samples keep 5 significant digits."""
    write_json(path, _rounded(asdict(result)))


def read_result(path: Path) -> BenchmarkResult:
    """Read what ``write_result`` wrote.

    Raises:
        ArtifactError: The file is missing, or no result of this format.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ArtifactError(f"{path} has format {content['format']}, this reads {FORMAT}")
        return _result_from_json(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is no benchmark result ({error}); give a file that `python -m benchmarks` "
            "wrote"
        ) from error


def _result_from_json(content: Mapping[str, Any]) -> BenchmarkResult:
    read = dict(content)
    read["machine"] = Machine(**{**content["machine"], "gpus": tuple(content["machine"]["gpus"])})
    read["clocks"] = tuple(Clocks(**clock) for clock in content["clocks"])
    read["artifacts"] = tuple(ArtifactRecord(**record) for record in content["artifacts"])
    read["metrics"] = tuple(
        Metric(**{**metric, "repeats": tuple(map(tuple, metric["repeats"]))})
        for metric in content["metrics"]
    )
    read["series"] = tuple(
        Series(**{**series, "points": tuple(Point(**point) for point in series["points"])})
        for series in content["series"]
    )
    read["waterfalls"] = tuple(
        Waterfall(title=fall["title"], stages=tuple(Stage(**stage) for stage in fall["stages"]))
        for fall in content["waterfalls"]
    )
    read["tables"] = tuple(
        Table(
            title=table["title"],
            header=tuple(table["header"]),
            rows=tuple(map(tuple, table["rows"])),
        )
        for table in content["tables"]
    )
    read["notes"] = tuple(content["notes"])
    return BenchmarkResult(**read)


def _flat_numbers(value: Any, prefix: str = "") -> dict[str, float]:
    """Numbers of nested mappings by their dotted path."""
    if isinstance(value, Mapping):
        parts = (
            _flat_numbers(inner, f"{prefix}.{key}" if prefix else str(key))
            for key, inner in value.items()
        )
        return {name: number for part in parts for name, number in part.items()}
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {prefix: float(value)} if is_number else {}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return value
