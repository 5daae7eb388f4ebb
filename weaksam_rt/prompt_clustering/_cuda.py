"""Plans on an NVIDIA GPU, through the driver that comes with it; no other package is needed.

The kernels are prebuilt (``_prebuilt``), or compiled at first use (``_nvrtc``). A plan's inputs go
up in one copy, its launches follow on one stream, and only reading the outputs waits.
"""

import ctypes
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.cuda_driver import CudaDevice, DeviceArena, aligned_offsets
from weaksam_rt.errors import ArtifactError, BackendUnavailableError
from weaksam_rt.prompt_clustering._nvrtc import kernel_cubin
from weaksam_rt.prompt_clustering._plan import Argument, Launch, Plan
from weaksam_rt.prompt_clustering._prebuilt import prebuilt_kernels
from weaksam_rt.prompt_clustering.device_arrays import DeviceArray, JoinedArrays

_LOGGER = logging.getLogger(__name__)
# Numbers of the driver's enums.
_MAX_DYNAMIC_SHARED_BYTES = 8
_POINTER_DEVICE_ORDINAL = 9
_EVENT_WITHOUT_TIMING = 2
_CAPTURE_THREAD_LOCAL = 1
_SURE_SHARED_BYTES = 32 * 1024
"""So much dynamic shared memory needs no permission: 48 KiB less any kernel's static part."""


def kernel_codes(architecture: str) -> Iterator[tuple[str, bytes]]:
    """What a GPU may be given, one after the other until the driver takes it: prebuilt code,
    prebuilt PTX, what NVRTC makes.
    """
    for name, code in prebuilt_kernels(architecture):
        yield f"prebuilt {name}", code
    yield "compiled by NVRTC", kernel_cubin(architecture)


