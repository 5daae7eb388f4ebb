"""Three releases and two ways back under a steady load, on a real server: who notices?

``python -m benchmarks swap --first A.safetensors --second B.safetensors --data FOLDER``: requests
leave at fixed times, whatever the answers do, and latency counts from the intended time. Every
answer is compared with what the version that it names answers in this process. Releases are the
user's own command in a process of its own.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console

from benchmarks.entry import enter
from benchmarks.reporting import report
from benchmarks.results import BenchmarkResult, Metric, Recorder, Table, artifact_record
from export.__main__ import export_model
from export.exportable import detector_exportable
from export.probes import answer_difference
from training.data.coco import load_coco_folder
from weaksam_rt.artifacts import ModelArtifact, load_artifact
from weaksam_rt.backends.local import LocalBackend
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.client import ClientConfig, WeakSamClient
from weaksam_rt.config import PipelineConfig
from weaksam_rt.contracts import DETECTOR
from weaksam_rt.errors import WeakSamError
from weaksam_rt.images import decode_reduced
from weaksam_rt.model_config import ServingOptions
from weaksam_rt.model_repository import build_model_repository
from weaksam_rt.pipeline import PipelineModels, WeakSamPipeline
from weaksam_rt.server import EmbeddedServer, ServerOptions
from weaksam_rt.types import Detections

_FAILING_RELEASE = """
import sys
from pathlib import Path
from weaksam_rt.artifacts import load_artifact
from weaksam_rt.model_control import ModelControl
from weaksam_rt.errors import ReleaseError
from weaksam_rt.releases import publish

def fail(version):
    raise ReleaseError("probation fails, because this benchmark wants it to")

with ModelControl(sys.argv[3]) as control:
    try:
        publish(Path(sys.argv[1]), [load_artifact(Path(sys.argv[2]))], control, keep=10,
                check_engine=lambda version: None, watch=fail,
                on_step=lambda step: print(" ", step, flush=True))
    except ReleaseError as error:
        print(error)
    else:
        sys.exit("the release was not taken back")
"""
"""A release whose probation fails: the forced way back."""
_MOST_IN_FLIGHT = 64
"""Requests on their way; more means that the server cannot keep up and nothing is measured."""
_FIRST_STEP = "journal"
"""What a release prints when it begins to change something."""


Kind = Literal["steady", "build", "swap"]
_WHILE: Mapping[Kind, str] = {
    "steady": "nothing else goes on",
    "build": "a release builds and verifies on the same machine",
    "swap": "versions are loaded, switched, watched and dropped",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SwapConfig:
    """The load and the releases."""

    requests: int = 2000
    """The load goes on until there are so many, at least 100."""
    rate: float | None = None
    """Requests a second; None: a third of what two clients get through."""
    num_images: int = 8
    """Different images sent."""
    engine_threads: int = 1
    """Threads of one operator in the engine."""
    niceness: int = 10
    """Of the releasing process."""
    watch_s: float = 3.0
    """Probation of each release."""

    def __post_init__(self) -> None:
        if self.requests < 100:
            raise ValueError(f"requests is {self.requests}, expected at least 100")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One request of the load."""

    image: int
    sent_at: float
    """When it was due, seconds."""
    latency_ms: float
    version: int
    """0: it failed."""
    detections: Detections | None
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """What was going on between two moments."""

    name: str
    kind: Literal["build", "swap"]
    """``build``: a candidate is built and verified. ``swap``: versions are loaded, switched,
    watched and dropped."""
    start: float
    end: float


