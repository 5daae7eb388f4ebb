"""How an engine is served in each profile, or why it is not: the one place that knows.

``embedded`` opens engines in Python-backend models (``weaksam_rt.backends.engines``), ``container``
leaves them to the backends of NVIDIA's image. The repository builder writes what is said here, the
validator compares a finished repository with it.
"""

from dataclasses import dataclass
from typing import Literal

from weaksam_rt.artifacts import ModelArtifact
from weaksam_rt.contracts import PROMPTED_CLASSIFIER
from weaksam_rt.errors import ArtifactError

Profile = Literal["embedded", "container"]
PROFILES: tuple[Profile, ...] = ("embedded", "container")
CONTAINER_IMAGE = "nvcr.io/nvidia/tritonserver:24.12-py3"
"""What the ``container`` profile is written for; ``triton_models/Dockerfile`` builds on it."""
CONTAINER_PYTHON = "3.12"
"""The Python in that image."""
CONTAINER_TENSORRT = "10.7.0"
"""The TensorRT in that image; a plan is read by the version that built it."""

Backend = Literal["python", "onnxruntime", "tensorrt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineServing:
    """What ``config.pbtxt`` says about how a model is run."""

    backend: Backend
    platform: str = ""
    """Triton's older name for the same; empty for ``python``."""
    instance_kind: str = "KIND_CPU"
    num_profiles: int = 0
    """Optimisation profiles that an instance may use; Triton takes the first alone unless told."""

    @property
    def opens_in_python(self) -> bool:
        """A ``model.py`` of ours opens the engine."""
        return self.backend == "python"


def engine_serving(artifact: ModelArtifact, profile: Profile) -> EngineServing:
    """How ``profile`` serves an engine.

    Raises:
        ArtifactError: It cannot; one line that says why and what to do.
        ValueError: There is no such profile.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r}, expected one of {PROFILES}")
    if reason := _refusal(artifact, profile):
        raise ArtifactError(
            f"{artifact.model} cannot be served in the {profile} profile: {artifact.path} {reason}"
        )
    if profile == "embedded":
        # A GPU where there is one: on a machine without, the engine's own refusal says more than
        # the server's.
        kind = "KIND_AUTO" if artifact.needs_gpu else "KIND_CPU"
        return EngineServing(backend="python", instance_kind=kind)
    if artifact.engine == "onnxruntime":
        return EngineServing(
            backend="onnxruntime", platform="onnxruntime_onnx", instance_kind="KIND_AUTO"
        )
    return EngineServing(
        backend="tensorrt",
        platform="tensorrt_plan",
        instance_kind="KIND_GPU",
        num_profiles=len(artifact.passport.profiles),
    )


def serving_difference(artifact: ModelArtifact, *, backend: str, platform: str) -> str | None:
    """What is wrong with a config that runs ``artifact`` by ``backend``; None: nothing.

    Args:
        artifact: The engine beside it.
        backend: Of ``config.pbtxt``.
        platform: Of ``config.pbtxt``.
    """
    profile: Profile = "embedded" if backend == "python" else "container"
    try:
        expected = engine_serving(artifact, profile)
    except ArtifactError as error:
        return str(error)
    if (backend, platform) == (expected.backend, expected.platform):
        return None
    return (
        f"its config runs it by backend {backend!r} and platform {platform!r}, an engine for "
        f"{artifact.engine} needs {expected.backend!r} and {expected.platform!r}"
    )


def _refusal(artifact: ModelArtifact, profile: Profile) -> str | None:
    """Why ``profile`` cannot serve the engine, as the end of a sentence about its file."""
    engine, precision = artifact.engine, artifact.passport.precision
    if engine.startswith("aot-inductor"):
        return (
            f"is for {engine}, which only PyTorch opens: neither profile has it; serve the model "
            "with onnxruntime or tensorrt"
        )
    if engine == "onnxruntime":
        runs_on_cpu = profile == "embedded" and not artifact.needs_gpu
        return _onnx_runtime_refusal(precision, runs_on_cpu=runs_on_cpu)
    if engine not in ("tensorrt", "tensorrt-rtx"):
        return f"is for {engine!r}; known are onnxruntime, tensorrt and tensorrt-rtx"
    if profile == "embedded":
        return None
    if artifact.model == PROMPTED_CLASSIFIER:
        return (
            "holds a plugin in Python, which the image's TensorRT backend cannot run; serve it in "
            "the embedded profile, or vit_classifier and prompt_clustering in this one"
        )
    if engine == "tensorrt":
        return _plan_refusal(artifact)
    return (
        "is for tensorrt-rtx, which no backend of the image reads (tensorrt_plan takes plans of "
        "TensorRT itself only); serve it in the embedded profile, or build with --engine tensorrt"
    )


def _onnx_runtime_refusal(precision: str, *, runs_on_cpu: bool) -> str | None:
    if precision == "fp8":
        return (
            "is an fp8 graph, in which ONNX Runtime opens nothing or computes wrong numbers "
            "(benchmarks/results/engine_parity.md); serve int8, or fp8 with a TensorRT engine"
        )
    if precision == "bf16" and runs_on_cpu:
        return (
            "is a bf16 graph, which ONNX Runtime has for GPUs only and this profile runs on the "
            "CPU; serve fp32, fp16 or int8, or bf16 built with --engine onnxruntime-cuda or for "
            "TensorRT"
        )
    return None


def _plan_refusal(artifact: ModelArtifact) -> str | None:
    built_with = artifact.passport.versions.get("tensorrt")
    if built_with is None or built_with.split(".")[:3] == CONTAINER_TENSORRT.split("."):
        return None
    return (
        f"was built with tensorrt {built_with}, {CONTAINER_IMAGE} has {CONTAINER_TENSORRT}; build "
        "it inside the image"
    )
