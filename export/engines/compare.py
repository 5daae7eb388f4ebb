"""The last step of a build: the engine beside the ONNX model that it was built from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from export.agreement import Agreement, agreement, worst
from export.engines.aot_inductor import AOT_ENGINES, AotInductorModel
from export.engines.base import EnginePrecision
from export.engines.profiles import Profile
from export.engines.tensorrt import this_gpu
from export.exportable import example_inputs
from export.precision_doctor import DISTANCE_LIMITS
from export.refit import RefitError
from export.verify import ParityError
from weaksam_rt.artifacts import ONNX_RUNTIME_CUDA, ModelArtifact
from weaksam_rt.backends.base import Arrays
from weaksam_rt.backends.engines import open_engine
from weaksam_rt.backends.local import ModelFunction
from weaksam_rt.backends.onnx_runtime import CUDA, OnnxRuntimeModel, check_provider
from weaksam_rt.errors import BackendUnavailableError

ENGINE_LIMITS: Mapping[EnginePrecision, float] = {
    "fp32": 0.01,
    "fp16": DISTANCE_LIMITS["fp16"],
    "bf16": DISTANCE_LIMITS["bf16"],
    "int8": 0.5,
    "fp8": 0.5,
}
"""Distance (``Agreement``) of any one example up to which an engine is accepted. A GPU rounds the
factors of float32 products to 10 bits (TF32). Quantised engines are judged by their task metric;
this limit finds broken ones."""


def compare_with_source(
    built: ModelArtifact,
    source: ModelArtifact,
    precision: EnginePrecision,
    profiles: Sequence[Profile] = (),
) -> Agreement:
    """How far the engine's answers are from ONNX Runtime's in float32, on its worst example.

    Args:
        built: The engine.
        source: What it was built from.
        precision: Of the engine.
        profiles: Sizes that the engine takes; empty: all.

    Raises:
        BackendUnavailableError: This machine cannot run the engine.
        ParityError: The answers to an example are not finite, or too far away.
    """
    engine, reference = opened_for_comparison(built), OnnxRuntimeModel(source)
    limit = ENGINE_LIMITS[precision]
    found = []
    for arrays in _inputs(built, profiles):
        one = agreement(built.model, reference(arrays), engine(arrays, None))
        if not (one.finite and one.distance <= limit):
            values = f"distance {one.distance:.3g}" if one.finite else "values that are not finite"
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
            raise ParityError(
                f"{built.model} for {built.engine} in {precision}: {values} beside ONNX Runtime in "
                f"float32 for {shapes}, up to {limit:g} is accepted; find the layers that break "
                "with `python -m export doctor` and keep them with --keep-fp32"
            )
        found.append(one)
    return worst(found)


def check_refit(
    built: ModelArtifact,
    live: ModelArtifact,
    source: ModelArtifact,
    profiles: Sequence[Profile] = (),
) -> None:
    """Raise ``RefitError`` where the engine may still have the weights of ``live``.

    A refit that changed nothing is within the limits of ``compare_with_source`` if the checkpoints
    differ little, so the engine must be nearer to its checkpoint than to ``live``. That can be
    asked where the checkpoints differ by more than rounding: were ``live`` its own distance from
    its checkpoint away and the new checkpoint twice that, a right engine is nearer to the latter.

    Args:
        built: ``live`` with the weights of ``source``.
        live: Before the refit.
        source: The new checkpoint's ONNX model.
        profiles: Sizes that the engines take; empty: all.
    """
    new, old, reference = (
        opened_for_comparison(built),
        opened_for_comparison(live),
        OnnxRuntimeModel(source),
    )
    rounding = max(live.passport.worst_parity or 0.0, DISTANCE_LIMITS["fp32"])
    for arrays in _inputs(built, profiles):
        expected, before, answer = reference(arrays), old(arrays, None), new(arrays, None)
        if agreement(built.model, expected, before).distance <= 2 * rounding:
            continue
        to_source = agreement(built.model, expected, answer).distance
        to_live = agreement(built.model, before, answer).distance
        if to_source >= to_live:
            raise RefitError(
                f"{built.model} for {built.engine} after its refit is at a distance of "
                f"{to_source:.3g} from the new checkpoint and of {to_live:.3g} from the live "
                "engine: the old weights may still be in it; build it anew"
            )


def parity_of(found: Agreement) -> dict[str, dict[str, float]]:
    """For the passport."""
    figures = asdict(found)
    return {"all outputs": {name: figures[name] for name in ("distance", "cosine")}}


def _inputs(built: ModelArtifact, profiles: Sequence[Profile]) -> list[Arrays]:
    examples = example_inputs(built.model, built.parameters)
    fitting = [a for a in examples if not profiles or any(p.takes(a) for p in profiles)]
    if not fitting:
        raise BackendUnavailableError("no example input is of a size that its profiles take")
    return list(fitting)


def check_runs_here(built: ModelArtifact) -> None:
    """Raise ``BackendUnavailableError`` where this machine cannot run the engine."""
    if built.passport.exporter["name"] == ONNX_RUNTIME_CUDA:
        check_provider(CUDA)
    targets = built.passport.compute_capabilities
    if targets and (here := this_gpu()) not in targets:
        raise BackendUnavailableError(f"it is for {', '.join(targets)}, this machine has {here}")


def opened_for_comparison(built: ModelArtifact) -> ModelFunction:
    """The engine in this process, also one that only PyTorch opens.

    Raises:
        BackendUnavailableError: This machine cannot run it.
    """
    check_runs_here(built)
    return AotInductorModel(built) if built.engine in AOT_ENGINES.values() else open_engine(built)