class SteadyLoad:
    """Requests at fixed times from a pool of threads."""

    def __init__(self, address: str, images: Sequence[bytes], *, rate: float) -> None:
        self._client = WeakSamClient(address, ClientConfig(max_attempts=1))
        self._images, self._rate = images, rate
        self.answers: list[Answer] = []
        self._stop = threading.Event()
        self.most_waiting = 0
        self._pool = ThreadPoolExecutor(_MOST_IN_FLIGHT)
        self._thread = threading.Thread(target=self._send)

    def __enter__(self) -> "SteadyLoad":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._pool.shutdown()
        self._client.close()

    def _send(self) -> None:
        start, number = time.perf_counter(), 0
        while not self._stop.is_set():
            due = start + number / self._rate
            time.sleep(max(due - time.perf_counter(), 0))
            self._pool.submit(self._ask, number % len(self._images), due)
            number += 1
            self.most_waiting = max(self.most_waiting, number - len(self.answers))

    def _ask(self, image: int, due: float) -> None:
        version, detections, text = 0, None, ""
        try:
            result = self._client.detect(self._images[image])
            version, detections = result.version, result.detections
        except WeakSamError as error:
            text = f"{type(error).__name__}: {error}"
        self.answers.append(
            Answer(
                image=image,
                sent_at=due,
                latency_ms=1e3 * (time.perf_counter() - due),
                version=version,
                detections=detections,
                error=text,
            )
        )


def main(
    config: Annotated[SwapConfig, tyro.conf.arg(name="")] = SwapConfig(),
    *,
    first: Path,
    second: Path,
    data: Path,
    output: Path | None = None,
) -> None:
    """Measure and report.

    Args:
        config: The load and the releases.
        first: Weights of training.retrain_detector, served at the beginning.
        second: Weights of another training of the same classes.
        data: Folder with images/ and instances.json, for the releases' AP50 and for the requests.
        output: Path without suffix; result.json, .md and .html are written there.
    """
    report(measure(config, {"first": first, "second": second}, data), output)


def measure(config: SwapConfig, checkpoints: Mapping[str, Path], data: Path) -> BenchmarkResult:
    """All releases, one after the other, on a server of its own.

    Raises:
        RuntimeError: The machine cannot serve the load, or a release failed that must not.
    """
    console = Console()
    with tempfile.TemporaryDirectory(prefix="weaksam-swap-") as scratch:
        artifacts = {
            name: export_model(detector_exportable(path), Path(scratch) / name / DETECTOR)
            for name, path in checkpoints.items()
        }
        recorder = Recorder(
            what="swap",
            title="Releases under load",
            config=asdict(config),
            artifacts=tuple(map(artifact_record, artifacts.values())),
        )
        repository = Path(scratch) / "live"
        build_model_repository(
            [artifacts["first"]],
            repository,
            profile="embedded",
            config=PipelineConfig(),
            options=ServingOptions(engine_threads=config.engine_threads),
        )
        records = load_coco_folder(data).records[: config.num_images]
        images = [record.path.read_bytes() for record in records]
        with EmbeddedServer(repository, ServerOptions(load_models=("*",))) as server:
            rate = config.rate or _capacity(server.grpc_address, images) / 3
            console.print(f"load: {rate:.1f} requests a second")
            windows: list[Window] = []
            with SteadyLoad(server.grpc_address, images, rate=rate) as load:
                time.sleep(5)
                swaps = _swaps(
                    repository, checkpoints, artifacts, data, server.grpc_address,
                    niceness=config.niceness, watch_s=config.watch_s,
                )  # fmt: skip
                pause = max(config.requests / rate / (len(swaps) + 1), 2)
                for name, command in swaps.items():
                    windows += _timed(name, command)
                    console.print(f"{name}: {windows[-1].end - windows[-1].start:.1f} s of swap")
                    time.sleep(pause / 2)
                while len(load.answers) < config.requests:
                    time.sleep(0.2)
        if load.most_waiting > _MOST_IN_FLIGHT:
            raise RuntimeError(
                f"{load.most_waiting} requests were waiting at a time: this machine cannot serve "
                f"{rate:.1f} requests a second beside what else it does; lower --rate"
            )
        expected = _expected(_engines(repository, load.answers, artifacts["first"]), images)
        metrics = latency_metrics(load.answers, windows)
        return recorder.result(
            metrics,
            tables=_tables(load.answers, windows),
            notes=[*_findings(load.answers, expected, rate=rate), *_ratios(metrics)],
        )


