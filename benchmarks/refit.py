"""What exchanging weights costs beside building anew, and what a refittable engine costs to run.

``python -m benchmarks refit --detector ... --classifier ... --sam ...`` takes each checkpoint and a
second one of the same topology (its weights, disturbed), and measures

- ONNX Runtime: seconds to write the second checkpoint's weights into the first one's graph, and to
  export it anew, both with the comparison with PyTorch that ends them; then the two engines called
  in turns: their ratio is the refitted engine's slowdown.
- TensorRT-RTX: size and build time with and without refitting allowed, both called in turns, and
  seconds to exchange the refittable one's weights for the second checkpoint's. This library
  builds refittable engines only where a GPU is: without one, that is what is said.

Ratios are of one run, repeat by repeat, with Student's interval over the repeats.
"""

import copy
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from rich.progress import Progress

from benchmarks.entry import enter
from benchmarks.statistics import Estimate, quantile_estimate
from export.__main__ import export_model
from export.accept import accept_onnx
from export.engines.base import EngineConfig
from export.engines.build import build_engine, build_engine_like
from export.engines.profiles import default_profiles
from export.engines.tensorrt import this_gpu
from export.exportable import Exportable, chosen_exportables
from export.refit import RefitError, refit_onnx
from training.engine.progress import stage_progress
from training.engine.stage import git_commit
from weaksam_rt.artifacts import ModelArtifact, load_artifact
from weaksam_rt.backends.base import Arrays
from weaksam_rt.backends.engines import open_engine
from weaksam_rt.backends.local import ModelFunction
from weaksam_rt.errors import BackendUnavailableError, WeakSamError
from weaksam_rt.files import atomic_path, write_json

_DISTURBANCE = 1e-3
"""Of the second checkpoint's weights, relative."""
_AHEAD_OF_TIME = ("8.9",)
_RTX = "tensorrt-rtx"
_SECOND = "second"
"""Folder of the second checkpoint's export."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitRow:
    """One model under ONNX Runtime."""

    model: str
    sha256: str
    """Of the checkpoint."""
    export_s: float
    """Of the second checkpoint, without the comparison with PyTorch."""
    refit_s: float | None = None
    """Likewise; None: the weights do not fit the graph."""
    verify_s: float | None = None
    """The comparison with PyTorch, after the refit."""
    slowdown: Estimate | None = None
    """Seconds of the refitted engine by those of the exported one, one image."""
    largest_difference: float | None = None
    """Of any output of the two, absolute."""
    remark: str = ""
    """Why there is no refit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RtxRow:
    """One model under TensorRT-RTX, refitting not allowed and allowed."""

    model: str
    size_bytes: tuple[int, ...]
    """Of the plain engine and, if it was built, the refittable one."""
    build_s: tuple[tuple[float, ...], ...]
    """Of every build, likewise."""
    slowdown: Estimate | None
    """Seconds of the refittable engine by those of the other; None: not measured."""
    refit_s: tuple[float, ...]
    """Of every exchange of the refittable engine's weights; without the comparison that ends it."""
    remark: str
    """Why something is missing; empty: nothing is."""


