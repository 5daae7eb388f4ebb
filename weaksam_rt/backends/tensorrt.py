"""TensorRT and TensorRT-RTX engines as model functions: one API family, one class.

Their libraries are imported when an engine is opened, never before: the runtime works without
them. An engine is deserialised only after its passport fits the machine. Memory and copies go
through the driver (``weaksam_rt.cuda_driver``), so that neither PyTorch nor CUDA's Python packages
are needed.
"""

import importlib
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.artifacts import ModelArtifact, refusal_here
from weaksam_rt.backends.base import Arrays
from weaksam_rt.contracts import PROMPTED_CLASSIFIER, ModelContract, TensorSpec
from weaksam_rt.cuda_driver import CudaDevice, DeviceArena, PinnedBlock, aligned_offsets
from weaksam_rt.errors import ArtifactError, BackendUnavailableError, InferenceError
from weaksam_rt.prompt_clustering.tensorrt_plugin import register_prompt_plugin

ShapeRanges = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Smallest and largest shape of each input that an optimisation profile accepts."""
_MAX_REASON = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRtFamily:
    """What differs between the two."""

    engine: str
    """As manifests call it."""
    file_name: str
    modules: tuple[str, ...]
    """Where the Python API is, first choice first."""
    install: str
    """What to do where it is not."""
    builds_ahead_of_time: bool
    """For GPUs that are not here; else for the one that is."""
    major_versions: tuple[int, ...]
    """With which this package has been written to work."""


TENSORRT = TensorRtFamily(
    engine="tensorrt",
    file_name="model.plan",
    modules=("tensorrt",),
    install="install TensorRT 10 or 11 (NVIDIA's package index or container), or build with "
    "--engine tensorrt-rtx",
    builds_ahead_of_time=False,
    major_versions=(10, 11),
)
TENSORRT_RTX = TensorRtFamily(
    engine="tensorrt-rtx",
    # Not .plan: Triton's tensorrt_plan platform cannot read it.
    file_name="model.rtx_engine",
    modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
    install="pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
    builds_ahead_of_time=True,
    major_versions=(1,),
)
FAMILIES = {family.engine: family for family in (TENSORRT, TENSORRT_RTX)}


def load_tensorrt(family: TensorRtFamily, *, needs: str) -> ModuleType:
    """Import a family's Python API.

    Args:
        family: Which.
        needs: The class that must be in it: ``Builder`` or ``Runtime``; bindings without their
            library have neither.

    Raises:
        BackendUnavailableError: It is not installed, cannot be loaded, or is of another major
            version.
    """
    reasons = []
    for name in family.modules:
        try:
            trt = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        if not hasattr(trt, needs):
            reasons.append(f"{name} has no {needs}")
            continue
        if int(trt.__version__.split(".")[0]) not in family.major_versions:
            raise BackendUnavailableError(
                f"{family.engine} {trt.__version__} is installed, this package works with "
                f"{family.major_versions}; {family.install}"
            )
        return trt
    raise BackendUnavailableError(
        f"{family.engine} is not usable here ({'; '.join(reasons)}); {family.install}"
    )


def collecting_logger(trt: Any) -> tuple[Any, list[str]]:
    """A logger for the library and the errors it will have been told, newest last."""
    errors: list[str] = []

    class Collector(trt.ILogger):  # type: ignore[misc]  # the base is chosen at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                errors.append(message)

    return Collector(), errors


def narrowest_profile(profiles: Sequence[ShapeRanges], shapes: Mapping[str, Sequence[int]]) -> int:
    """The profile that is tuned most closely for inputs of these shapes.

    Args:
        profiles: Of the engine.
        shapes: Of each input, with the batch axis.

    Returns:
        Position of the profile that accepts them and the fewest others; the first of equals.

    Raises:
        InferenceError: None accepts them.
    """
    fitting = {
        position: _num_accepted(ranges)
        for position, ranges in enumerate(profiles)
        if all(_accepts(ranges[name], shape) for name, shape in shapes.items())
    }
    if not fitting:
        got = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        largest = ", ".join(
            f"{name} {[max(sizes) for sizes in zip(*(p[name][1] for p in profiles), strict=True)]}"
            for name in shapes
        )
        raise InferenceError(
            f"no optimisation profile of the engine takes {got}; the largest sizes are {largest}: "
            "send less, or build the engine with a wider profile"
        )
    return min(fitting, key=lambda position: fitting[position])


def _accepts(limits: tuple[Sequence[int], Sequence[int]], shape: Sequence[int]) -> bool:
    low, high = limits
    return len(low) == len(shape) and all(
        least <= size <= most for least, size, most in zip(low, shape, high, strict=True)
    )


def _num_accepted(ranges: ShapeRanges) -> int:
    return math.prod(
        most - least + 1
        for low, high in ranges.values()
        for least, most in zip(low, high, strict=True)
    )


class TensorRtModel:
    """One engine on one GPU, callable with the arrays of its contract; from any thread, one call
    at a time.
    """

    def __init__(
        self,
        artifact: ModelArtifact,
        *,
        contract: ModelContract | None = None,
        device: int = 0,
    ) -> None:
        """Check that the machine is the one that the engine was built for, then open it.

        Args:
            artifact: A verified artifact whose engine is ``tensorrt`` or ``tensorrt-rtx``.
            contract: What the engine itself takes and gives; None: the artifact's contract.
            device: Number of the GPU.

        Raises:
            ArtifactError: The engine was built for another library or GPU, cannot be opened, or
                differs from the contract; one line, and nothing of the file was read unless the
                passport fits.
            BackendUnavailableError: The library is of a version that this package does not know.
        """
        if artifact.engine not in FAMILIES:
            raise ArtifactError(
                f"{artifact.path} is for {artifact.engine}, not for {' or '.join(FAMILIES)}"
            )
        trt, gpu = _usable_here(artifact, device)
        self.contract = contract or artifact.contract
        self._gpu = gpu
        self._lock = threading.Lock()
        self._arena, self._scratch = DeviceArena(gpu), DeviceArena(gpu)
        self._pinned = PinnedBlock(gpu)
        log, self._complaints = collecting_logger(trt)
        if artifact.model == PROMPTED_CLASSIFIER:
            register_prompt_plugin(trt)
        with gpu.current():
            self._runtime = trt.Runtime(log)
            self._engine = self._runtime.deserialize_cuda_engine(artifact.path.read_bytes())
            if self._engine is None:
                raise ArtifactError(
                    f"{artifact.engine} {trt.__version__} cannot open {artifact.path}: "
                    f"{self._last_complaint()}; build the engine again"
                )
            _check_tensors(trt, self._engine, self.contract, artifact)
            self._profiles = _profiles(self._engine, self.contract)
            self._contexts = [self._context(trt, p) for p in range(len(self._profiles))]
            gpu.synchronize()

    def __call__(
        self, inputs: Arrays, outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Run once; raises ``ContractError`` for ill-formed inputs, ``InferenceError`` for the
        rest.
        """
        self.contract.check_inputs(inputs)
        names = [spec.name for spec in self.contract.outputs] if outputs is None else list(outputs)
        wanted = [self.contract.output(name) for name in names]
        arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        context = self._contexts[narrowest_profile(self._profiles, shapes)]
        with self._lock, self._gpu.current():
            return self._run(context, arrays, wanted)

    def _run(
        self, context: Any, arrays: Arrays, wanted: Sequence[TensorSpec]
    ) -> dict[str, NDArray[Any]]:
        for name, array in arrays.items():
            if not context.set_input_shape(name, array.shape):
                raise self._failed(f"{name} of shape {list(array.shape)} was refused")
        missing = context.infer_shapes()
        if missing:
            raise self._failed(f"the shapes of {missing} stay open")
        results = {
            spec.name: np.empty(tuple(context.get_tensor_shape(spec.name)), spec.numpy_dtype)
            for spec in self.contract.outputs
        }
        addresses = self._place({**arrays, **results}, context)
        for name, array in arrays.items():
            self._gpu.copy_in(addresses[name], array)
        if not context.execute_async_v3(self._gpu.stream.value):
            raise self._failed("the engine did not run")
        return self._read({spec.name: results[spec.name] for spec in wanted}, addresses)

    def _read(
        self, results: dict[str, NDArray[Any]], addresses: Mapping[str, int]
    ) -> dict[str, NDArray[Any]]:
        """Fill ``results`` from the GPU, through memory that it writes to by itself: a copy to
        any other would make the host wait for each.
        """
        offsets, total = aligned_offsets([array.nbytes for array in results.values()])
        staging = self._pinned.reserve(total)
        parts = [
            staging[offset : offset + array.nbytes]
            for offset, array in zip(offsets, results.values(), strict=True)
        ]
        for name, part in zip(results, parts, strict=True):
            self._gpu.copy_out(part, addresses[name])
        self._gpu.synchronize()
        for array, part in zip(results.values(), parts, strict=True):
            array[...] = part.view(array.dtype).reshape(array.shape)
        return results

    def _place(self, arrays: Arrays, context: Any) -> dict[str, int]:
        """Tell the context where each tensor lies; all lie in one allocation."""
        offsets, total = aligned_offsets([array.nbytes for array in arrays.values()])
        base = self._arena.reserve(total)
        addresses = {name: base + offset for name, offset in zip(arrays, offsets, strict=True)}
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._failed(f"the address of {name} was refused")
        return addresses

    def _context(self, trt: Any, profile: int) -> Any:
        """A context for one profile. They never run together, so they share their scratch memory:
        as much as the largest needs.
        """
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise InferenceError(
                f"{self.contract.name}: no execution context: {self._last_complaint()}"
            )
        if not context.set_optimization_profile_async(profile, self._gpu.stream.value):
            raise self._failed(f"optimisation profile {profile} was refused")
        size = self._engine.device_memory_size_v2
        if size:
            context.set_device_memory(self._scratch.reserve(size), size)
        return context

    def _failed(self, what: str) -> InferenceError:
        return InferenceError(f"{self.contract.name} failed: {what}: {self._last_complaint()}")

    def _last_complaint(self) -> str:
        reason = self._complaints[-1] if self._complaints else "no reason given"
        return " ".join(reason.split())[:_MAX_REASON]


