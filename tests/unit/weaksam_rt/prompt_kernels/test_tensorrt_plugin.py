"""The prompt chain inside an engine: its kernels beside NumPy, and the plugin with TensorRT's own
classes and registry, on the stand-in for NVIDIA's driver.
"""

import ctypes
import operator
from types import SimpleNamespace

import numpy as np
import pytest

from tests.unit.weaksam_rt.prompt_kernels.cases import random_config, random_nodes
from weaksam_rt.cuda_driver import CudaDevice, PinnedBlock
from weaksam_rt.errors import ArtifactError, BackendUnavailableError
from weaksam_rt.preprocessing import longest_side_frame
from weaksam_rt.prompt_clustering import ClusteringConfig, MapBatch, prompt_batch
from weaksam_rt.prompt_clustering._engine_plan import (
    ENGINE_INPUTS,
    ENGINE_OUTPUTS,
    EngineMaps,
    plan_engine_prompts,
)
from weaksam_rt.prompt_clustering._plan import Plan
from weaksam_rt.prompt_clustering.config import EnginePromptConfig
from weaksam_rt.prompt_clustering.tensorrt_plugin import (
    PLUGIN_NAME,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    config_from_attributes,
    output_shapes,
    plugin_attributes,
    register_prompt_plugin,
)
from weaksam_rt.types import PromptSource

_CONFIG = EnginePromptConfig(num_classes=20, model_size=1024)
_OF_POINTS = ("points", "scores", "class_ids", "sources")


def _image(rng, *, num_layers=3, num_tags=2, kind="smooth", num_passes=2, side=(7, 5)):
    num_maps = (2 + num_layers) * num_tags
    return {
        "maps": random_nodes(rng, (num_passes, num_maps, *side), kind).astype(np.float32),
        "tag_ids": rng.choice(_CONFIG.num_classes, num_tags, replace=False).astype(np.int32),
        "image_size": rng.integers(1, 60, 2).astype(np.int32),
    }


def _maps_of(image):
    num_passes, num_maps, height, width = image["maps"].shape
    return EngineMaps(
        num_passes=num_passes, num_maps=num_maps, num_classes=len(image["tag_ids"]),
        height=height, width=width,
    )  # fmt: skip


def _expected(image, config):
    """The definition, which is told on the host what the kernels find on the GPU."""
    maps, tags = image["maps"], image["tag_ids"]
    num_layers = maps.shape[1] // len(tags) - 2
    kinds = (PromptSource.COARSE, PromptSource.FINE, *[PromptSource.CROSS] * num_layers)
    size = tuple(int(side) for side in image["image_size"])
    batch = MapBatch(
        maps=maps,
        map_images=np.zeros(maps.shape[1], np.int32),
        map_sources=np.repeat(np.array(kinds, np.int32), len(tags)),
        map_classes=np.tile(tags, len(kinds)),
        frames=(longest_side_frame(size, config.model_size),),
        mirrored_passes=(1,)[: maps.shape[0] - 1],
    )
    return prompt_batch(batch, config.clustering)


def _assert_prompts(outputs, expected):
    num_points, num_prompts, num_sam_points = outputs["counts"].view(np.int32).ravel()
    for name in _OF_POINTS:
        ours = outputs[name][:num_points]
        np.testing.assert_array_equal(ours, getattr(expected.prompts, name), err_msg=name)
    np.testing.assert_array_equal(outputs["sam_points"][:num_sam_points], expected.sam_points)
    np.testing.assert_array_equal(outputs["sam_labels"][:num_sam_points], expected.sam_labels)
    np.testing.assert_array_equal(outputs["sam_offsets"][: num_prompts + 1], expected.sam_offsets)


def _run(executor, image, config):
    plan = plan_engine_prompts(_maps_of(image), config)
    return executor.run(Plan(program=plan.program, inputs={**plan.inputs, **image}))


@pytest.mark.parametrize("kind", ["smooth", "plateaus", "zero", "nan", "huge"])
def test_prompts_of_an_image_that_only_the_gpu_knows_are_those_of_the_definition(cpu_kernels, kind):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        image = _image(
            rng, kind=kind, num_passes=1 + seed % 2, num_tags=1 + seed % 3, num_layers=seed % 4
        )
        config = EnginePromptConfig(
            num_classes=20, model_size=int(rng.integers(1, 2000)), clustering=random_config(rng)
        )
        _assert_prompts(_run(cpu_kernels, image, config), _expected(image, config))


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": [0, 5]},
        {"image_size": [5, -3]},
        {"image_size": [5, 32768]},
        {"tag_ids": [4, 4]},
        {"tag_ids": [4, 20]},
        {"tag_ids": [-1, 4]},
    ],
)
def test_an_image_that_makes_no_sense_is_refused_and_harms_nothing(cpu_kernels, change):
    rng = np.random.default_rng(0)
    image = _image(rng) | {name: np.array(v, np.int32) for name, v in change.items()}
    outputs = _run(cpu_kernels, image, _CONFIG)
    np.testing.assert_array_equal(outputs["counts"].view(np.int32), -1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_classes": 0}, "at least one class, got 10 maps of 0 classes"),
        ({"num_classes": 3}, "got 10 maps of 3 classes"),
        ({"num_classes": 10}, "got 10 maps of 10 classes"),
        ({"num_passes": 3}, "1 or 2 passes, got 3"),
    ],
)
def test_maps_that_are_not_an_images_are_refused(shape, message):
    fine = {"num_passes": 1, "num_maps": 10, "num_classes": 2, "height": 4, "width": 4}
    with pytest.raises(ValueError, match=message):
        EngineMaps(**(fine | shape))


