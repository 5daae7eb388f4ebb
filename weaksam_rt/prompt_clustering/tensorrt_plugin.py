"""The prompt chain as a TensorRT plugin: classifier and prompts are one engine.

An ``IPluginV3`` in Python whose work is the prebuilt kernels, launched on TensorRT's stream, in its
memory; nothing is copied, nothing waited for, and it may be captured as a CUDA graph. An engine
with it is opened by Python processes that registered it (``TensorRtModel`` does): TensorRT takes
kernels ahead of time only one a plugin and without scratch memory, and the chain has eight that
share some.

Source:
    NVIDIA's TensorRT developer guide, "Adding Custom Layers using the Python API".
"""

import types
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from weaksam_rt.class_activation_map import PeakConfig
from weaksam_rt.cuda_driver import aligned_offsets, current_gpu
from weaksam_rt.errors import ArtifactError
from weaksam_rt.prompt_clustering._backends import kernel_executor
from weaksam_rt.prompt_clustering._engine_plan import (
    ENGINE_INPUTS,
    ENGINE_OUTPUTS,
    EngineMaps,
    plan_engine_prompts,
)
from weaksam_rt.prompt_clustering._plan import Plan
from weaksam_rt.prompt_clustering.config import ClusteringConfig, EnginePromptConfig

if TYPE_CHECKING:
    from weaksam_rt.prompt_clustering._cuda import EnqueuedProgram, ResidentArrays

__all__ = [
    "ENGINE_INPUTS",
    "ENGINE_OUTPUTS",
    "PLUGIN_NAME",
    "PLUGIN_NAMESPACE",
    "PLUGIN_VERSION",
    "config_from_attributes",
    "output_shapes",
    "plugin_attributes",
    "register_prompt_plugin",
]

PLUGIN_NAME = "WeakSamPrompts"
"""Also the operator's type in ONNX graphs."""
PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = "weaksam_rt"
"""Also the operator's domain in ONNX graphs."""
_FLOAT_OUTPUTS = ("points", "scores", "sam_points")
_EXAMPLE = EnginePromptConfig(num_classes=1, model_size=1)
_NODE_FIELDS = ("plugin_version", "plugin_namespace")
"""Attributes of a node that are no fields of the plugin's own."""


def plugin_attributes(config: EnginePromptConfig) -> dict[str, int | float]:
    """The configuration as attributes of an ONNX node, which are the plugin's fields."""
    attributes: dict[str, int | float] = {
        "num_classes": config.num_classes,
        "model_size": config.model_size,
        "points_per_cluster": config.clustering.points_per_cluster,
    }
    clustering = config.clustering
    for kind, peaks in (("cam", clustering.cam_peaks), ("cross", clustering.cross_peaks)):
        attributes |= {
            f"{kind}_kernel_size": peaks.kernel_size,
            f"{kind}_value_thresh": peaks.value_thresh,
            f"{kind}_max_candidates": peaks.max_candidates,
            f"{kind}_is_l2": int(peaks.distance == "l2"),
        }
    return attributes


def config_from_attributes(attributes: Mapping[str, int | float]) -> EnginePromptConfig:
    """The way back from ``plugin_attributes``.

    Raises:
        ArtifactError: Attributes are missing, unknown or out of their range.
    """
    expected = set(plugin_attributes(_EXAMPLE))
    if set(attributes) != expected:
        raise ArtifactError(
            f"{PLUGIN_NAME}: attributes {sorted(attributes)}, expected {sorted(expected)}; export "
            "the graph again"
        )
    try:
        clustering = ClusteringConfig(
            cam_peaks=_peaks(attributes, "cam"),
            cross_peaks=_peaks(attributes, "cross"),
            points_per_cluster=int(attributes["points_per_cluster"]),
        )
    except ValueError as error:
        raise ArtifactError(f"{PLUGIN_NAME}: {error}") from error
    return EnginePromptConfig(
        num_classes=int(attributes["num_classes"]),
        model_size=int(attributes["model_size"]),
        clustering=clustering,
    )


def _peaks(attributes: Mapping[str, int | float], kind: str) -> PeakConfig:
    return PeakConfig(
        kernel_size=int(attributes[f"{kind}_kernel_size"]),
        value_thresh=float(attributes[f"{kind}_value_thresh"]),
        max_candidates=int(attributes[f"{kind}_max_candidates"]),
        distance="l2" if attributes[f"{kind}_is_l2"] else "l1",
    )


