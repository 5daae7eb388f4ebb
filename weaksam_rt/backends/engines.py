"""The one place where an artifact becomes a model function in this process."""

from weaksam_rt.artifacts import ModelArtifact
from weaksam_rt.backends.local import ModelFunction
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.backends.prompted_classifier import PromptedClassifierModel
from weaksam_rt.backends.tensorrt import FAMILIES, TensorRtModel
from weaksam_rt.contracts import PROMPTED_CLASSIFIER
from weaksam_rt.errors import ArtifactError


def open_engine(artifact: ModelArtifact, *, num_threads: int = 0, device: int = 0) -> ModelFunction:
    """Open an engine with the runtime that its manifest names.

    Args:
        artifact: Verified.
        num_threads: Threads on the CPU (``onnxruntime``); 0 takes all cores. With several, rows of
            a batch run side by side.
        device: Number of the GPU, for engines that were built for one.

    Raises:
        ArtifactError: No runtime of this package opens it, the machine is not the one that it was
            built for, or the file is not what its manifest says.
        BackendUnavailableError: Its library is of a version that this package does not know, or has
            no CUDA though the engine was built for it.
    """
    if artifact.model == PROMPTED_CLASSIFIER:
        return PromptedClassifierModel(artifact, device=device)
    if artifact.engine == "onnxruntime":
        return OnnxRuntimeModel(
            artifact, num_threads=num_threads, rows_side_by_side=True, device=device
        )
    if artifact.engine in FAMILIES:
        return TensorRtModel(artifact, device=device)
    if artifact.engine.startswith("aot-inductor"):
        raise ArtifactError(
            f"{artifact.path} is for {artifact.engine}: only PyTorch opens such a package, and the "
            "runtime does without PyTorch; serve the model with onnxruntime, or open it in your "
            "own process with export.engines.aot_inductor.AotInductorModel"
        )
    raise ArtifactError(
        f"{artifact.path} is for {artifact.engine!r}; engines are opened for onnxruntime, "
        f"{', '.join(FAMILIES)}"
    )