def test_outputs_have_room_for_all_that_the_kernels_may_write():
    for num_classes, num_layers in ((1, 0), (1, 12), (5, 12), (20, 3)):
        num_maps = (2 + num_layers) * num_classes
        maps = EngineMaps(
            num_passes=2, num_maps=num_maps, num_classes=num_classes, height=14, width=14
        )
        buffers = plan_engine_prompts(maps, _CONFIG).program.buffers
        declared = output_shapes(num_maps, num_classes, _CONFIG)
        for name, shape in zip(ENGINE_OUTPUTS[:-1], declared[:-1], strict=True):
            needed = buffers[name].shape
            # A few more than needed: the sizes must be sums, products and quotients.
            assert needed[0] <= shape[0] <= needed[0] + 4 and needed[1:] == tuple(shape[1:])


# -- the plugin ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trt():
    """TensorRT's dispatch runtime: the plugin classes and the registry are TensorRT's own."""
    pytest.importorskip("tensorrt_dispatch_libs")
    return pytest.importorskip("tensorrt_dispatch_bindings")


@pytest.fixture
def creator(trt):
    register_prompt_plugin(trt)
    return trt.get_plugin_registry().get_creator(PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE)


def _made(trt, creator, config=_CONFIG):
    """As TensorRT's ONNX parser does it, with the attributes of a node as fields."""
    kinds = trt.PluginFieldType
    attributes = plugin_attributes(config)
    data = {
        n: np.array([v], np.int32 if isinstance(v, int) else np.float32)
        for n, v in attributes.items()
    }
    fields = [
        trt.PluginField(n, a, kinds.INT32 if a.dtype == np.int32 else kinds.FLOAT32)
        for n, a in data.items()
    ]
    collection = trt.PluginFieldCollection(fields)
    return creator.create_plugin("prompts", collection, trt.TensorRTPhase.BUILD)


def test_tensorrts_registry_finds_the_creator(trt, creator):
    assert creator.name == PLUGIN_NAME
    names = [field.name for field in creator.field_names]
    assert names == list(plugin_attributes(_CONFIG))
    # A second registration of the same process is the first.
    assert register_prompt_plugin(trt) is register_prompt_plugin(trt)


def test_an_engine_keeps_the_configuration(trt, creator):
    for seed in range(5):
        clustering = random_config(np.random.default_rng(seed))
        config = EnginePromptConfig(num_classes=7, model_size=320, clustering=clustering)
        plugin = _made(trt, creator, config).clone()
        kept = plugin.get_fields_to_serialize()
        again = creator.create_plugin("prompts", kept, trt.TensorRTPhase.RUNTIME)
        assert isinstance(again, trt.IPluginV3)
        assert again.config == config_from_attributes({f.name: f.data[0].item() for f in kept})
        assert again.config.model_size == 320
        assert again.config.clustering.cross_peaks.value_thresh == pytest.approx(
            clustering.cross_peaks.value_thresh
        )


def test_attributes_that_are_not_the_plugins_are_refused():
    attributes = plugin_attributes(_CONFIG)
    assert config_from_attributes(attributes) == _CONFIG
    with pytest.raises(ArtifactError, match=r"attributes \['cam_is_l2'.*, expected .*export the"):
        config_from_attributes({n: v for n, v in attributes.items() if n != "model_size"})
    with pytest.raises(ArtifactError, match="WeakSamPrompts: kernel_size must be odd"):
        config_from_attributes(attributes | {"cam_kernel_size": 4})


def test_the_builder_is_told_sizes_as_expressions(trt, creator, monkeypatch):
    plugin = _made(trt, creator)

    operations = {
        "SUM": operator.add, "SUB": operator.sub, "PROD": operator.mul,
        "FLOOR_DIV": operator.floordiv,
    }  # fmt: skip
    # Calculates at once what TensorRT keeps as expressions, which only it can make.
    builder = SimpleNamespace(
        constant=lambda value: value,
        operation=lambda kind, first, second: operations[kind.name](first, second),
    )

    with_lists = SimpleNamespace(
        DimsExprs=lambda rank: [None] * rank, DimensionOperation=trt.DimensionOperation
    )
    monkeypatch.setattr(type(plugin), "trt", with_lists)
    shapes = plugin.get_output_shapes([[2, 28, 14, 14], [2], [2]], [], builder)
    assert shapes == output_shapes(28, 2, _CONFIG)
    assert len(shapes) == plugin.num_outputs == len(ENGINE_OUTPUTS)