def output_shapes(num_maps: Any, num_classes: Any, config: EnginePromptConfig) -> list[list[Any]]:
    """Shapes of ``ENGINE_OUTPUTS`` with room for all prompts that the maps can give.

    Args:
        num_maps: An integer, or anything that adds, multiplies and divides like one.
        num_classes: Likewise.
        config: Of the plugin.
    """
    clustering = config.clustering
    num_cams = num_classes * 2
    cam_points = num_cams * clustering.cam_peaks.max_candidates
    pooled = (num_maps - num_cams) * clustering.cross_peaks.max_candidates
    # One more than the quotient is enough for at least one centre.
    points = cam_points + pooled // clustering.points_per_cluster + 1
    prompts = points + num_cams
    sam_points = points * 2 + cam_points + num_cams
    return [
        [points, 2], [points], [points], [points], [sam_points, 2], [sam_points], [prompts + 1],
        [3],
    ]  # fmt: skip


@cache
def _plan_of(maps: EngineMaps, config: EnginePromptConfig) -> Plan:
    return plan_engine_prompts(maps, config)


@cache
def _constants_of(device: int, maps: EngineMaps, config: EnginePromptConfig) -> "ResidentArrays":
    """What the shape alone decides; a few kilobytes for each shape seen."""
    inputs = {n: np.asarray(a) for n, a in _plan_of(maps, config).inputs.items()}
    return kernel_executor(device).resident(inputs)


def _scratch(plan: Plan) -> tuple[dict[str, int], int]:
    """Where each buffer that is not an output lies in the workspace, and the workspace's bytes."""
    buffers = {n: b for n, b in plan.program.buffers.items() if n not in ENGINE_OUTPUTS}
    offsets, total = aligned_offsets([buffer.num_bytes for buffer in buffers.values()])
    return dict(zip(buffers, offsets, strict=True)), total


@dataclass(frozen=True, slots=True)
class _Dimension:
    """TensorRT's symbolic size with an integer's arithmetic."""

    expression: Any
    trt: Any
    builder: Any

    def __add__(self, other: "int | _Dimension") -> "_Dimension":
        return self._with("SUM", other)

    def __sub__(self, other: "int | _Dimension") -> "_Dimension":
        return self._with("SUB", other)

    def __mul__(self, other: "int | _Dimension") -> "_Dimension":
        return self._with("PROD", other)

    def __floordiv__(self, other: "int | _Dimension") -> "_Dimension":
        return self._with("FLOOR_DIV", other)

    def _with(self, name: str, other: "int | _Dimension") -> "_Dimension":
        second = self.builder.constant(other) if isinstance(other, int) else other.expression
        operation = getattr(self.trt.DimensionOperation, name)
        found = self.builder.operation(operation, self.expression, second)
        return _Dimension(found, self.trt, self.builder)


def _maps_of(descriptions: Sequence[Any]) -> EngineMaps:
    """From the dimensions of maps and tags."""
    num_passes, num_maps, height, width = descriptions[0]
    (num_classes,) = descriptions[1]
    return EngineMaps(
        num_passes=num_passes,
        num_maps=num_maps,
        num_classes=num_classes,
        height=height,
        width=width,
    )


@cache
def register_prompt_plugin(trt: ModuleType) -> Any:
    """Make the plugin known to a TensorRT library; engines with it can be built and opened then.

    Args:
        trt: Its Python API.

    Returns:
        The creator. It is registered once for the process.

    Raises:
        ArtifactError: The library has another plugin of this name.
    """
    library: Any = trt
    registry = library.get_plugin_registry()
    there = registry.get_creator(PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE)
    if isinstance(there, _PromptPluginCreator):
        # The same library under another module's name.
        return there
    plugin = _derived(
        _PromptPlugin,
        library,
        (
            library.IPluginV3,
            library.IPluginV3OneCore,
            library.IPluginV3OneBuild,
            library.IPluginV3OneRuntime,
        ),
    )
    creator = _derived(_PromptPluginCreator, library, (library.IPluginCreatorV3One,))(plugin)
    if not registry.register_creator(creator, PLUGIN_NAMESPACE):
        raise ArtifactError(
            f"TensorRT {library.__version__} has another plugin {PLUGIN_NAME} already"
        )
    return creator


def _derived(own: type[Any], trt: Any, interfaces: tuple[Any, ...]) -> type[Any]:
    """``own`` as a class of this library, whose interfaces are known at run time only."""
    return types.new_class(
        PLUGIN_NAME,
        (own, *interfaces),
        exec_body=lambda body: body.update(trt=trt, interfaces=interfaces),
    )