class CudaExecutor:
    """Runs plans on one GPU; one plan at a time, from any thread."""

    def __init__(self, device: int = 0) -> None:
        """Take the GPU and load the kernels.

        Raises:
            BackendUnavailableError: No driver, no such GPU, no NVRTC, or one that is too new for
                the driver or too old for the GPU.
        """
        self._gpu = CudaDevice(device)
        self._call, self._stream = self._gpu.call, self._gpu.stream
        self._lock = threading.Lock()
        self._module = ctypes.c_void_p()
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._arena = DeviceArena(self._gpu)
        with self._gpu.current():
            self._load_module("sm_{}{}".format(*self._gpu.compute_capability))

    def run(self, plan: Plan) -> dict[str, NDArray[Any]]:
        """The plan's outputs, after all launches.

        Raises:
            InferenceError: The GPU refused or failed; its memory may be too small for the batch.
        """
        with self._lock, self._gpu.current():
            loaded = LoadedPlan(self, plan)
            loaded.launch()
            return loaded.outputs()

    @contextmanager
    def loaded(self, plan: Plan) -> Iterator["LoadedPlan"]:
        """The plan with its inputs on the GPU, to launch it again and again."""
        with self._lock, self._gpu.current():
            yield LoadedPlan(self, plan)

    def _load(self, plan: Plan) -> dict[str, int]:
        """Copy the inputs that do not lie on the GPU already; the address of every array."""
        on_gpu = {n: a for n, a in plan.inputs.items() if isinstance(a, DeviceArray)}
        joined = {n: a for n, a in plan.inputs.items() if isinstance(a, JoinedArrays)}
        parts = [(n, p) for n, a in joined.items() for p in a.parts if isinstance(p, DeviceArray)]
        for name, lent in [*on_gpu.items(), *parts]:
            self._check_device(name, lent)
        for _, lent in [*on_gpu.items(), *parts]:
            self._wait_for(lent.stream)
        offsets, input_bytes, total = _layout(plan)
        base = self._arena.reserve(total)
        staging = np.zeros(input_bytes, np.uint8)
        for name, array in plan.inputs.items():
            if isinstance(array, np.ndarray):
                _write(staging, offsets[name], array)
        self._gpu.copy_in(base, staging)
        # The copy has left pageable memory when the call returns.
        addresses = {name: base + offset for name, offset in offsets.items()}
        for name, together in joined.items():
            self._join(addresses[name], together)
        return addresses | {name: lent.address for name, lent in on_gpu.items()}

    def _join(self, address: int, array: JoinedArrays) -> None:
        """Copy the parts behind each other; those on the GPU stay on it."""
        for part in array.parts:
            on_gpu = isinstance(part, DeviceArray)
            # A copy from pageable memory has read it when the call returns.
            held = part if isinstance(part, DeviceArray) else np.ascontiguousarray(part)
            source = held.address if isinstance(held, DeviceArray) else held.ctypes.data
            if part.nbytes:
                self._call(
                    "cuMemcpyDtoDAsync_v2" if on_gpu else "cuMemcpyHtoDAsync_v2",
                    ctypes.c_uint64(address),
                    ctypes.c_uint64(source),
                    ctypes.c_size_t(part.nbytes),
                    self._stream,
                )
            address += part.nbytes

    def _check_device(self, name: str, array: DeviceArray) -> None:
        """Raise ``ValueError`` unless the kernels' GPU holds the array."""
        device = array.device
        if device is None and array.nbytes:
            found = ctypes.c_int()
            status = self._gpu.driver.cuPointerGetAttribute(
                ctypes.byref(found), _POINTER_DEVICE_ORDINAL, ctypes.c_uint64(array.address)
            )
            if status != 0:
                reason = self._gpu.message(status)
                raise ValueError(f"{name}: no GPU knows the address {array.address:#x}: {reason}")
            device = found.value
        ours = self._gpu.ordinal
        if device is not None and device != ours:
            raise ValueError(
                f"{name} lies on cuda:{device}, the kernels run on cuda:{ours}: copy it there"
            )

    def _wait_for(self, stream: int | None) -> None:
        """Let what follows on our stream wait for what is on another; the host does not wait."""
        if stream is None:
            return
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), _EVENT_WITHOUT_TIMING)
        try:
            self._call("cuEventRecord", event, ctypes.c_void_p(stream))
            self._call("cuStreamWaitEvent", self._stream, event, 0)
        finally:
            # The driver keeps it until the wait is over.
            self._call("cuEventDestroy_v2", event)

    def _read(self, plan: Plan, addresses: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        outputs: dict[str, NDArray[Any]] = {}
        for name in plan.outputs:
            buffer = plan.buffers[name]
            outputs[name] = np.empty(buffer.shape, buffer.dtype)
            self._gpu.copy_out(outputs[name], addresses[name])
        self.synchronize()
        return outputs

    def synchronize(self) -> None:
        """Wait for everything launched."""
        self._gpu.synchronize()

    def _prepare(self, launch: Launch, addresses: Mapping[str, int]) -> "_PreparedLaunch":
        function = self._function(launch.kernel)
        if launch.shared_bytes > _SURE_SHARED_BYTES:
            self._call(
                "cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED_BYTES, launch.shared_bytes
            )
        values = tuple(_as_ctypes(argument, addresses) for argument in launch.arguments)
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        sizes = (*launch.grid, 1, launch.threads, 1, 1, launch.shared_bytes)
        arguments = (function, *map(ctypes.c_uint, sizes), self._stream, pointers, None)
        return _PreparedLaunch(arguments=arguments, values=values)

    def _function(self, name: str) -> ctypes.c_void_p:
        if name not in self._functions:
            function = ctypes.c_void_p()
            self._call("cuModuleGetFunction", ctypes.byref(function), self._module, name.encode())
            self._functions[name] = function
        return self._functions[name]

    def _load_module(self, architecture: str) -> None:
        """The first of the prebuilt kernels and NVRTC's that the driver takes."""
        refused = []
        try:
            for name, code in kernel_codes(architecture):
                status = self._gpu.driver.cuModuleLoadData(ctypes.byref(self._module), code)
                if status == 0:
                    _LOGGER.info("prompt kernels for %s: %s", architecture, name)
                    return
                refused.append(f"{name}: {self._gpu.message(status)}")
        except (ArtifactError, BackendUnavailableError) as error:
            refused.append(str(error))
        raise BackendUnavailableError(
            f"no kernels for this GPU ({architecture}): {'; '.join(refused)}. Update the driver, "
            "or install the NVRTC of the driver's CUDA version"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _PreparedLaunch:
    """The arguments of ``cuLaunchKernel``."""

    arguments: tuple[Any, ...]
    values: tuple[Any, ...]
    """What the kernel's arguments point to; kept alive here."""


class LoadedPlan:
    """A plan whose inputs are on the GPU. Made by ``CudaExecutor``, valid while it is held."""

    def __init__(self, executor: CudaExecutor, plan: Plan) -> None:
        """Copy the inputs and prepare the launches."""
        self._executor, self._plan = executor, plan
        self._addresses = executor._load(plan)
        self._launches = [executor._prepare(launch, self._addresses) for launch in plan.launches]

    def launch(self) -> None:
        """Put all launches on the stream; returns before they have run."""
        for prepared in self._launches:
            self._executor._call("cuLaunchKernel", *prepared.arguments)

    @contextmanager
    def captured(self) -> Iterator[Callable[[], None]]:
        """All launches as one CUDA graph: a function that puts it on the stream.

        The host then pays for one call instead of one a kernel.
        """
        call, stream = self._executor._call, self._executor._stream
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        call("cuStreamBeginCapture_v2", stream, _CAPTURE_THREAD_LOCAL)
        try:
            self.launch()
        finally:
            call("cuStreamEndCapture", stream, ctypes.byref(graph))
        try:
            call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
        finally:
            call("cuGraphDestroy", graph)
        try:
            yield lambda: call("cuGraphLaunch", executable, stream)
        finally:
            self._executor.synchronize()
            call("cuGraphExecDestroy", executable)

    def outputs(self) -> dict[str, NDArray[Any]]:
        """Wait for the launches, then read the outputs."""
        return self._executor._read(self._plan, self._addresses)


def _layout(plan: Plan) -> tuple[dict[str, int], int, int]:
    """Offset of every array without a place of its own, bytes of the host's inputs (which stand
    first), bytes of all.
    """
    on_host = {n: a.nbytes for n, a in plan.inputs.items() if isinstance(a, np.ndarray)}
    sizes = on_host | {n: a.nbytes for n, a in plan.inputs.items() if isinstance(a, JoinedArrays)}
    for name, buffer in plan.buffers.items():
        items = int(np.prod(buffer.shape, dtype=np.int64))
        sizes[name] = items * np.dtype(buffer.dtype).itemsize
    offsets, total = aligned_offsets(list(sizes.values()))
    _, input_bytes = aligned_offsets(list(on_host.values()))
    return dict(zip(sizes, offsets, strict=True)), input_bytes, total


def _write(staging: NDArray[np.uint8], offset: int, array: NDArray[Any]) -> None:
    if array.size:
        content = np.ascontiguousarray(array).view(np.uint8).ravel()
        staging[offset : offset + array.nbytes] = content


def _as_ctypes(argument: Argument, addresses: Mapping[str, int]) -> Any:
    """Memory that holds the argument as the kernel expects it."""
    if isinstance(argument, str):
        return ctypes.c_uint64(addresses[argument])
    if isinstance(argument, tuple):
        return (ctypes.c_uint64 * len(argument))(*[addresses[name] for name in argument])
    content = argument.tobytes()
    return ctypes.create_string_buffer(content, len(content))