def _usable_here(artifact: ModelArtifact, device: int) -> tuple[ModuleType, CudaDevice]:
    """The library and the GPU, both such as the passport says.

    Raises:
        ArtifactError: They are not.
        BackendUnavailableError: There is no GPU, or the library is of an unknown version.
    """
    family = FAMILIES[artifact.engine]
    trt, missing_library = None, None
    try:
        trt = load_tensorrt(family, needs="Runtime")
    except BackendUnavailableError as error:
        missing_library = error
    gpu, missing_gpu = None, None
    try:
        gpu = CudaDevice(device)
    except BackendUnavailableError as error:
        missing_gpu = error
    capability = None if gpu is None else "{}.{}".format(*gpu.compute_capability)
    refusal = refusal_here(
        artifact,
        versions={} if trt is None else {family.engine: trt.__version__},
        compute_capability=capability,
    )
    cause = missing_library or missing_gpu
    if refusal is not None:
        raise ArtifactError(refusal if cause is None else f"{refusal} ({cause})") from cause
    if trt is None or gpu is None:
        assert cause is not None
        raise cause
    return trt, gpu


def _check_tensors(trt: Any, engine: Any, contract: ModelContract, artifact: ModelArtifact) -> None:
    """Raise ``ArtifactError`` unless names, directions and types are the contract's."""
    found = {}
    for position in range(engine.num_io_tensors):
        name = engine.get_tensor_name(position)
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
        found[name] = f"{'input' if is_input else 'output'} of {dtype}"
    expected = {
        spec.name: f"{kind} of {spec.numpy_dtype}"
        for kind, specs in (("input", contract.inputs), ("output", contract.outputs))
        for spec in specs
    }
    if found != expected:
        raise ArtifactError(
            f"{artifact.path}: tensors are {found}, the contract says {expected}; build the engine "
            "again"
        )


def _profiles(engine: Any, contract: ModelContract) -> list[ShapeRanges]:
    profiles: list[ShapeRanges] = []
    for profile in range(engine.num_optimization_profiles):
        ranges = {}
        for spec in contract.inputs:
            low, _, high = engine.get_tensor_profile_shape(spec.name, profile)
            ranges[spec.name] = (tuple(low), tuple(high))
        profiles.append(ranges)
    return profiles
