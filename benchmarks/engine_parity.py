"""Every exported model in every engine and precision that can be built or run here.

Run ``python -m benchmarks.engine_parity assets/demo_models --data FOLDER``, a COCO-format folder
with boxes and masks. What runs on this machine is compared with the float32 ONNX model on the
folder's images: largest error, boxes, prompts or masks against float32's, and the task metric.
TensorRT-RTX engines are built for each compute capability alone; they need a GPU to run.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, TaskID

from benchmarks.entry import enter
from export.agreement import Agreement, agreement, on_average, prompt_agreement
from export.doctor_command import finite_json
from export.engines.base import EngineBuildError, EngineConfig, EnginePrecision
from export.engines.build import build_engine, exported_onnx
from export.engines.profiles import default_profiles
from export.exportable import example_inputs
from export.graph_model import GraphModel
from export.mixed_precision import KeepFp32, emulated, expand_normalizations, lower_precision
from export.precision_doctor import Diagnosis, diagnose
from export.quantization import quantized
from export.task_metrics import image_inputs, spread, task_metric
from export.verify import ParityError
from training.data.coco import CocoFolder, load_coco_folder
from training.engine.progress import stage_progress
from training.engine.stage import git_commit
from weaksam_rt.artifacts import ModelArtifact
from weaksam_rt.backends.base import Arrays
from weaksam_rt.backends.local import ModelFunction
from weaksam_rt.contracts import DETECTOR, SAM_MASK_DECODER, VIT_CLASSIFIER
from weaksam_rt.errors import BackendUnavailableError
from weaksam_rt.files import atomic_path, write_json

_CAPABILITIES = ("8.0", "8.9", "12.0")
_ADA = ("8.9",)
"""For int8 and fp8: the first that has both."""
_RTX_PRECISIONS: tuple[EnginePrecision, ...] = ("fp32", "fp16", "bf16", "int8", "fp8")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityRow:
    """One model in one engine and precision."""

    model: str
    engine: str
    precision: str
    agreement: Agreement | None
    """With float32; None: it does not open."""
    overlap: float | None
    """With float32's boxes (detector), prompts (classifier) or masks (decoder), in [0, 1]."""
    metric: Mapping[str, float]
    """Task metric; empty where the model has none."""
    change: Mapping[str, float]
    """Of the task metric against float32."""
    images: int
    """On which the task metric was measured."""
    error: str | None = None
    """Why ONNX Runtime does not open it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildRow:
    """One TensorRT-RTX engine."""

    model: str
    precision: str
    compute_capabilities: tuple[str, ...]
    size_bytes: int | None
    build_s: float | None
    error: str | None
    """Why it was not built."""


def main(
    models: Annotated[Path, tyro.conf.Positional],
    *,
    data: Path,
    calibration: Path | None = None,
    max_images: int = 50,
    calibration_images: int = 32,
    parity_images: int = 4,
    only: tuple[str, ...] = (),
    parity: bool = True,
    build: bool = True,
    output: Path = Path("benchmarks/results/engine_parity"),
) -> None:
    """Measure and write ``output``.md and .json; rows of other models that are there stay.

    Args:
        models: Folder of exported models.
        data: COCO-format folder with boxes and masks.
        calibration: Another one for int8 and fp8; None: ``train`` beside ``data``.
        max_images: Of ``data`` for the task metric, spread evenly.
        calibration_images: Of ``calibration``.
        parity_images: Of ``data`` for errors and overlaps.
        only: Names of models; empty: all.
        parity: Run and compare; else what was measured before stays.
        build: Also build TensorRT-RTX engines.
        output: Report without its endings.
    """
    folder = spread(load_coco_folder(data), max_images)
    other = calibration or data.parent / "train"
    calibration_folder = spread(load_coco_folder(other), calibration_images)
    for artifact in exported_onnx(models):
        if only and artifact.model not in only:
            continue
        Console().print(f"{artifact.model} ...", markup=False)
        prepared = _prepare(artifact, folder, calibration_folder, parity_images)
        command = (
            f"python -m benchmarks.engine_parity {models} --data {_shown(data)} "
            f"--only {artifact.model} --max-images {max_images} --parity-images {parity_images} "
            f"--calibration-images {calibration_images}"
            f"{'' if parity else ' --no-parity'}{'' if build else ' --no-build'}"
        )
        found: dict[str, Any] = {
            "commands": [
                {"model": artifact.model, "of": name, "command": command, "commit": git_commit()}
                for name, is_measured in (("parity", parity), ("builds", build))
                if is_measured
            ],
            "kept": [
                {"precision": p, "nodes": d.num_nodes, "keep": d.keep, "model": artifact.model}
                for p, d in prepared.diagnoses.items()
            ],
        }
        if parity:
            with stage_progress() as progress:
                found["parity"] = [asdict(row) for row in _parity_rows(prepared, folder, progress)]
        if build:
            found["builds"] = [asdict(row) for row in _builds(prepared)]
        _write(output, artifact.model, finite_json(found))
    Console().print(output.with_suffix(".md").read_text(), markup=False, soft_wrap=True)


def _shown(data: Path) -> str:
    """The folder as a command on another machine names it."""
    root = os.environ.get("WEAKSAM_DATA")
    if root is not None and data.resolve().is_relative_to(Path(root).resolve()):
        return f"$WEAKSAM_DATA/{data.resolve().relative_to(Path(root).resolve())}"
    return f"{data.parent.name}/{data.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
    """A model with everything its rows share."""

    artifact: ModelArtifact
    graph: onnx.ModelProto
    inputs: Sequence[Arrays]
    diagnoses: Mapping[str, Diagnosis]
    quantized: Mapping[str, onnx.ModelProto]


def _prepare(
    artifact: ModelArtifact, folder: CocoFolder, calibration: CocoFolder, parity_images: int
) -> _Prepared:
    graph = onnx.load(artifact.path)
    reads_images = artifact.model != SAM_MASK_DECODER
    inputs: list[Arrays] = [*example_inputs(artifact.model, artifact.parameters)]
    quantised = {}
    if reads_images:
        few = spread(folder, parity_images).records
        inputs = [image_inputs(artifact.model, artifact.parameters, r) for r in few]
        shown = [image_inputs(artifact.model, artifact.parameters, r) for r in calibration.records]
        quantised = {
            "int8": quantized(graph, shown, "int8"),
            "fp8": quantized(graph, shown, "fp8"),
        }
    diagnoses = {
        "fp16": diagnose(graph, artifact.model, inputs[:1], precision="fp16"),
        "bf16": diagnose(graph, artifact.model, inputs[:1], precision="bf16"),
    }
    return _Prepared(
        artifact=artifact, graph=graph, inputs=inputs, diagnoses=diagnoses, quantized=quantised
    )


def _write(output: Path, model: str, found: Mapping[str, Any]) -> None:
    """Replace the rows of one model; after every model, because a build can take long."""
    path = output.with_suffix(".json")
    before = json.loads(path.read_text()) if path.is_file() else {}

    def is_replaced(name: str, row: Mapping[str, Any]) -> bool:
        return row["model"] == model and row.get("of", name) in found

    tables = {
        name: [row for row in before.get(name, []) if not is_replaced(name, row)]
        + found.get(name, [])
        for name in ("commands", "parity", "kept", "builds")
    }
    for rows in tables.values():
        rows.sort(key=lambda row: str(row["model"]))
    machine = f"{platform.machine()}, CPU, ONNX Runtime {onnxruntime.__version__}"
    write_json(path, {"machine": machine, **tables})
    with atomic_path(output.with_suffix(".md")) as temporary:
        temporary.write_text(_report(tables, machine))


def _counted(run: ModelFunction, progress: Progress, bar: TaskID) -> ModelFunction:
    """The same function; every call moves the bar on."""

    def counted(inputs: Arrays, outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        progress.advance(bar)
        return run(inputs, outputs)

    return counted


def _parity_rows(prepared: _Prepared, folder: CocoFolder, progress: Progress) -> list[ParityRow]:
    model = prepared.artifact.model
    reference = GraphModel(prepared.graph, optimized=True)
    expected = [reference(arrays) for arrays in prepared.inputs]
    runnable = _runnable(prepared)
    bar = progress.add_task(model, total=(len(runnable) + 1) * len(folder.records))
    usual = task_metric(prepared.artifact, _counted(reference, progress, bar), folder)
    rows = []
    for (engine, precision), opened in runnable.items():
        try:
            run = opened()
        except Exception as error:  # ONNX Runtime's own types derive from nothing else
            rows.append(_refused(model, engine, precision, error))
            continue
        got = [run(arrays) for arrays in prepared.inputs]
        metric = task_metric(prepared.artifact, _counted(run, progress, bar), folder)
        pairs = list(zip(expected, got, strict=True))
        rows.append(
            ParityRow(
                model=model,
                engine=engine,
                precision=precision,
                agreement=on_average([agreement(model, e, g) for e, g in pairs]),
                overlap=_overlap(model, pairs),
                metric=metric,
                change={name: value - usual[name] for name, value in metric.items()},
                images=len(folder.records),
            )
        )
    return rows


def _refused(model: str, engine: str, precision: str, error: Exception) -> ParityRow:
    reason = str(error).splitlines()[0].rpartition("/")[2]
    return ParityRow(
        model=model,
        engine=engine,
        precision=precision,
        agreement=None,
        overlap=None,
        metric={},
        change={},
        images=0,
        error=reason,
    )


def _runnable(prepared: _Prepared) -> dict[tuple[str, str], Callable[[], GraphModel]]:
    """What this machine runs, by engine and precision. Emulated rows round as a GPU would."""
    graph, expanded = prepared.graph, expand_normalizations(prepared.graph)
    rows: dict[tuple[str, str], Callable[[], GraphModel]] = {
        ("onnxruntime", "fp32"): partial(GraphModel, graph, optimized=True),
        ("onnxruntime", "fp16"): partial(
            GraphModel, lower_precision(graph, "fp16"), optimized=True
        ),
    }
    for precision, diagnosis in prepared.diagnoses.items():
        keep = KeepFp32(nodes=frozenset(diagnosis.keep))
        kinds = {"": KeepFp32()} | ({f" + {len(keep.nodes)} fp32": keep} if keep.nodes else {})
        for label, kept in kinds.items():
            mixed = emulated(lower_precision(expanded, diagnosis.precision, kept))
            rows["emulated", f"{precision}{label}"] = partial(GraphModel, mixed)
    if "int8" in prepared.quantized:
        int8, fp8 = prepared.quantized["int8"], prepared.quantized["fp8"]
        rows["onnxruntime", "int8"] = partial(GraphModel, int8, optimized=True)
        rows["onnxruntime", "fp8"] = partial(GraphModel, fp8, optimized=True)
        rows["onnxruntime, not optimised", "fp8"] = partial(GraphModel, fp8)
    return rows


def _overlap(model: str, pairs: Sequence[tuple[Arrays, Arrays]]) -> float | None:
    """Mean IoU of masks, agreement of prompts, or what ``Agreement.distance`` says of boxes."""
    if model == DETECTOR:
        return 1 - float(np.mean([agreement(model, e, g).distance for e, g in pairs]))
    if model == VIT_CLASSIFIER:
        return float(np.mean([prompt_agreement(e, g) for e, g in pairs]))
    if model != SAM_MASK_DECODER:
        return None
    masks = [(e["low_res_logits"] > 0, g["low_res_logits"] > 0) for e, g in pairs]
    iou = [((a & b).sum((2, 3)) + 1e-9) / ((a | b).sum((2, 3)) + 1e-9) for a, b in masks]
    return float(np.concatenate([part.ravel() for part in iou]).mean())


def _builds(prepared: _Prepared) -> list[BuildRow]:
    rows = []
    for precision in _RTX_PRECISIONS:
        is_quantized = precision in ("int8", "fp8")
        if is_quantized and precision not in prepared.quantized:
            continue
        targets = _ADA if is_quantized else _CAPABILITIES
        rows += [_build(prepared, precision, (target,)) for target in targets]
    return rows


def _build(
    prepared: _Prepared, precision: EnginePrecision, capabilities: tuple[str, ...]
) -> BuildRow:
    diagnosis = prepared.diagnoses.get(precision)
    config = EngineConfig(
        precision=precision,
        keep_fp32=KeepFp32(nodes=frozenset(diagnosis.keep if diagnosis else ())),
        compute_capabilities=capabilities,
        profiles=default_profiles(prepared.artifact.contract)[-1:],
    )
    size, seconds, error = None, None, None
    with tempfile.TemporaryDirectory(prefix="weaksam-parity-") as folder:
        start = time.perf_counter()
        try:
            built = build_engine(
                prepared.artifact,
                Path(folder) / "engine",
                engine="tensorrt-rtx",
                config=config,
                graph=prepared.quantized.get(precision),
            )
            size, seconds = built.path.stat().st_size, time.perf_counter() - start
        except (EngineBuildError, BackendUnavailableError, ParityError) as refusal:
            error = str(refusal)
    return BuildRow(
        model=prepared.artifact.model,
        precision=precision,
        compute_capabilities=capabilities,
        size_bytes=size,
        build_s=seconds,
        error=error,
    )


def _report(tables: Mapping[str, Sequence[Mapping[str, Any]]], machine: str) -> str:
    lines = [
        "# Engines beside float32 ONNX",
        "",
        f"- {machine}",
        *(
            f"- {row['of']}: `{row['command']}`, commit {row['commit']}"
            for row in tables["commands"]
        ),
        "- *emulated*: every result of a lowered node is rounded and normalisations are written "
        "out (ADR 0012); ONNX Runtime on a CPU widens float16 and hides overflow",
        "- *max error*: of any element, by its output's largest magnitude; the detector's outputs "
        "are sorted by score, so two candidates that swap places count fully",
        "- *overlap*: detector: IoU of the ten best boxes with float32's, times how well scores "
        "agree; classifier: share of the prompts that both give, to half a map's cell; decoder: "
        "IoU of masks",
        "- *task metric*: in percent; AP50 and AP of tags over the classes of the data; mean IoU "
        "of masks with the truth from a point and from a box",
        "",
        "| model | engine | precision | max error | cosine | overlap | task metric (change) | "
        "images |",
        "|---|---|---|---|---|---|---|---|",
        *(_parity_line(row) for row in tables["parity"]),
        "",
        "## Kept in float32, found by the precision doctor",
        "",
    ]
    for row in tables["kept"]:
        nodes = ", ".join(f"`{node}`" for node in row["keep"]) or "nothing"
        lines.append(f"- {row['model']}, {row['precision']}, of {row['nodes']} nodes: {nodes}")
    lines += [
        "",
        "## TensorRT-RTX engines, built without a GPU",
        "",
        "One wide profile, the doctor's list in float32. Build times on a busy machine, good for "
        "their order only.",
        "",
        "| model | precision | compute capability | MB | s |",
        "|---|---|---|---|---|",
        *(_build_line(row) for row in tables["builds"]),
    ]
    return "\n".join(lines) + "\n"


def _parity_line(row: Mapping[str, Any]) -> str:
    metric = ", ".join(
        f"{name} {100 * value:.1f} ({100 * row['change'][name]:+.1f})"
        for name, value in row["metric"].items()
    )
    found = row["agreement"]
    if found is None:
        names = (row["model"], row["engine"], row["precision"])
        return f"| {' | '.join(names)} | does not open | | | {row['error']} | |"
    cells = (
        row["model"],
        row["engine"],
        row["precision"],
        f"{found['max_error']:.1e}" if found["finite"] else "not finite",
        f"{found['cosine']:.5f}",
        "" if row["overlap"] is None else f"{row['overlap']:.4f}",
        metric,
        str(row["images"]) if metric else "",
    )
    return f"| {' | '.join(cells)} |"


def _build_line(row: Mapping[str, Any]) -> str:
    is_built = row["error"] is None
    cells = (
        row["model"],
        row["precision"],
        " ".join(row["compute_capabilities"]),
        f"{row['size_bytes'] / 1e6:.1f}" if is_built else row["error"],
        f"{row['build_s']:.1f}" if is_built else "",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    enter(main)
