"""Arrays of other libraries where they lie: on a GPU, or in host memory; nothing is copied.

PyTorch, CuPy, JAX and Triton's tensors say where their memory is by DLPack or by
``__cuda_array_interface__``. Both are read here without importing any of them.
"""

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Numbers of DLPack's enums.
_DLPACK_HOST_DEVICES = (1, 3)
"""CPU memory, and such that a GPU can reach."""
_DLPACK_CUDA_DEVICES = (2, 13)
"""GPU memory, and managed memory."""
_DLPACK_KINDS = {0: "i", 1: "u", 2: "f", 6: "b"}
_LEGACY_STREAM = 1
"""CUDA's default stream, as both protocols number it."""
_CAPSULE_NAME = b"dltensor"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceArray:
    """A contiguous array in the memory of a GPU, which someone else owns."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device: int | None
    """Number of the GPU; None: the owner does not say, the driver knows."""
    stream: int | None
    """CUDA stream on which the content becomes ready: 1 the default one, 2 the thread's, or a
    handle; None: it is ready."""
    owner: object
    """Keeps the memory alive."""

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the content."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, *shape: int) -> "DeviceArray":
        """The same memory with other axes; sizes are given, none is found out."""
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"an array of shape {self.shape} has no shape {shape}")
        return DeviceArray(
            address=self.address, shape=shape, dtype=self.dtype, device=self.device,
            stream=self.stream, owner=self.owner,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedArrays:
    """Contiguous arrays as if they lay one after the other."""

    parts: "tuple[NDArray[Any] | DeviceArray, ...]"
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of all parts."""
        return self.parts[0].dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def __len__(self) -> int:
        return self.shape[0]


AnyArray = NDArray[Any] | DeviceArray | JoinedArrays


def as_array(name: str, value: Any) -> NDArray[Any] | DeviceArray:
    """The array where it lies.

    Args:
        name: Of the argument, for messages.
        value: NumPy's array, or an object with ``__dlpack__`` or ``__cuda_array_interface__``, or a
            DLPack capsule, such as ``to_dlpack()`` of Triton's tensors gives.

    Raises:
        ValueError: It is none of these, on no CUDA device, not contiguous or of an unusual dtype.
    """
    if isinstance(value, np.ndarray | DeviceArray):
        return value
    if type(value).__name__ == "PyCapsule":
        return _from_capsule(name, value)
    if hasattr(value, "__dlpack__"):
        return _from_dlpack(name, value)
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is not None:
        return from_cuda_array_interface(name, interface, owner=value)
    raise ValueError(
        f"{name} must be a NumPy array or have __dlpack__ or __cuda_array_interface__, got "
        f"{type(value).__name__}"
    )


def host_array(name: str, array: AnyArray) -> NDArray[Any]:
    """The array, which must lie in host memory.

    Raises:
        ValueError: It lies on a GPU.
    """
    if isinstance(array, np.ndarray):
        return array
    raise ValueError(
        f"{name} must lie in host memory here, got an array on {device_name(array)}: choose the "
        "backend 'cuda', or copy the array"
    )


def device_name(array: DeviceArray | JoinedArrays) -> str:
    """Such as ``cuda:0``."""
    if isinstance(array, JoinedArrays):
        on_gpus = (part for part in array.parts if isinstance(part, DeviceArray))
        return device_name(next(on_gpus))
    return "cuda" if array.device is None else f"cuda:{array.device}"


def device_of(*arrays: AnyArray, default: int) -> int:
    """Number of the GPU on which the first array lies that says so; none does: ``default``."""
    lent = (
        part
        for array in arrays
        for part in (array.parts if isinstance(array, JoinedArrays) else (array,))
    )
    named = (a.device for a in lent if isinstance(a, DeviceArray) and a.device is not None)
    return next(named, default)


# ---------------------------------------------------------------------------------------------
# __cuda_array_interface__
# ---------------------------------------------------------------------------------------------