def _description(trt, array):
    tensor = trt.PluginTensorDesc()
    kinds = {"f": trt.float32, "i": trt.int32}
    tensor.dims, tensor.type = array.shape, kinds[array.dtype.kind]
    tensor.format = trt.TensorFormat.LINEAR
    return tensor


def test_each_tensor_has_one_type_row_after_row(trt, creator, monkeypatch):
    plugin = _made(trt, creator)
    # The enum is in TensorRT's full library only.
    formats = SimpleNamespace(LINEAR="rows", CHW4="vectors")
    full = SimpleNamespace(TensorFormat=formats, float32=trt.float32, int32=trt.int32)
    monkeypatch.setattr(type(plugin), "trt", full)
    kinds = [trt.float32, trt.int32, trt.int32]
    kinds += plugin.get_output_data_types(kinds)

    def takes(position, kind, layout=formats.LINEAR):
        tensors = [SimpleNamespace(desc=SimpleNamespace(type=kind, format=layout))] * len(kinds)
        return plugin.supports_format_combination(position, tensors, len(ENGINE_INPUTS))

    for position, kind in enumerate(kinds):
        assert takes(position, kind)
        assert not takes(position, kind, formats.CHW4)
        assert not takes(position, trt.float16)


def _description(trt, array):
    tensor = trt.PluginTensorDesc()
    tensor.dims = array.shape
    return tensor


class _Engine:
    """What TensorRT is to its plugin: memory, a stream and the calls, in TensorRT's order."""

    def __init__(self, trt, plugin, largest):
        self.gpu = CudaDevice()
        self._trt, self._memory = trt, []
        self.plugin = plugin.attach_to_context(None)
        largest_tensors = []
        for array in largest.values():
            largest_tensors.append(trt.DynamicPluginTensorDesc())
            largest_tensors[-1].max = array.shape
        self.workspace = self._allocate(plugin.get_workspace_size(largest_tensors, []))
        self.addresses = {n: self._allocate(a.nbytes) for n, a in largest.items()}
        shapes = output_shapes(largest["maps"].shape[1], len(largest["tag_ids"]), plugin.config)
        self.room = {
            name: np.zeros(shape, np.float32 if kind == trt.float32 else np.int32)
            for name, shape, kind in zip(
                ENGINE_OUTPUTS, shapes, plugin.get_output_data_types(None), strict=True
            )
        }
        self.addresses |= {n: self._allocate(a.nbytes) for n, a in self.room.items()}

    def _allocate(self, num_bytes):
        address = ctypes.c_uint64()
        with self.gpu.current():
            self.gpu.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        return address.value

    def __call__(self, image):
        described = [_description(self._trt, array) for array in image.values()]
        with self.gpu.current():
            for name, array in image.items():
                self.gpu.copy_in(self.addresses[name], array)
            self.plugin.on_shape_change(described, [])
            self.plugin.enqueue(
                described, [], [self.addresses[n] for n in ENGINE_INPUTS],
                [self.addresses[n] for n in ENGINE_OUTPUTS], self.workspace,
                self.gpu.stream.value,
            )  # fmt: skip
            return {name: self._read(name) for name in ENGINE_OUTPUTS}

    def _read(self, name):
        array = np.empty_like(self.room[name])
        read = PinnedBlock(self.gpu).reserve(array.nbytes)
        self.gpu.copy_out(read, self.addresses[name])
        self.gpu.synchronize()
        array[...] = read.view(array.dtype).reshape(array.shape)
        return array


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def launches(request):
    """Where the kernels run; for the stand-in, how many it was asked to run."""
    if request.param == "gpu":
        return None
    return ctypes.c_int.in_dll(request.getfixturevalue("stand_in"), "num_launches")


def test_the_plugin_makes_the_prompts_of_the_definition_in_tensorrts_memory(trt, creator, launches):
    config = EnginePromptConfig(
        num_classes=20, model_size=512, clustering=ClusteringConfig(points_per_cluster=3)
    )
    rng = np.random.default_rng(0)
    engine = _Engine(trt, _made(trt, creator, config), _image(rng, num_tags=4))
    # Other sizes, then the first again: what was prepared is for its own.
    for num_tags, num_passes in ((4, 2), (1, 1), (3, 2), (4, 2), (4, 2)):
        image = _image(rng, num_tags=num_tags, num_passes=num_passes)
        if launches is not None:
            launches.value = 0
        outputs = engine(image)
        assert launches is None or launches.value == 8
        _assert_prompts(outputs, _expected(image, config))


def test_a_plugin_without_a_gpu_says_so(trt, creator, stand_in):
    plugin = _made(trt, creator)
    image = _image(np.random.default_rng(0))
    with pytest.raises(BackendUnavailableError, match="no GPU is current"):
        plugin.on_shape_change([_description(trt, a) for a in image.values()], [])
