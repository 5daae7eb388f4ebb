"""Plans on an NVIDIA GPU, through the driver that comes with it; no other package is needed.

The kernels are prebuilt (``_prebuilt``), or compiled at first use (``_nvrtc``). A plan's inputs go
up in one copy, its launches follow on one stream, its outputs come back in one copy, which alone is
waited for. What was prepared for a program is kept; from its second run on it is one CUDA graph.
"""

import ctypes
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.cuda_driver import CudaDevice, DeviceArena, PinnedBlock, aligned_offsets
from weaksam_rt.errors import ArtifactError, BackendUnavailableError
from weaksam_rt.prompt_clustering._nvrtc import kernel_cubin
from weaksam_rt.prompt_clustering._plan import Argument, Launch, Plan, Program
from weaksam_rt.prompt_clustering._prebuilt import prebuilt_kernels
from weaksam_rt.prompt_clustering.device_arrays import AnyArray, DeviceArray, JoinedArrays

_LOGGER = logging.getLogger(__name__)
# Numbers of the driver's enums.
_MAX_DYNAMIC_SHARED_BYTES = 8
_POINTER_DEVICE_ORDINAL = 9
_EVENT_WITHOUT_TIMING = 2
_CAPTURE_THREAD_LOCAL = 1
_SURE_SHARED_BYTES = 32 * 1024
"""So much dynamic shared memory needs no permission: 48 KiB less any kernel's static part."""
_KEPT_PROGRAMS = 32
"""Prepared launches and graphs; the longest unused one goes."""


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
        self._shared_bytes: dict[str, int] = {}
        self._arena = DeviceArena(self._gpu)
        self._pinned = PinnedBlock(self._gpu)
        self._placed: OrderedDict[Hashable, _PlacedProgram] = OrderedDict()
        with self._gpu.current():
            self._load_module("sm_{}{}".format(*self._gpu.compute_capability))

    def run(self, plan: Plan) -> dict[str, NDArray[Any]]:
        """The plan's outputs, after all launches.

        Raises:
            InferenceError: The GPU refused or failed; its memory may be too small for the batch.
        """
        with self._lock, self._gpu.current():
            loaded = LoadedPlan(self, plan)
            loaded.placed.launch_again()
            return loaded.outputs()

    @contextmanager
    def loaded(self, plan: Plan) -> Iterator["LoadedPlan"]:
        """The plan with its inputs on the GPU, to launch it again and again."""
        with self._lock, self._gpu.current():
            try:
                yield LoadedPlan(self, plan)
            finally:
                # The next plan writes where this one's inputs are copied from.
                self.synchronize()

    def _load(self, plan: Plan) -> "_PlacedProgram":
        """Copy the inputs that do not lie on the GPU already."""
        lent = [(n, a) for n, a in plan.inputs.items() if isinstance(a, DeviceArray)]
        joined = {n: a for n, a in plan.inputs.items() if isinstance(a, JoinedArrays)}
        lent += [(n, p) for n, a in joined.items() for p in a.parts if isinstance(p, DeviceArray)]
        for name, array in lent:
            self._check_device(name, array)
        for _, array in lent:
            self._wait_for(array.stream)
        placed = self._place(plan)
        staging = placed.pinned(self._pinned)[: placed.layout.input_bytes]
        for name, content in plan.inputs.items():
            if isinstance(content, np.ndarray):
                _view(staging, placed.layout.offsets[name], content.dtype, content.shape)[...] = (
                    content
                )
        self._gpu.copy_in(placed.base, staging)
        for name, together in joined.items():
            self._join(placed.addresses[name], together)
        return placed

    def _place(self, plan: Plan) -> "_PlacedProgram":
        """Where everything lies, with the launches prepared for it: now, or before."""
        # The program decides the rest, and is the same object for the same shapes.
        key = (plan.program, *map(_placement, plan.inputs.values()))
        placed = self._placed.pop(key, None)
        if placed is None:
            layout = _layout(plan)
            if layout.total_bytes > self._arena.num_bytes:
                # Their addresses go with the arena's memory.
                self._forget(0)
            placed = _PlacedProgram(self, plan, layout, self._arena.reserve(layout.total_bytes))
        self._placed[key] = placed
        self._forget(_KEPT_PROGRAMS)
        return placed

    def _forget(self, left: int) -> None:
        """The longest unused programs, until so many are left."""
        while len(self._placed) > left:
            self._placed.popitem(last=False)[1].destroy()

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
                f"{name} lies on cuda:{device}, the kernels run on cuda:{ours}: copy it "
                f"there, or name the device {device}"
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

    def synchronize(self) -> None:
        """Wait for everything launched."""
        self._gpu.synchronize()

    def resident(self, arrays: Mapping[str, NDArray[Any]]) -> "ResidentArrays":
        """Copies of the arrays on the GPU, which are there when this returns."""
        with self._lock, self._gpu.current():
            return ResidentArrays(self._gpu, arrays)

    def enqueued(
        self, program: Program, addresses: Mapping[str, int], stream: int
    ) -> "EnqueuedProgram":
        """A program for memory and a stream that someone else owns; nothing runs yet.

        Args:
            program: What is launched.
            addresses: Where every array of it lies.
            stream: CUDA's handle.
        """
        with self._lock, self._gpu.current():
            handle = ctypes.c_void_p(stream)
            launches = [self._prepare(launch, addresses, handle) for launch in program.launches]
        return EnqueuedProgram(self._gpu, launches)

    def _prepare(
        self, launch: Launch, addresses: Mapping[str, int], stream: ctypes.c_void_p
    ) -> "_PreparedLaunch":
        function = self._function(launch.kernel)
        if launch.shared_bytes > self._shared_bytes.get(launch.kernel, _SURE_SHARED_BYTES):
            # Never less than before: programs that were prepared then may run again.
            self._call(
                "cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED_BYTES, launch.shared_bytes
            )
            self._shared_bytes[launch.kernel] = launch.shared_bytes
        values = tuple(_as_ctypes(argument, addresses) for argument in launch.arguments)
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        sizes = (*launch.grid, 1, launch.threads, 1, 1, launch.shared_bytes)
        arguments = (function, *map(ctypes.c_uint, sizes), stream, pointers, None)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Where arrays lie in the arena: inputs of the host first, outputs last."""

    offsets: Mapping[str, int]
    """Of every array without a place of its own, in bytes."""
    input_bytes: int
    output_begin: int
    output_end: int
    total_bytes: int


class _PlacedProgram:
    """A program with the addresses of its arrays; valid until the arena grows."""

    def __init__(self, executor: CudaExecutor, plan: Plan, layout: _Layout, base: int) -> None:
        """Prepare the launches."""
        self.layout, self.base = layout, base
        self.addresses = {name: base + offset for name, offset in layout.offsets.items()}
        lent = {n: a.address for n, a in plan.inputs.items() if isinstance(a, DeviceArray)}
        self._executor = executor
        self._launches = [
            executor._prepare(launch, self.addresses | lent, executor._stream)
            for launch in plan.program.launches
        ]
        self._graph: ctypes.c_void_p | None = None
        self._has_run = False

    def pinned(self, block: PinnedBlock) -> NDArray[np.uint8]:
        """Room on the host for the inputs, then the outputs."""
        return block.reserve(
            self.layout.input_bytes + self.layout.output_end - self.layout.output_begin
        )

    def launch(self) -> None:
        """Put all launches on the stream; returns before they have run."""
        for prepared in self._launches:
            self._executor._call("cuLaunchKernel", *prepared.arguments)
        self._has_run = True

    def launch_again(self) -> None:
        """``launch``, from the second time on as a graph: many shapes are seen only once."""
        if self._has_run:
            self.launch_graph()
        else:
            self.launch()

    def launch_graph(self) -> None:
        """All launches by one call of the driver; the graph is made once."""
        if self._graph is None:
            self._graph = self._captured()
        self._executor._call("cuGraphLaunch", self._graph, self._executor._stream)

    def destroy(self) -> None:
        """Give the graph back, if there is one."""
        if self._graph is not None:
            self._executor._call("cuGraphExecDestroy", self._graph)
            self._graph = None

    def _captured(self) -> ctypes.c_void_p:
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
        return executable


class EnqueuedProgram:
    """A program in memory and on a stream that someone else owns. Made by ``CudaExecutor``."""

    def __init__(self, gpu: CudaDevice, launches: Sequence[_PreparedLaunch]) -> None:
        """Keep the launches."""
        self._gpu, self._launches = gpu, launches

    def launch(self) -> None:
        """Put all launches on the stream; returns before they have run. May be captured."""
        with self._gpu.current():
            for prepared in self._launches:
                self._gpu.call("cuLaunchKernel", *prepared.arguments)


class ResidentArrays:
    """Arrays that stay on the GPU. Made by ``CudaExecutor``."""

    def __init__(self, gpu: CudaDevice, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Copy them, and wait until they are there."""
        offsets, total = aligned_offsets([array.nbytes for array in arrays.values()])
        self._arena = DeviceArena(gpu)
        base = self._arena.reserve(total)
        self.addresses = {n: base + offset for n, offset in zip(arrays, offsets, strict=True)}
        for name, array in arrays.items():
            gpu.copy_in(self.addresses[name], np.ascontiguousarray(array))
        gpu.synchronize()