def from_cuda_array_interface(
    name: str, interface: Mapping[str, Any], owner: object
) -> DeviceArray:
    """What the dictionary of ``__cuda_array_interface__``, version 2 or 3, describes.

    Raises:
        ValueError: A key is missing, or the array has a mask or is not contiguous.
    """
    missing = [key for key in ("shape", "typestr", "data") if key not in interface]
    if missing:
        raise ValueError(f"{name}: __cuda_array_interface__ has no {missing[0]!r}")
    if interface.get("mask") is not None:
        raise ValueError(f"{name}: arrays with a mask are not supported")
    shape = tuple(int(side) for side in interface["shape"])
    dtype = np.dtype(interface["typestr"])
    strides = interface.get("strides")
    if strides is not None:
        _check_contiguous(name, shape, [int(s) for s in strides], dtype.itemsize)
    stream = interface.get("stream")
    if stream == 0:
        raise ValueError(f"{name}: __cuda_array_interface__ must not name stream 0")
    return DeviceArray(
        address=int(interface["data"][0]), shape=shape, dtype=dtype, device=None,
        stream=None if stream is None else int(stream), owner=owner,
    )  # fmt: skip


def _check_contiguous(
    name: str, shape: Sequence[int], strides: Sequence[int], itemsize: int
) -> None:
    expected = itemsize
    for side, stride in zip(reversed(shape), reversed(strides), strict=True):
        if side > 1 and stride != expected and 0 not in shape:
            raise ValueError(
                f"{name} must be contiguous, got shape {tuple(shape)} with strides of "
                f"{tuple(strides)} bytes"
            )
        expected *= side


# ---------------------------------------------------------------------------------------------
# DLPack
# ---------------------------------------------------------------------------------------------


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    """``DLTensor``, which stands first in ``DLManagedTensor``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _from_dlpack(name: str, value: Any) -> NDArray[Any] | DeviceArray:
    with _dlpack_errors(name):
        device_type = int(value.__dlpack_device__()[0])
        if device_type in _DLPACK_HOST_DEVICES:
            return np.from_dlpack(value)
    if device_type not in _DLPACK_CUDA_DEVICES:
        raise ValueError(f"{name}: DLPack device type {device_type} is neither CPU nor CUDA")
    with _dlpack_errors(name):
        capsule = value.__dlpack__(stream=_LEGACY_STREAM)
    return _from_capsule(name, capsule)


@contextmanager
def _dlpack_errors(name: str) -> Iterator[None]:
    """What the owner of an array, or NumPy, says against lending it, as ``ValueError``."""
    try:
        yield
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} cannot be read by DLPack: {error}. Pass a plain contiguous array of numbers: "
            "a tensor with a gradient as tensor.detach(), any other as a copy"
        ) from error


class _HostCapsule:
    """A capsule as NumPy wants to see it."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def _from_capsule(name: str, capsule: Any) -> NDArray[Any] | DeviceArray:
    api = ctypes.pythonapi
    api.PyCapsule_IsValid.argtypes = (ctypes.py_object, ctypes.c_char_p)
    api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    if not api.PyCapsule_IsValid(capsule, _CAPSULE_NAME):
        raise ValueError(f"{name}: the capsule holds no DLPack tensor, or one already taken")
    pointer = api.PyCapsule_GetPointer(capsule, _CAPSULE_NAME)
    tensor = ctypes.cast(pointer, ctypes.POINTER(_Tensor)).contents
    if tensor.device.type in _DLPACK_HOST_DEVICES:
        with _dlpack_errors(name):
            return np.from_dlpack(_HostCapsule(capsule))
    if tensor.device.type not in _DLPACK_CUDA_DEVICES:
        raise ValueError(f"{name}: DLPack device type {tensor.device.type} is neither CPU nor CUDA")
    dtype = _numpy_dtype(name, tensor.dtype)
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if tensor.strides:
        strides = [tensor.strides[i] * dtype.itemsize for i in range(tensor.ndim)]
        _check_contiguous(name, shape, strides, dtype.itemsize)
    # Whoever holds the capsule and leaves its name owns the tensor: its destructor gives it back.
    return DeviceArray(
        address=(tensor.data or 0) + tensor.byte_offset, shape=shape, dtype=dtype,
        device=tensor.device.id, stream=_LEGACY_STREAM, owner=capsule,
    )  # fmt: skip


def _numpy_dtype(name: str, dtype: _DataType) -> np.dtype[Any]:
    kind = _DLPACK_KINDS.get(dtype.code)
    if kind is None or dtype.lanes != 1 or dtype.bits % 8:
        raise ValueError(
            f"{name}: no NumPy dtype for DLPack's type code {dtype.code} with {dtype.bits} bits "
            f"and {dtype.lanes} lanes"
        )
    return np.dtype(f"{kind}{dtype.bits // 8}")
