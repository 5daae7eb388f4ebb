"""``stand_in_tensorrt`` for engines that hold the prompt plugin: ONNX Runtime computes what is
before the plugin; the plugin is made by TensorRT's own registry and called as TensorRT calls it.
"""

import numpy as np
import onnx
import tensorrt_dispatch_libs  # noqa: F401  # its library must be loaded before the bindings
from onnx import helper
from tensorrt_dispatch_bindings import (  # noqa: F401  # the plugin takes them from here
    DimensionOperation,
    DimsExprs,
    DynamicPluginTensorDesc,
    IPluginCreatorV3One,
    IPluginV3,
    IPluginV3OneBuild,
    IPluginV3OneCore,
    IPluginV3OneRuntime,
    PluginField,
    PluginFieldCollection,
    PluginFieldType,
    PluginTensorDesc,
    TensorRTPhase,
    float32,
    get_plugin_registry,
    int32,
)

from tests.unit.export import stand_in_tensorrt as plain
from tests.unit.export.stand_in_tensorrt import (  # noqa: F401  # likewise
    ExecutionContextAllocationStrategy,
    ILogger,
    TensorIOMode,
    nptype,
)
from weaksam_rt.cuda_driver import CudaDevice, DeviceArena
from weaksam_rt.prompt_clustering.tensorrt_plugin import (
    ENGINE_INPUTS,
    ENGINE_OUTPUTS,
    output_shapes,
)

__version__ = plain.__version__
_ONNX_TYPES = {1: "tensor(float)", 2: "tensor(uint8)", 6: "tensor(int32)"}


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, plan):
        return _Engine(plan)


class _Value:
    def __init__(self, info):
        kind = info.type.tensor_type
        self.name, self.type = info.name, _ONNX_TYPES[kind.elem_type]
        self.dims = [dim.dim_value or -1 for dim in kind.shape.dim]


class _Engine(plain._Engine):
    num_optimization_profiles = 1

    def __init__(self, plan):
        model = onnx.load_from_string(plan)
        onnx.checker.check_model(model)
        graph = model.graph
        self.inputs = {value.name: _Value(value) for value in graph.input}
        self.outputs = {value.name: _Value(value) for value in graph.output}
        self._names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self._names)
        (node,) = [node for node in graph.node if node.domain]
        assert list(node.output) == list(ENGINE_OUTPUTS)
        self.plugin = _made(node)
        # What is before the plugin, whose maps become an output.
        graph.node.remove(node)
        unused = [value for value in graph.input if value.name == "image_size"]
        graph.input.remove(*unused)
        kept = [value for value in graph.output if value.name == "logits"]
        del graph.output[:]
        graph.output.extend([*kept, helper.make_tensor_value_info(node.input[0], 1, None)])
        self._maps_name = node.input[0]
        self._before = plain.onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        image = np.zeros((1, *self.inputs["image"].dims[1:]), np.uint8)
        self.maps_of_tag = self.maps(image, np.zeros(1, np.int32))[1].shape[1]

    def maps(self, image, tag_ids):
        """Logits, and the maps that the plugin gets."""
        inputs = {"image": image, "tag_ids": tag_ids}
        return self._before.run(["logits", self._maps_name], inputs)

    def get_tensor_profile_shape(self, name, profile):
        least = {"image": 1, "tag_ids": 1}
        most = {"image": 2, "tag_ids": self.num_classes}
        low, high = (
            tuple(limit[name] if size == -1 else size for size in self.inputs[name].dims)
            for limit in (least, most)
        )
        return low, high, high

    @property
    def num_classes(self):
        return self.outputs["logits"].dims[-1]

    def create_execution_context(self, strategy):
        return _Context(self)


def _made(node):
    """By the registry, as TensorRT's ONNX parser does it."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    version, namespace = (values.pop(n).decode() for n in ("plugin_version", "plugin_namespace"))
    data = {
        n: np.array([v], np.int32 if isinstance(v, int) else np.float32) for n, v in values.items()
    }
    fields = [
        PluginField(n, a, PluginFieldType.INT32 if a.dtype == np.int32 else PluginFieldType.FLOAT32)
        for n, a in data.items()
    ]
    creator = get_plugin_registry().get_creator(node.op_type, version, namespace)
    return creator.create_plugin(node.name, PluginFieldCollection(fields), TensorRTPhase.BUILD)


class _Context(plain._Context):
    def __init__(self, engine):
        super().__init__(engine)
        self._plugin = engine.plugin.attach_to_context(None)
        self._gpu = CudaDevice()

    def set_input_shape(self, name, shape):
        low, _, high = self._engine.get_tensor_profile_shape(name, 0)
        self._shapes[name] = tuple(shape)
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def get_tensor_shape(self, name):
        if name == "logits":
            return self._shapes["image"][0], self._engine.num_classes
        return self._output_shapes()[name]

    def _output_shapes(self):
        num_tags = self._shapes["tag_ids"][0]
        num_maps = num_tags * self._engine.maps_of_tag
        found = output_shapes(num_maps, num_tags, self._plugin.config)
        return {name: tuple(shape) for name, shape in zip(ENGINE_OUTPUTS, found, strict=True)}

    def execute_async_v3(self, stream):
        assert set(self._addresses) == {*self._engine.inputs, *self._engine.outputs}
        inputs = {
            name: plain._memory(
                self._addresses[name], shape, nptype(self._engine.inputs[name].type)
            )
            for name, shape in self._shapes.items()
        }
        logits, maps = self._engine.maps(inputs["image"], inputs["tag_ids"])
        plain._memory(self._addresses["logits"], logits.shape, logits.dtype)[...] = logits
        described = [_description(array.shape) for array in (maps, *list(inputs.values())[1:])]
        largest = [DynamicPluginTensorDesc() for _ in described]
        for tensor, description in zip(largest, described, strict=True):
            tensor.max = description.dims
        own = {n: self._allocated(4 * int(np.prod(s))) for n, s in self._output_shapes().items()}
        addresses = {**own, **self._addresses, "maps": self._allocated(maps.nbytes)}
        plain._memory(addresses["maps"], maps.shape, maps.dtype)[...] = maps
        self._plugin.on_shape_change(described, [])
        self._plugin.enqueue(
            described,
            [],
            [addresses[name] for name in ENGINE_INPUTS],
            [addresses[name] for name in ENGINE_OUTPUTS],
            self._allocated(self._plugin.get_workspace_size(largest, [])),
            stream,
        )
        return True

    def _allocated(self, num_bytes):
        return DeviceArena(self._gpu).reserve(num_bytes)


def _description(shape):
    tensor = PluginTensorDesc()
    tensor.dims = shape
    return tensor
