"""One NVIDIA GPU through the driver that comes with it: its context, a stream, memory and copies.

No other package is needed. Everything but opening is called inside ``current()`` and puts its work
on the one stream; only ``synchronize`` waits.
"""

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.errors import BackendUnavailableError, InferenceError

_ALIGNMENT = 256
"""Bytes; what cudaMalloc promises, so that every buffer starts on a memory transaction."""
# Numbers of the driver's enums.
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76
_OUT_OF_MEMORY = 2
_STREAM_NON_BLOCKING = 1


class CudaDevice:
    """A GPU with its primary context, which CUDA's runtime and the libraries over it share."""

    def __init__(self, ordinal: int = 0) -> None:
        """Take the GPU.

        Raises:
            BackendUnavailableError: There is no driver, or no such GPU.
        """
        self.driver = open_driver()
        self.ordinal = ordinal
        handle = ctypes.c_int()
        status = self.driver.cuDeviceGet(ctypes.byref(handle), ordinal)
        if status != 0:
            raise BackendUnavailableError(f"no GPU {ordinal}: {self.message(status)}")
        self.compute_capability = self._compute_capability(handle)
        self._context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), handle)
        self.stream = ctypes.c_void_p()
        with self.current():
            self.call("cuStreamCreate", ctypes.byref(self.stream), _STREAM_NON_BLOCKING)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this the GPU of the calling thread."""
        self.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def copy_in(self, address: int, array: NDArray[Any]) -> None:
        """Put a copy of a contiguous array on the stream. Pageable memory is read at once, a
        ``PinnedBlock`` until ``synchronize``.
        """
        if array.nbytes:
            self.call(
                "cuMemcpyHtoDAsync_v2",
                ctypes.c_uint64(address),
                ctypes.c_void_p(array.ctypes.data),
                ctypes.c_size_t(array.nbytes),
                self.stream,
            )

    def copy_out(self, array: NDArray[Any], address: int) -> None:
        """Put a copy into a contiguous array on the stream; it is there after ``synchronize``."""
        if array.nbytes:
            self.call(
                "cuMemcpyDtoHAsync_v2",
                ctypes.c_void_p(array.ctypes.data),
                ctypes.c_uint64(address),
                ctypes.c_size_t(array.nbytes),
                self.stream,
            )

    def synchronize(self) -> None:
        """Wait for everything on the stream."""
        self.call("cuStreamSynchronize", self.stream)

    def call(self, name: str, *arguments: Any) -> None:
        """Call the driver; raises ``InferenceError`` with its words where it refuses."""
        self.check(getattr(self.driver, name)(*arguments), name)

    def check(self, status: int, name: str) -> None:
        """Raise ``InferenceError`` unless ``status`` is success."""
        if status != 0:
            raise InferenceError(f"{name}: {self.message(status)}")

    def message(self, status: int) -> str:
        """The driver's words for a status."""
        text = ctypes.c_char_p()
        self.driver.cuGetErrorString(status, ctypes.byref(text))
        return text.value.decode() if text.value else f"CUDA error {status}"

    def _compute_capability(self, device: ctypes.c_int) -> tuple[int, int]:
        values = []
        for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR):
            value = ctypes.c_int()
            self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            values.append(value.value)
        return values[0], values[1]


class DeviceArena:
    """One allocation that grows and is used again: what lies in it is lost when it grows."""

    def __init__(self, gpu: CudaDevice) -> None:
        """Allocate nothing yet."""
        self._gpu = gpu
        self._address, self._num_bytes = ctypes.c_uint64(0), 0

    @property
    def num_bytes(self) -> int:
        """What can be reserved without growing."""
        return self._num_bytes

    def reserve(self, num_bytes: int) -> int:
        """The address of at least so many bytes, aligned as ``aligned_offsets`` wants it.

        Raises:
            InferenceError: The GPU has not so much memory free.
        """
        if num_bytes > self._num_bytes:
            if self._num_bytes:
                self._gpu.call("cuMemFree_v2", self._address)
                self._num_bytes = 0
            status = self._gpu.driver.cuMemAlloc_v2(
                ctypes.byref(self._address), ctypes.c_size_t(num_bytes)
            )
            if status == _OUT_OF_MEMORY:
                raise InferenceError(
                    f"the batch needs {num_bytes} bytes of GPU memory, which are not free: send "
                    "fewer images"
                )
            self._gpu.check(status, "cuMemAlloc")
            self._num_bytes = num_bytes
        return int(self._address.value)


class PinnedBlock:
    """Host memory that the GPU copies from and to while the host goes on; it grows like
    ``DeviceArena``.
    """

    def __init__(self, gpu: CudaDevice) -> None:
        """Allocate nothing yet."""
        self._gpu = gpu
        self._address, self._num_bytes = ctypes.c_uint64(0), 0

    def reserve(self, num_bytes: int) -> NDArray[np.uint8]:
        """So many bytes, the same ones again at the next call; nothing may be copied meanwhile.

        Raises:
            InferenceError: The host has not so much memory free.
        """
        if num_bytes > self._num_bytes:
            if self._num_bytes:
                self._gpu.call("cuMemFreeHost", self._address)
                self._num_bytes = 0
            self._gpu.call(
                "cuMemAllocHost_v2", ctypes.byref(self._address), ctypes.c_size_t(num_bytes)
            )
            self._num_bytes = num_bytes
        if num_bytes == 0:
            return np.zeros(0, np.uint8)
        memory = (ctypes.c_uint8 * num_bytes).from_address(int(self._address.value))
        return np.ctypeslib.as_array(memory)


def aligned_offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where arrays of these bytes lie one after the other, and the bytes of all."""
    ends = np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)])
    return [int(end) for end in ends[:-1]], int(ends[-1])


def current_gpu() -> int:
    """Number of the GPU whose context is the calling thread's.

    Raises:
        BackendUnavailableError: There is no driver, or no such context.
    """
    driver = open_driver()
    current, handle = ctypes.c_int(), ctypes.c_int()
    status = driver.cuCtxGetDevice(ctypes.byref(current))
    if status != 0:
        raise BackendUnavailableError(f"no GPU is current: CUDA error {status}")
    for ordinal in itertools.count():
        if driver.cuDeviceGet(ctypes.byref(handle), ordinal) != 0:
            break
        if handle.value == current.value:
            return ordinal
    raise BackendUnavailableError(f"CUDA device {current.value} is not among the visible ones")


def open_driver() -> ctypes.CDLL:
    """NVIDIA's driver, started.

    Raises:
        BackendUnavailableError: There is none, or it does not start.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendUnavailableError(f"no NVIDIA driver: {error}") from error
    status = driver.cuInit(0)
    if status != 0:
        raise BackendUnavailableError(f"the NVIDIA driver does not start: CUDA error {status}")
    return driver