class LoadedPlan:
    """A plan whose inputs are on the GPU. Made by ``CudaExecutor``, valid while it is held."""

    def __init__(self, executor: CudaExecutor, plan: Plan) -> None:
        """Copy the inputs and prepare the launches."""
        self._executor, self._plan = executor, plan
        self.placed = executor._load(plan)

    def launch(self) -> None:
        """Put all launches on the stream; returns before they have run."""
        self.placed.launch()

    def launch_graph(self) -> None:
        """The same as one CUDA graph: the host pays for one call instead of one a kernel."""
        self.placed.launch_graph()

    def outputs(self) -> dict[str, NDArray[Any]]:
        """Wait for the launches; all outputs in one copy."""
        layout, program = self.placed.layout, self._plan.program
        read = self.placed.pinned(self._executor._pinned)[layout.input_bytes :]
        self._executor._gpu.copy_out(read, self.placed.base + layout.output_begin)
        self._executor.synchronize()
        # The next plan's outputs come to the same place.
        content = read.copy()
        return {
            name: _view(
                content,
                layout.offsets[name] - layout.output_begin,
                np.dtype(program.buffers[name].dtype),
                program.buffers[name].shape,
            )
            for name in program.outputs
        }


def _placement(array: AnyArray) -> Hashable:
    """What an input's place depends on besides the program."""
    if isinstance(array, DeviceArray):
        return array.address
    return isinstance(array, JoinedArrays), array.nbytes


