"""Post-training quantisation: a float32 graph to one with Q/DQ pairs around its weighted layers.

ONNX Runtime calibrates and places the pairs. Quantised are convolutions and products with a
constant, symmetrically, weights per output channel; everything else stays float32. Biases too,
because TensorRT wants them so.
"""

import copy
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from export.mixed_precision import KeepFp32
from export.onnx_files import save_onnx
from export.onnx_graph import constant, plain_model, replace_initializers
from weaksam_rt.backends.base import Arrays

QuantizedPrecision = Literal["int8", "fp8"]
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FP8_OPSET = 21
_INT8_MAX, _FP8_MAX = 127.0, 448.0


def quantized(
    model: onnx.ModelProto,
    calibration: Sequence[Arrays],
    precision: QuantizedPrecision,
    keep: KeepFp32 | None = None,
) -> onnx.ModelProto:
    """``model`` with Q/DQ pairs of ``precision``.

    Args:
        model: A float32 model.
        calibration: Inputs like those it will see; the range of every activation is taken from
            them.
        precision: ``int8``, or ``fp8`` (E4M3, compute capability 8.9 and later).
        keep: Layers that are not quantised; None: none.

    Raises:
        ValueError: There is nothing to calibrate on, or no layer to quantise.
    """
    if not calibration:
        raise ValueError("quantisation needs at least one input to calibrate on")
    plain = plain_model(model)
    layers = _weighted_layers(plain, keep or KeepFp32())
    if not layers:
        raise ValueError("the graph has no layer to quantise that is not kept in float32")
    with tempfile.TemporaryDirectory(prefix="weaksam-int8-") as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        save_onnx(copy.deepcopy(plain), source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize_static(
                source,
                target,
                _Calibration(calibration),
                quant_format=QuantFormat.QDQ,
                nodes_to_quantize=layers,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "AddQDQPairToWeight": True,
                    "QuantizeBias": False,
                },
            )
        found = onnx.load(target)
    return found if precision == "int8" else _as_fp8(found)


def _weighted_layers(model: onnx.ModelProto, keep: KeepFp32) -> list[str]:
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in _WEIGHTED and node.input[1] in constants and not keep.holds(node)
    ]


def _as_fp8(model: onnx.ModelProto) -> onnx.ModelProto:
    """The pairs of an int8 model in E4M3, over the same ranges."""
    model = version_converter.convert_version(model, _FP8_OPSET)
    del model.graph.value_info[:]
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    zero = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero_point = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
        names = [f"{name}::fp8" for name in node.input[1:3]]
        constants[names[0]] = constant(names[0], scale * np.float32(_INT8_MAX / _FP8_MAX))
        constants[names[1]] = constant(names[1], np.zeros(zero_point.shape, zero))
        node.input[1:3] = names
    replace_initializers(model, constants.values())
    return model


class _Calibration(CalibrationDataReader):  # type: ignore[misc]  # the package has no types
    def __init__(self, inputs: Sequence[Arrays]) -> None:
        self._rest: Iterator[Arrays] = iter(inputs)

    def get_next(self) -> dict[str, Any] | None:
        """The next input, None at the end."""
        arrays = next(self._rest, None)
        return None if arrays is None else dict(arrays)