def main(
    *,
    detector: Path | None = None,
    classifier: Path | None = None,
    sam: Path | None = None,
    repeats: int = 8,
    calls: int = 16,
    builds: int = 3,
    output: Path = Path("benchmarks/results/refit"),
) -> None:
    """Measure and write ``output``.md and .json.

    Args:
        detector: Weights of training.retrain_detector.
        classifier: Weights of training.train_classifier.
        sam: Weights of training.train_sam, or an official checkpoint.
        repeats: Of each ratio, at least 2.
        calls: Of each engine in a repeat.
        builds: Of each TensorRT-RTX engine, and refits, at least 1.
        output: Report without its endings.
    """
    chosen = chosen_exportables(detector, classifier, sam)
    if not chosen:
        raise ValueError("nothing to measure: give --detector, --classifier or --sam")
    torch.set_num_threads(1)
    rows, rtx = [], []
    with tempfile.TemporaryDirectory(prefix="weaksam-refit-") as scratch, stage_progress() as bars:
        bar = bars.add_task("refit", total=2 * len(chosen))
        for exportable in chosen:
            folder = Path(scratch) / exportable.model
            first = export_model(exportable, folder / "first")
            rows.append(_onnx_row(exportable, first, folder, repeats, calls))
            bars.advance(bar)
            rtx.append(_rtx_row(first, exportable, folder, repeats, calls, builds))
            _done(bars, bar, exportable.model)
    weights = {"--detector": detector, "--classifier": classifier, "--sam": sam}
    flags = [f"{flag} {path.name}" for flag, path in weights.items() if path is not None]
    command = f"python -m benchmarks refit {' '.join(flags)}"
    machine = f"{platform.machine()}, ONNX Runtime {onnxruntime.__version__}, 1 thread"
    facts = {"command": command, "commit": git_commit(), "machine": machine, "repeats": repeats}
    content = {**facts, "onnxruntime": [asdict(r) for r in rows], _RTX: [asdict(r) for r in rtx]}
    write_json(output.with_suffix(".json"), content)
    with atomic_path(output.with_suffix(".md")) as temporary:
        temporary.write_text(_report(rows, rtx, facts))


def _done(bars: Progress, bar: int, model: str) -> None:
    bars.advance(bars.task_ids[bar])
    bars.console.print(f"{model} done", markup=False)


def _onnx_row(
    exportable: Exportable, first: ModelArtifact, folder: Path, repeats: int, calls: int
) -> RefitRow:
    second = _disturbed(exportable)
    fresh = export_model(second, folder / _SECOND)
    export_s, sha256 = fresh.passport.exporter["seconds"], exportable.source["sha256"]
    path = folder / "refit" / first.path.name
    path.parent.mkdir(parents=True)
    start = time.perf_counter()
    try:
        refit_onnx(first, second.module, path)
    except RefitError as error:
        return RefitRow(model=exportable.model, sha256=sha256, export_s=export_s, remark=str(error))
    refit_s = time.perf_counter() - start
    refitted = accept_onnx(path, second, {})
    verify_s = time.perf_counter() - start - refit_s
    engines = [open_engine(artifact, num_threads=1) for artifact in (fresh, refitted)]
    inputs = _one_image(exportable)
    answers = [engine(inputs, None) for engine in engines]
    return RefitRow(
        model=exportable.model,
        sha256=sha256,
        export_s=export_s,
        refit_s=refit_s,
        verify_s=verify_s,
        slowdown=_ratio(engines, inputs, repeats, calls),
        largest_difference=max(
            float(np.abs(a.astype(np.float64) - answers[1][n]).max()) for n, a in answers[0].items()
        ),
    )


def _disturbed(exportable: Exportable) -> Exportable:
    """Another checkpoint of the same topology."""
    module = copy.deepcopy(exportable.module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1 + _DISTURBANCE * noise)
    return Exportable(
        model=exportable.model,
        module=module,
        parameters=exportable.parameters,
        inputs=exportable.inputs,
        tolerance=exportable.tolerance,
        source=exportable.source,
    )


def _one_image(exportable: Exportable) -> Arrays:
    inputs: Sequence[Arrays] = exportable.inputs
    return inputs[1]


def _ratio(engines: Sequence[ModelFunction], inputs: Arrays, repeats: int, calls: int) -> Estimate:
    """Median seconds of the second engine by the first's, call by call in turns; who comes first
    changes from call to call.
    """
    for engine in engines:
        engine(inputs, None)
    ratios = []
    for _ in range(repeats):
        seconds: list[list[float]] = [[], []]
        for call in range(calls):
            for which in (call % 2, 1 - call % 2):
                seconds[which].append(_seconds(engines[which], inputs))
        first, second = (float(np.median(s)) for s in seconds)
        ratios.append([second / first])
    return quantile_estimate(ratios, 0.5)


def _seconds(engine: Callable[..., object], inputs: Arrays) -> float:
    start = time.perf_counter()
    engine(inputs, None)
    return time.perf_counter() - start