# ---------------------------------------------------------------------------------------------
# What happens
# ---------------------------------------------------------------------------------------------


def _swaps(
    repository: Path,
    checkpoints: Mapping[str, Path],
    artifacts: Mapping[str, ModelArtifact],
    data: Path,
    address: str,
    *,
    niceness: int,
    watch_s: float,
) -> dict[str, list[str]]:
    """The commands, in order; each ends with another version served than before, or the same after
    a way back.
    """

    def release(name: str, method: str) -> list[str]:
        options = {
            "--detector": checkpoints[name], "--data": data, "--url": address, "--method": method,
            "--niceness": niceness, "--watch-s": watch_s, "--keep": 10, "--max-loss": 1.0,
        }  # fmt: skip
        flags = [str(part) for pair in options.items() for part in pair]
        return [sys.executable, "-m", "export", "release", str(repository), *flags]

    return {
        "release by refit": release("second", "refit"),
        "release by export": release("first", "export"),
        "release by refit again": release("second", "refit"),
        "probation fails, taken back": [
            sys.executable, "-c", _FAILING_RELEASE, str(repository),
            str(artifacts["first"].path.parent), address,
        ],
        "rollback": [
            sys.executable, "-m", "export", "rollback", str(repository), "--url", address,
        ],
    }  # fmt: skip


def _timed(name: str, command: Sequence[str]) -> list[Window]:
    """Run a command; when it built and when it swapped, by what it prints."""
    start = time.perf_counter()
    changed = None
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.strip() == _FIRST_STEP:
                changed = time.perf_counter()
    end = time.perf_counter()
    if process.returncode != 0 or changed is None:
        raise RuntimeError(f"{name} failed:\n{''.join(lines[-15:])}")
    return [
        Window(name=name, kind="build", start=start, end=changed),
        Window(name=name, kind="swap", start=changed, end=end),
    ]