class _PromptPlugin:
    """``IPluginV3`` with all its capabilities. Inputs are ``ENGINE_INPUTS``, outputs
    ``ENGINE_OUTPUTS``.
    """

    trt: ClassVar[Any]
    interfaces: ClassVar[tuple[Any, ...]]

    def __init__(self, config: EnginePromptConfig) -> None:
        for interface in self.interfaces:
            interface.__init__(self)
        self.plugin_name = PLUGIN_NAME
        self.plugin_version = PLUGIN_VERSION
        self.plugin_namespace = PLUGIN_NAMESPACE
        self.num_outputs = len(ENGINE_OUTPUTS)
        self.config = config
        self._fields = _Fields(self.trt, plugin_attributes(config))
        self._enqueued: tuple[Hashable, EnqueuedProgram] | None = None

    def get_capability_interface(self, kind: Any) -> Any:
        """All capabilities are this object's."""
        return self

    def clone(self) -> Any:
        """One for another context; nothing that is prepared is shared."""
        return type(self)(self.config)

    def attach_to_context(self, context: Any) -> Any:
        """One of its own for each execution context."""
        return self.clone()

    # -- building ------------------------------------------------------------------------------

    def get_output_data_types(self, input_types: Any) -> list[Any]:
        """Those of ``ENGINE_OUTPUTS``."""
        floats, integers = self.trt.float32, self.trt.int32
        return [floats if name in _FLOAT_OUTPUTS else integers for name in ENGINE_OUTPUTS]

    def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> list[Any]:
        """``output_shapes``, as expressions of the sizes of maps and tags."""
        num_maps = _Dimension(inputs[0][1], self.trt, builder)
        num_classes = _Dimension(inputs[1][0], self.trt, builder)
        found = []
        for shape in output_shapes(num_maps, num_classes, self.config):
            dims = self.trt.DimsExprs(len(shape))
            for axis, size in enumerate(shape):
                is_fixed = isinstance(size, int)
                dims[axis] = builder.constant(size) if is_fixed else size.expression
            found.append(dims)
        return found

    def supports_format_combination(
        self, position: int, tensors: Sequence[Any], num_inputs: int
    ) -> bool:
        """One type for each tensor, row after row."""
        trt = self.trt
        kinds = [trt.float32, trt.int32, trt.int32, *self.get_output_data_types(None)]
        tensor = tensors[position].desc
        return bool(tensor.format == trt.TensorFormat.LINEAR and tensor.type == kinds[position])

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Sizes come with each call."""

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """Bytes of scratch memory for the largest maps."""
        maps = _maps_of([tensor.max for tensor in inputs])
        return _scratch(_plan_of(maps, self.config))[1]

    def get_valid_tactics(self) -> list[int]:
        """There is one way."""
        return []

    def get_fields_to_serialize(self) -> Any:
        """What ``create_plugin`` is given when an engine is opened."""
        return self._fields.collection

    # -- running -------------------------------------------------------------------------------

    def set_tactic(self, tactic: int) -> None:
        """There is one way."""

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Bring what the sizes decide to the GPU: later a launch may be being captured."""
        _constants_of(current_gpu(), _maps_of([tensor.dims for tensor in inputs]), self.config)

    def enqueue(
        self,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        input_addresses: Sequence[int],
        output_addresses: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launch all kernels on the stream."""
        maps = _maps_of([tensor.dims for tensor in inputs])
        key = (maps, *input_addresses, *output_addresses, workspace, stream)
        if self._enqueued is None or self._enqueued[0] != key:
            # They stay the same from call to call as a rule.
            plan, gpu = _plan_of(maps, self.config), current_gpu()
            addresses = {
                **_constants_of(gpu, maps, self.config).addresses,
                **{name: workspace + offset for name, offset in _scratch(plan)[0].items()},
                **dict(zip(ENGINE_INPUTS, input_addresses, strict=True)),
                **dict(zip(ENGINE_OUTPUTS, output_addresses, strict=True)),
            }
            self._enqueued = key, kernel_executor(gpu).enqueued(plan.program, addresses, stream)
        self._enqueued[1].launch()


class _PromptPluginCreator:
    """Makes the plugin from an ONNX node's attributes, or from what an engine kept of them."""

    trt: ClassVar[Any]
    interfaces: ClassVar[tuple[Any, ...]]

    def __init__(self, plugin: type[Any]) -> None:
        for interface in self.interfaces:
            interface.__init__(self)
        self.name = PLUGIN_NAME
        self.plugin_version = PLUGIN_VERSION
        self.plugin_namespace = PLUGIN_NAMESPACE
        self._fields = _Fields(self.trt, plugin_attributes(_EXAMPLE))
        self.field_names = self._fields.collection
        self._plugin = plugin

    def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
        """For building and for running alike."""
        attributes = {f.name: f.data[0].item() for f in fields if f.name not in _NODE_FIELDS}
        return self._plugin(config_from_attributes(attributes))


class _Fields:
    """Attributes as TensorRT's fields. It reads the arrays where they are: they must outlive it."""

    def __init__(self, trt: Any, attributes: Mapping[str, int | float]) -> None:
        kinds = trt.PluginFieldType
        self._data = {
            name: np.array([value], np.int32 if isinstance(value, int) else np.float32)
            for name, value in attributes.items()
        }
        self.collection = trt.PluginFieldCollection(
            [
                trt.PluginField(
                    name, data, kinds.INT32 if data.dtype == np.int32 else kinds.FLOAT32
                )
                for name, data in self._data.items()
            ]
        )
