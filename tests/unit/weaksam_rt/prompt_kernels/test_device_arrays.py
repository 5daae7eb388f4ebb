"""Arrays of other libraries: read where they lie, or refused with what was wrong."""

import ctypes
import gc
import weakref

import numpy as np
import pytest
import torch

from weaksam_rt.errors import BackendUnavailableError
from weaksam_rt.preprocessing import longest_side_frame
from weaksam_rt.prompt_clustering import (
    ClusteringConfig,
    MapBatch,
    as_array,
    class_nms,
    encode_masks,
    prompt_batch,
    prompts_from_maps,
    summarize_masks,
)
from weaksam_rt.prompt_clustering import device_arrays as module
from weaksam_rt.prompt_clustering._backends import KernelBackend, ReferenceBackend
from weaksam_rt.prompt_clustering._plan import plan_prompts
from weaksam_rt.prompt_clustering.device_arrays import DeviceArray, from_cuda_array_interface


class OnGpu:
    """An array that says it lies on a GPU; its address is that of host memory."""

    def __init__(self, array, **changes):
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "strides": None if array.flags.c_contiguous else array.strides,
            "version": 3,
        } | changes


class PretendsCuda:
    """A CPU tensor whose DLPack capsule names a CUDA device."""

    def __init__(self, tensor, device_type=2, device=0):
        self.tensor, self.device = tensor, (device_type, device)
        self.streams = []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, stream=None):
        self.streams.append(stream)
        capsule = torch.utils.dlpack.to_dlpack(self.tensor)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.argtypes, pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
        dl_tensor = ctypes.cast(pointer(capsule, b"dltensor"), ctypes.POINTER(module._Tensor))
        dl_tensor.contents.device.type, dl_tensor.contents.device.id = self.device
        return capsule


class Unwilling:
    """On a GPU, but not to be had: as a tensor with a gradient."""

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, stream=None):
        raise BufferError("not today")


def test_host_arrays_of_other_libraries_are_views():
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    for value in (tensor, tensor.numpy(), torch.utils.dlpack.to_dlpack(tensor)):
        array = as_array("maps", value)
        assert isinstance(array, np.ndarray)
        assert array.ctypes.data == tensor.data_ptr()
        assert array.shape == (3, 4)
        assert array.dtype == np.float32


def test_a_dlpack_tensor_on_a_gpu_is_described_not_touched():
    tensor = torch.arange(24, dtype=torch.int32).reshape(2, 3, 4)[1:]
    source = PretendsCuda(tensor, device=1)
    array = as_array("maps", source)
    assert (array.address, array.shape, array.dtype) == (tensor.data_ptr(), (1, 3, 4), np.int32)
    assert (array.device, array.stream, source.streams) == (1, 1, [1])
    assert array.nbytes == 48


def test_a_dlpack_tensor_lives_as_long_as_its_description():
    tensor = torch.zeros(1000)
    storage = weakref.ref(tensor)
    array = as_array("maps", PretendsCuda(tensor))
    address, alive = array.address, tensor.data_ptr()
    del tensor
    gc.collect()
    assert address == alive
    np.testing.assert_array_equal(
        np.frombuffer((ctypes.c_float * 1000).from_address(address), np.float32), np.zeros(1000)
    )
    del array
    gc.collect()
    assert storage() is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [0.0], "must be a NumPy array or have .* got list"),
        (lambda: PretendsCuda(torch.zeros(2), device_type=10), "device type 10 is neither"),
        (lambda: PretendsCuda(torch.zeros(4, 6).T), r"contiguous, got shape \(6, 4\) with strides"),
        (lambda: PretendsCuda(torch.zeros(2, dtype=torch.bfloat16)), "type code 4 with 16 bits"),
        (lambda: torch.zeros(2, dtype=torch.bfloat16), "cannot be read by DLPack: .*a copy"),
        (lambda: torch.zeros(2, requires_grad=True), r"by DLPack: .*Pass .*tensor\.detach\(\)"),
        (lambda: Unwilling(), r"by DLPack: not today\. Pass a plain contiguous array"),
        (lambda: OnGpu(np.zeros((4, 6), np.float32).T), r"contiguous, got shape \(6, 4\)"),
        (lambda: OnGpu(np.zeros(3, np.float32), mask=0), "a mask"),
        (lambda: OnGpu(np.zeros(3, np.float32), stream=0), "stream 0"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=f"^maps.*{message}"):
        as_array("maps", make())


def test_an_interface_without_its_keys_is_refused():
    with pytest.raises(ValueError, match="has no 'typestr'"):
        from_cuda_array_interface("maps", {"shape": (1,), "data": (0, False)}, None)


def test_an_interface_is_read_with_its_stream():
    values = np.zeros((2, 5), np.float32)
    array = as_array("maps", OnGpu(values, stream=7))
    assert (array.address, array.shape, array.dtype) == (values.ctypes.data, (2, 5), np.float32)
    assert (array.device, array.stream) == (None, 7)
    assert as_array("maps", OnGpu(np.zeros((3, 0), np.float32), strides=(4, 4))).nbytes == 0


def _batch(maps):
    return MapBatch(
        maps=maps,
        map_images=np.zeros(3, np.int32),
        map_sources=np.array([1, 2, 3], np.int32),
        map_classes=np.zeros(3, np.int32),
        frames=(longest_side_frame((60, 80), 64),),
    )