def _rtx_row(
    source: ModelArtifact,
    exportable: Exportable,
    folder: Path,
    repeats: int,
    calls: int,
    builds: int,
) -> RtxRow:
    try:
        capabilities, remark = (this_gpu(),), ""
    except BackendUnavailableError as error:
        capabilities, remark = _AHEAD_OF_TIME, str(error)
    seconds: dict[bool, list[float]] = {False: [], True: []}  # by refittable
    engines: dict[bool, ModelArtifact] = {}
    try:
        for refittable in (False, True):
            for number in range(builds):
                config = EngineConfig(
                    compute_capabilities=capabilities,
                    profiles=default_profiles(source.contract)[-1:],
                    refittable=refittable,
                )
                built = build_engine(
                    source, folder / f"rtx{number}{refittable}", engine=_RTX, config=config
                )
                seconds[refittable].append(built.passport.exporter["seconds"])
                engines[refittable] = built
    except (WeakSamError, ValueError) as error:
        remark = str(error)
    slowdown, refit_s = None, []
    if not remark:
        try:
            opened = [open_engine(engines[refittable]) for refittable in (False, True)]
            slowdown = _ratio(opened, _one_image(exportable), repeats, calls)
            second = load_artifact(folder / _SECOND)
            for number in range(builds):
                refitted = build_engine_like(
                    engines[True], second, folder / f"refit{number}", refit=True
                )
                refit_s.append(refitted.passport.exporter["refit"]["seconds"])
        except (WeakSamError, ValueError) as error:
            remark = str(error)
    return RtxRow(
        model=source.model,
        size_bytes=tuple(engines[kind].path.stat().st_size for kind in sorted(engines)),
        build_s=tuple(tuple(seconds[kind]) for kind in sorted(engines)),
        slowdown=slowdown,
        refit_s=tuple(refit_s),
        remark=remark,
    )


def _report(rows: Sequence[RefitRow], rtx: Sequence[RtxRow], facts: dict[str, object]) -> str:
    lines = [
        "# Refits: what they cost and what they save",
        "",
        f"`{facts['command']}`, commit {facts['commit']}; {facts['machine']}. Ratios are medians "
        f"of {facts['repeats']} repeats with 95 % intervals, both engines called in turns in one "
        "run. Seconds are of a machine with other work: good for their order only.",
        "",
        "## ONNX Runtime",
        "",
        "The second checkpoint's weights in the first one's graph, beside an export of it. Both "
        "end with the comparison with PyTorch (*verify*).",
        "",
        "| model | refit s | export s | verify s | refitted by exported engine's seconds | largest "
        "difference |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_onnx_line(row) for row in rows]
    lines += [
        "",
        "## TensorRT-RTX",
        "",
        "| model | MB | MB refittable | build s | build s refittable | refit s | refittable by "
        "plain engine's seconds |",
        "|---|---|---|---|---|---|---|",
        *(_rtx_line(row) for row in rtx),
        "",
        *(
            f"- not run: {remark}"
            for remark in dict.fromkeys(row.remark for row in rtx if row.remark)
        ),
    ]
    return "\n".join(lines) + "\n"


def _onnx_line(row: RefitRow) -> str:
    if row.refit_s is None or row.slowdown is None:
        return f"| {row.model} | no refit: {row.remark} | {row.export_s:.1f} | | | |"
    return (
        f"| {row.model} | {row.refit_s:.2f} | {row.export_s:.1f} | {row.verify_s:.1f} | "
        f"{_shown(row.slowdown)} | {row.largest_difference:.1g} |"
    )


def _rtx_line(row: RtxRow) -> str:
    sizes = [f"{size / 1e6:.2f}" for size in row.size_bytes]
    seconds = [f"{np.median(times):.1f}" for times in row.build_s]
    cells = (
        row.model,
        *[*sizes, "", ""][:2],
        *[*seconds, "", ""][:2],
        f"{np.median(row.refit_s):.1f}" if row.refit_s else "",
        "not run" if row.slowdown is None else _shown(row.slowdown),
    )
    return f"| {' | '.join(cells)} |"


def _shown(ratio: Estimate) -> str:
    return f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


if __name__ == "__main__":
    enter(main)