def _layout(plan: Plan) -> _Layout:
    buffers, outputs = plan.program.buffers, plan.program.outputs
    on_host = {n: a.nbytes for n, a in plan.inputs.items() if isinstance(a, np.ndarray)}
    joined = {n: a.nbytes for n, a in plan.inputs.items() if isinstance(a, JoinedArrays)}
    scratch = {n: b.num_bytes for n, b in buffers.items() if n not in outputs}
    sizes = on_host | joined | scratch | {n: buffers[n].num_bytes for n in outputs}
    starts, total_bytes = aligned_offsets(list(sizes.values()))
    offsets = dict(zip(sizes, starts, strict=True))
    return _Layout(
        offsets=offsets,
        input_bytes=aligned_offsets(list(on_host.values()))[1],
        output_begin=offsets[outputs[0]],
        output_end=offsets[outputs[-1]] + sizes[outputs[-1]],
        total_bytes=total_bytes,
    )


def _view(
    memory: NDArray[np.uint8], offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> NDArray[Any]:
    """The array that lies there."""
    end = offset + math.prod(shape) * dtype.itemsize
    return memory[offset:end].view(dtype).reshape(shape)


def _as_ctypes(argument: Argument, addresses: Mapping[str, int]) -> Any:
    """Memory that holds the argument as the kernel expects it."""
    if isinstance(argument, str):
        return ctypes.c_uint64(addresses[argument])
    if isinstance(argument, tuple):
        return (ctypes.c_uint64 * len(argument))(*[addresses[name] for name in argument])
    content = argument.tobytes()
    return ctypes.create_string_buffer(content, len(content))