def _capacity(address: str, images: Sequence[bytes], *, seconds: float = 6.0) -> float:
    """Requests a second that two clients get through."""
    with (
        WeakSamClient(address, ClientConfig(max_attempts=1)) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        end = time.perf_counter() + seconds

        def ask(first: int) -> int:
            count = 0
            while time.perf_counter() < end:
                client.detect(images[(first + count) % len(images)])
                count += 1
            return count

        return sum(pool.map(ask, range(2))) / seconds


# ---------------------------------------------------------------------------------------------
# What it shows
# ---------------------------------------------------------------------------------------------


def _engines(
    repository: Path, answers: Sequence[Answer], withdrawn: ModelArtifact
) -> dict[int, ModelArtifact]:
    """The engine of every version that answered; one of them was taken back and is gone."""
    folders = [p for p in (repository / DETECTOR).iterdir() if p.name.isdigit()]
    engines = {int(folder.name): load_artifact(folder) for folder in folders}
    taken_back = max(engines) + 1
    return {**engines, taken_back: withdrawn}


def _expected(
    versions: Mapping[int, ModelArtifact], images: Sequence[bytes]
) -> dict[int, list[Detections]]:
    """The answers of every version, computed in this process."""
    answers = {}
    for version, artifact in versions.items():
        parameters: Any = artifact.parameters
        pipeline = WeakSamPipeline(
            LocalBackend({DETECTOR: OnnxRuntimeModel(artifact, num_threads=1)}),
            PipelineModels(detector=parameters),
            PipelineConfig(),
        )
        side = pipeline.longest_side_seen(with_masks=False)
        answers[version] = [_detect(pipeline, data, side) for data in images]
    return answers


def _detect(pipeline: WeakSamPipeline, data: bytes, side: int) -> Detections:
    image = decode_reduced(data, side)
    return asyncio.run(pipeline.detect(image.pixels, image_size=image.image_size))


def latency_metrics(answers: Sequence[Answer], windows: Sequence[Window]) -> list[Metric]:
    """Latency by what went on meanwhile; each window, and each time between two, is a repeat.

    Raises:
        RuntimeError: No request fell into any window of a kind.
    """
    places: dict[Kind, dict[int, list[float]]] = {"steady": {}, "build": {}, "swap": {}}
    for answer in answers:
        kind, place = place_of(answer, windows)
        places[kind].setdefault(place, []).append(answer.latency_ms)
    if empty := [kind for kind, found in places.items() if not found]:
        raise RuntimeError(
            f"no request fell into a window of the kind {empty[0]}; send more requests a second"
        )
    return [
        Metric(
            name=f"latency while {_WHILE[kind]}",
            unit="ms",
            repeats=tuple(tuple(found[place]) for place in sorted(found)),
        )
        for kind, found in places.items()
    ]


def place_of(answer: Answer, windows: Sequence[Window]) -> tuple[Kind, int]:
    """What went on while this request was on its way, and in which window, or after how many; a
    swap counts before a build.
    """
    end = answer.sent_at + answer.latency_ms / 1e3
    during = [i for i, w in enumerate(windows) if answer.sent_at <= w.end and end >= w.start]
    kinds: tuple[Kind, ...] = ("swap", "build")
    for kind in kinds:
        for i in during:
            if windows[i].kind == kind:
                return kind, i
    return "steady", sum(w.end < answer.sent_at for w in windows)


def _findings(
    answers: Sequence[Answer], expected: Mapping[int, Sequence[Detections]], *, rate: float
) -> list[str]:
    failed = [answer.error for answer in answers if answer.error]
    wrong = [text for answer in answers if (text := _mismatch(answer, expected)) is not None]
    pairs = list(pairwise(sorted(expected)))
    distinct = sum(
        any(
            answer_difference(x, y) is not None
            for x, y in zip(expected[a], expected[b], strict=True)
        )
        for a, b in pairs
    )
    return [
        f"{len(failed)} of {len(answers)} requests failed. {len(wrong)} answers are not of the "
        "version they name.",
        f"Of {len(pairs)} successive versions {distinct} answer at least one image differently.",
        f"{rate:.1f} requests a second at fixed times, latency from the intended time.",
        *(f"Failed: {text}" for text in failed[:5]),
        *(f"Wrong: {text}" for text in wrong[:5]),
    ]


def _ratios(metrics: Sequence[Metric]) -> list[str]:
    steady, build, swap = (float(np.quantile(metric.samples, 0.99)) for metric in metrics)
    return [
        f"p99 while {_WHILE['build']} over p99 while {_WHILE['steady']}: {build / steady:.2f}.",
        f"p99 while {_WHILE['swap']} over p99 while {_WHILE['steady']}: {swap / steady:.2f}.",
    ]


def _mismatch(answer: Answer, expected: Mapping[int, Sequence[Detections]]) -> str | None:
    if answer.detections is None:
        return None  # counted among the failed
    if answer.version not in expected:
        return f"version {answer.version} was never released"
    return answer_difference(answer.detections, expected[answer.version][answer.image])


def _tables(answers: Sequence[Answer], windows: Sequence[Window]) -> list[Table]:
    seen = sorted(Counter(answer.version for answer in answers if not answer.error).items())
    return [
        Table(
            title="Answers by version",
            header=("version", "answers"),
            rows=tuple((str(version), str(number)) for version, number in seen),
        ),
        Table(
            title="What was done",
            header=("what", "part", "seconds"),
            rows=tuple((w.name, w.kind, f"{w.end - w.start:.1f}") for w in windows),
        ),
    ]


if __name__ == "__main__":
    enter(main)