def test_kernels_read_device_arrays_where_they_are(cpu_kernels):
    values = np.random.default_rng(0).random((1, 3, 5, 6), dtype=np.float32)
    batch = _batch(as_array("maps", OnGpu(values)))
    config = ClusteringConfig()
    plan = plan_prompts(batch, config)
    assert plan.inputs["maps"] is batch.maps
    backend = KernelBackend(cpu_kernels.with_threads(32))
    ours = backend.prompt_batch(batch, config)
    expected = ReferenceBackend().prompt_batch(_batch(values), config)
    assert len(expected.sam_points) > 0
    np.testing.assert_array_equal(ours.sam_points, expected.sam_points)

    logits = np.random.default_rng(1).normal(size=(2, 8, 8)).astype(np.float32)
    masks = np.zeros(2, np.int32), [longest_side_frame((60, 80), 32)]
    on_gpu = backend.summarize_masks(as_array("logits", OnGpu(logits)), *masks)
    on_host = ReferenceBackend().summarize_masks(logits, *masks)
    np.testing.assert_allclose(on_gpu.boxes, on_host.boxes, rtol=1e-6)


def test_maps_of_one_image_on_a_gpu_are_joined_there(cpu_kernels, monkeypatch):
    backend = KernelBackend(cpu_kernels.with_threads(32))
    monkeypatch.setattr("weaksam_rt.prompt_clustering.prompt_backend", lambda *_: backend)
    rng = np.random.default_rng(2)
    maps = {
        "coarse_maps": rng.random((2, 5, 6), dtype=np.float32),
        "fine_maps": rng.random((2, 5, 6), dtype=np.float32),
        "cross_maps": rng.random((3, 2, 5, 6), dtype=np.float32),
    }
    rest = {
        "class_ids": np.array([3, 4], np.int32),
        "image_size": (90, 70),
        "config": ClusteringConfig(),
    }
    expected = prompts_from_maps(**maps, **rest)
    on_gpu = maps | {"fine_maps": OnGpu(maps["fine_maps"]), "cross_maps": OnGpu(maps["cross_maps"])}
    ours = prompts_from_maps(**on_gpu, **rest)
    assert len(expected) > 0
    np.testing.assert_array_equal(ours.points, expected.points)
    with pytest.raises(ValueError, match="coarse_maps must be float32 with 3 axes, got float64"):
        prompts_from_maps(**(on_gpu | {"coarse_maps": np.zeros((2, 5, 6))}), **rest)


def test_work_is_done_on_the_gpu_that_has_the_arrays(monkeypatch):
    asked = []

    def refuse(name, device):
        asked.append(device)
        raise BackendUnavailableError(f"no GPU {device}")

    monkeypatch.setattr("weaksam_rt.prompt_clustering.prompt_backend", refuse)
    tensor = PretendsCuda(torch.zeros(1, 4, 4), device=1)
    masks = np.zeros(1, np.int32), (longest_side_frame((30, 40), 64),)
    boxes = np.zeros((1, 4), np.float32), np.zeros(1, np.float32), np.zeros(1, np.int32)
    maps = PretendsCuda(torch.zeros(1, 3, 4, 5), device=3)
    joined = {
        "coarse_maps": np.zeros((1, 4, 4), np.float32), "fine_maps": tensor,
        "cross_maps": np.zeros((2, 1, 4, 4), np.float32),
        "class_ids": np.zeros(1, np.int32), "image_size": (9, 9),
    }  # fmt: skip
    config = ClusteringConfig(backend="cuda", device=2)
    for work in (
        lambda: summarize_masks(tensor, *masks, backend="cuda"),
        lambda: encode_masks(tensor, *masks, backend="cuda", device=2),
        lambda: summarize_masks(np.zeros((1, 4, 4), np.float32), *masks, backend="cuda", device=2),
        lambda: class_nms(*boxes, iou_thresh=0.5, backend="cuda", device=2),
        lambda: class_nms(
            PretendsCuda(torch.zeros(1, 4), device=1), *boxes[1:], iou_thresh=0.5, backend="cuda"
        ),
        lambda: prompt_batch(_batch(np.zeros((1, 3, 4, 5), np.float32)), config),
        lambda: prompt_batch(_batch(as_array("maps", maps)), config),
        lambda: prompts_from_maps(**joined, config=config),
    ):
        with pytest.raises(BackendUnavailableError):
            work()
    assert asked == [1, 1, 2, 2, 1, 2, 3, 1]


def test_the_reference_refuses_arrays_on_a_gpu():
    on_gpu = OnGpu(np.zeros((1, 3, 4, 5), np.float32))
    with pytest.raises(ValueError, match=r"maps must lie in host memory here, got .* on cuda"):
        prompt_batch(_batch(as_array("maps", on_gpu)), ClusteringConfig())
    logits = PretendsCuda(torch.zeros(1, 4, 4), device=3)
    frames = (longest_side_frame((30, 40), 64),)
    with pytest.raises(ValueError, match=r"logits must lie in host memory here, .* on cuda:3"):
        summarize_masks(logits, np.zeros(1, np.int32), frames, backend="reference")


def test_dtypes_of_device_arrays_are_checked_by_name():
    with pytest.raises(ValueError, match="maps must be float32 with 4 axes, got float64 with 4"):
        _batch(as_array("maps", OnGpu(np.zeros((1, 3, 4, 5)))))
    boxes = OnGpu(np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="labels must be int32 with 1 axes, got int64 with 1"):
        class_nms(
            boxes, np.zeros(2, np.float32), np.zeros(2, np.int64), iou_thresh=0.5, backend="cuda"
        )


def test_a_description_can_only_be_reshaped_to_as_many_values():
    array = DeviceArray(
        address=0, shape=(2, 6), dtype=np.dtype("f4"), device=0, stream=None, owner=None
    )
    assert array.reshape(3, 4).shape == (3, 4)
    with pytest.raises(ValueError, match=r"\(2, 6\) has no shape \(5, 2\)"):
        array.reshape(5, 2)
