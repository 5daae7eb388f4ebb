"""The part of TensorRT's Python API that the runtime calls, for machines without a GPU: a plan is
an ONNX file, memory is where the driver's stand-in has it, and ONNX Runtime computes.

What it shows: that the calls come in the right order with the right arguments, and that every
address, size and profile is right. What it cannot show, the tests marked ``gpu`` do.
"""

import ctypes
from enum import Enum, IntEnum
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

__version__ = "10.7.0.23"
PROFILES = (
    {"image": ((1, 16, 16, 3), (1, 16, 16, 3))},
    {"image": ((1, 16, 16, 3), (8, 16, 16, 3))},
)
SCRATCH_BYTES = 1000
used_profiles = []
"""Of each execution, in order."""


class ILogger:
    class Severity(IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2


class TensorIOMode(Enum):
    INPUT = 0
    OUTPUT = 1


class ExecutionContextAllocationStrategy(Enum):
    STATIC = 0
    USER_MANAGED = 2


class SerializationFlag(Enum):
    EXCLUDE_WEIGHTS = 0
    INCLUDE_REFIT = 2


def nptype(dtype):
    return {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(int32)": np.int32}[
        dtype
    ]


class Runtime:
    def __init__(self, logger):
        self._logger = logger

    def deserialize_cuda_engine(self, plan):
        if not plan.startswith(b"\x08"):
            self._logger.log(ILogger.Severity.WARNING, "a warning")
            self._logger.log(ILogger.Severity.ERROR, "magic tag\nmismatch")
            return None
        onnx.load_from_string(plan)
        return _Engine(plan)


class Refitter:
    def __init__(self, engine, logger):
        self.engine, self.plan = engine, None

    def get_missing_weights(self):
        return []

    def refit_cuda_engine(self):
        self.engine.plan = self.plan
        return True


class OnnxParserRefitter:
    num_errors = 0

    def __init__(self, refitter, logger):
        self._refitter = refitter

    def refit_from_file(self, path):
        self._refitter.plan = Path(path).read_bytes()
        return True


class _SerializationConfig:
    def __init__(self):
        self.flags = {SerializationFlag.EXCLUDE_WEIGHTS}

    def set_flag(self, flag):
        self.flags.add(flag)

    def clear_flag(self, flag):
        self.flags.discard(flag)


class _Engine:
    refittable = True
    device_memory_size_v2 = SCRATCH_BYTES
    num_optimization_profiles = len(PROFILES)

    def __init__(self, plan):
        self.plan = plan
        self.session = onnxruntime.InferenceSession(plan, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self._names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, position):
        return self._names[position]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return {**self.inputs, **self.outputs}[name].type

    def get_tensor_profile_shape(self, name, profile):
        low, high = PROFILES[profile][name]
        return low, high, high

    def create_serialization_config(self):
        return _SerializationConfig()

    def serialize_with_config(self, config):
        assert config.flags == {SerializationFlag.INCLUDE_REFIT}
        return self.plan

    def create_execution_context(self, strategy):
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return _Context(self)


class _Context:
    def __init__(self, engine):
        self._engine, self._profile = engine, 0
        self._shapes, self._addresses, self._scratch = {}, {}, None

    def set_optimization_profile_async(self, profile, stream):
        assert stream
        self._profile = profile
        return True

    def set_device_memory(self, address, size):
        assert address % 256 == 0
        assert size >= SCRATCH_BYTES
        ctypes.memset(address, 0x5A, size)
        self._scratch = address

    def set_input_shape(self, name, shape):
        low, high = PROFILES[self._profile][name]
        self._shapes[name] = tuple(shape)
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def infer_shapes(self):
        return [name for name in self._engine.inputs if name not in self._shapes]

    def get_tensor_shape(self, name):
        batch = next(iter(self._shapes.values()))[0]
        return (batch, *self._engine.outputs[name].shape[1:])

    def set_tensor_address(self, name, address):
        assert address % 256 == 0
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        assert stream
        assert self._scratch is not None
        assert set(self._addresses) == {*self._engine.inputs, *self._engine.outputs}
        inputs = {
            name: _memory(self._addresses[name], shape, nptype(self._engine.inputs[name].type))
            for name, shape in self._shapes.items()
        }
        results = self._engine.session.run(list(self._engine.outputs), inputs)
        ctypes.memset(self._scratch, 0xA5, SCRATCH_BYTES)  # as an engine does with its own
        for name, array in zip(self._engine.outputs, results, strict=True):
            _memory(self._addresses[name], array.shape, array.dtype)[...] = array
        used_profiles.append(self._profile)
        return True


def _memory(address, shape, dtype):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)
