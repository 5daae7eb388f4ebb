"""``CudaExecutor`` with every kernel, beside NumPy: on a stand-in for NVIDIA's driver that runs
the kernels on the CPU, and, where there is one, on a GPU.
"""

import ctypes
import logging
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.unit.weaksam_rt.prompt_kernels.cases import random_batch, random_config
from weaksam_rt.errors import BackendUnavailableError, InferenceError
from weaksam_rt.pipeline import masks_of_image
from weaksam_rt.preprocessing import longest_side_frame
from weaksam_rt.prompt_clustering import (
    ClusteringConfig,
    MapBatch,
    as_array,
    class_nms,
    encode_masks,
    prompt_backend,
    prompt_batch,
    prompts_from_maps,
    summarize_masks,
)
from weaksam_rt.prompt_clustering._cuda import CudaExecutor
from weaksam_rt.prompt_clustering._plan import (
    full_capacity,
    plan_mask_encoding,
    plan_nms,
    plan_prompts,
    read_nms,
    read_prompts,
)

_CUDA = ClusteringConfig(backend="cuda")
_REFERENCE = ClusteringConfig()


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def num_cases(request):
    """How many random cases are worth their time, and where they run."""
    if request.param == "stand-in":
        request.getfixturevalue("stand_in")
        return 4
    return int(os.environ.get("PROMPT_KERNEL_CASES", "200"))


def _assert_same(ours, expected, names):
    for name in names:
        np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name), err_msg=name)


def test_prompts_of_random_batches_are_those_of_numpy(num_cases):
    for seed in range(num_cases):
        rng = np.random.default_rng(seed)
        batch, rules = random_batch(rng, max_maps=12), random_config(rng)
        config = {n: getattr(rules, n) for n in ("cam_peaks", "cross_peaks", "points_per_cluster")}
        ours = prompt_batch(batch, ClusteringConfig(**config, backend="cuda"))
        expected = prompt_batch(batch, ClusteringConfig(**config))
        _assert_same(
            ours, expected,
            ("point_offsets", "sam_points", "sam_labels", "sam_offsets", "image_index"),
        )  # fmt: skip
        _assert_same(ours.prompts, expected.prompts, ("points", "scores", "class_ids", "sources"))


def _image(rng, num_classes=2, num_layers=12):
    return {
        "coarse_maps": rng.random((num_classes, 14, 14), dtype=np.float32),
        "fine_maps": rng.random((num_classes, 14, 14), dtype=np.float32),
        "cross_maps": rng.random((num_layers, num_classes, 14, 14), dtype=np.float32),
        "class_ids": np.arange(num_classes, dtype=np.int32),
        "image_size": (375, 500),
    }


def test_a_served_image_gives_the_prompts_of_numpy(num_cases):
    image = _image(np.random.default_rng(0))
    expected = prompts_from_maps(**image, config=_REFERENCE)
    ours = prompts_from_maps(**image, config=_CUDA)
    assert len(expected) > 10
    _assert_same(ours, expected, ("points", "scores", "class_ids", "sources"))


def test_masks_are_those_of_numpy(num_cases):
    for seed in range(num_cases):
        rng = np.random.default_rng(seed)
        side = int(rng.integers(2, 40))
        frames = [longest_side_frame((int(h), 61), 4 * side) for h in rng.integers(9, 90, 2)]
        logits = rng.normal(size=(3, side, side)).astype(np.float32)
        masks = logits, np.array([1, 0, 1], np.int32), frames
        _assert_same(
            encode_masks(*masks, backend="cuda"), encode_masks(*masks, backend="reference"),
            ("bits", "word_offsets", "runs", "run_offsets"),
        )  # fmt: skip
        ours, expected = (summarize_masks(*masks, backend=b) for b in ("cuda", "reference"))
        np.testing.assert_array_equal(ours.stability, expected.stability)
        np.testing.assert_allclose(ours.boxes, expected.boxes, rtol=1e-6, atol=1e-3)
        np.testing.assert_allclose(ours.areas, expected.areas, rtol=1e-6)


def test_the_pipelines_masks_are_those_of_numpy(num_cases):
    frame = longest_side_frame((375, 500), 1024)
    logits = np.random.default_rng(0).normal(size=(6, 3, 64, 64)).astype(np.float32)[:, 1]
    assert masks_of_image(logits, frame, backend="cuda") == masks_of_image(
        logits, frame, backend="reference"
    )


def test_suppression_is_that_of_numpy(num_cases):
    for seed in range(num_cases):
        rng = np.random.default_rng(seed)
        corners = np.sort(rng.integers(0, 60, (300, 2, 2)), axis=1).astype(np.float32)
        scored = corners.reshape(-1, 4), rng.random(300, dtype=np.float32), np.zeros(300, np.int32)
        kept = [class_nms(*scored, iou_thresh=0.4, backend=b) for b in ("cuda", "reference")]
        np.testing.assert_array_equal(*kept)


def test_a_captured_graph_gives_the_same_prompts_again_and_again(num_cases):
    rng = np.random.default_rng(3)
    batch = random_batch(rng, max_maps=12)
    plan = plan_prompts(batch, _REFERENCE)
    executor = CudaExecutor()
    with executor.loaded(plan) as loaded:
        for _ in range(3):
            loaded.launch_graph()
        ours = read_prompts(loaded.outputs(), full_capacity(batch, _REFERENCE))
    expected = prompt_batch(batch, _REFERENCE)
    assert len(expected.prompts) > 0
    _assert_same(ours, expected, ("sam_points", "sam_labels", "sam_offsets", "image_index"))


def _count(library, name):
    return ctypes.c_int.in_dll(library, name)


def test_shapes_seen_again_are_one_graph_and_outputs_one_copy(stand_in):
    executor = CudaExecutor()
    batches = [_one_map(np.random.default_rng(s).random((1, 1, 9, 7), "f4")) for s in range(3)]
    plans = [plan_prompts(batch, _REFERENCE) for batch in batches]
    assert len({id(plan.program) for plan in plans}) == 1
    launched, replayed = _count(stand_in, "num_launches"), _count(stand_in, "num_graph_launches")
    read = _count(stand_in, "num_copies_out")
    graphs = _count(stand_in, "num_graphs")
    launched.value = replayed.value = read.value = graphs.value = 0
    room = full_capacity(batches[0], _REFERENCE)
    outputs = [read_prompts(executor.run(plan), room) for plan in plans]
    assert (launched.value, replayed.value, read.value) == (6, 2, 3)
    for ours, batch in zip(outputs, batches, strict=True):
        _assert_same(ours, prompt_batch(batch, _REFERENCE), ("sam_points", "sam_offsets"))
    # A larger batch moves the memory: what was captured goes, and is made anew.
    large = _one_map(np.random.default_rng(3).random((1, 1, 60, 60), "f4"))
    for plan, batch in [(plan_prompts(large, _REFERENCE), large), (plans[1], batches[1])] * 3:
        ours = read_prompts(executor.run(plan), full_capacity(batch, _REFERENCE))
        _assert_same(ours, prompt_batch(batch, _REFERENCE), ("sam_points", "sam_offsets"))
    assert graphs.value == 2
    # Those that nobody asks for any more are given back.
    for side in range(1, 41):
        maps = _one_map(np.zeros((1, 1, side, 1), np.float32))
        for _ in range(2):
            executor.run(plan_prompts(maps, _REFERENCE))
    assert graphs.value == 32


def test_only_what_is_asked_for_is_read_back(stand_in):
    num_bytes = _count(stand_in, "num_bytes_out")
    num_bytes.value = 0
    image = _image(np.random.default_rng(0))
    prompts_from_maps(**image, config=_CUDA)
    # 2 classes, 25 peaks a coarse and fine map; 24 cross maps, a fifth of 25 peaks each.
    assert num_bytes.value < (4 * 25 + 24 * 5) * 20 + 5 * 256
    frame = longest_side_frame((100, 200), 64)
    masks = np.ones((1, 16, 16), np.float32), np.zeros(1, np.int32), (frame,)
    encoded = []
    for with_bits in (True, False):
        num_bytes.value = 0
        encoded.append(encode_masks(*masks, backend="cuda", with_bits=with_bits))
        assert (num_bytes.value > 100 * 200 / 8 + 4 * 801) == with_bits
    assert encoded[1].bits is None
    _assert_same(*encoded, ("word_offsets", "runs", "run_offsets"))


def test_one_gpu_is_taken_once_however_it_is_named(stand_in, caplog):
    caplog.set_level(logging.INFO)
    assert prompt_backend("cuda") is prompt_backend("cuda", 0)
    assert prompt_backend("auto", 0) is prompt_backend("auto", device=0)
    said = [m for m in caplog.messages if m.startswith("prompt clustering")]
    assert said == ["prompt clustering: backend cuda on GPU 0"]


def test_memory_of_suppression_is_bounded(stand_in):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 60, (300, 2, 2)), axis=1).astype(np.float32)
    boxes, scores = corners.reshape(-1, 4), rng.random(300, dtype=np.float32)
    labels = np.zeros(300, np.int32)
    expected = class_nms(boxes, scores, labels, iou_thresh=0.4, backend="reference")
    for conflict_bytes in (1, 5 * 8 * 7, 5 * 8 * 300, 2**25):
        plan = plan_nms(boxes, scores, labels, 0.4, conflict_bytes=conflict_bytes)
        np.testing.assert_array_equal(read_nms(CudaExecutor().run(plan)), expected)
    most = 65536
    many = np.zeros((most, 4), np.float32), np.zeros(most, np.float32), np.zeros(most, np.int32)
    matrix = plan_nms(*many, 0.5).program.buffers["conflicts"]
    assert np.prod(matrix.shape) * 8 <= 32 * 2**20


def _one_map(maps):
    return MapBatch(
        maps=maps,
        map_images=np.zeros(1, np.int32),
        map_sources=np.array([3], np.int32),
        map_classes=np.zeros(1, np.int32),
        frames=(longest_side_frame((40, 50), 64),),
    )


class _Lent:
    """Memory that someone else's stream fills."""

    def __init__(self, array, stream=None):
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape, "typestr": array.dtype.str, "version": 3, "stream": stream,
            "data": (array.ctypes.data, False),
        }  # fmt: skip


def test_lent_maps_are_waited_for_and_read_where_they_are(stand_in):
    image = _image(np.random.default_rng(1), num_layers=2)
    expected = prompts_from_maps(**image, config=_REFERENCE)
    waits = ctypes.c_int.in_dll(stand_in, "num_waits")
    waits.value = 0
    lent = {
        "fine_maps": _Lent(image["fine_maps"]),
        "cross_maps": _Lent(image["cross_maps"], stream=2),
    }
    ours = prompts_from_maps(**(image | lent), config=_CUDA)
    np.testing.assert_array_equal(ours.points, expected.points)
    assert waits.value == 1
    maps = image["cross_maps"][:1, :1]
    batch = _one_map(as_array("maps", _Lent(maps)))
    np.testing.assert_array_equal(
        prompt_batch(batch, _CUDA).sam_points, prompt_batch(_one_map(maps), _REFERENCE).sam_points
    )


def test_maps_on_another_gpu_are_refused(stand_in):
    lent = as_array("maps", _Lent(np.zeros((1, 1, 4, 4), np.float32)))
    elsewhere = type(lent)(
        address=lent.address, shape=lent.shape, dtype=lent.dtype, device=1, stream=None, owner=lent
    )
    with pytest.raises(ValueError, match="maps lies on cuda:1, the kernels run on cuda:0: copy it"):
        CudaExecutor().run(plan_prompts(_one_map(elsewhere), _CUDA))


@pytest.mark.gpu
def test_tensors_of_pytorch_stay_on_the_gpu():
    image = _image(np.random.default_rng(2))
    on_gpu = {
        name: torch.from_numpy(image[name]).cuda()
        for name in ("coarse_maps", "fine_maps", "cross_maps")
    }
    ours = prompts_from_maps(**(image | on_gpu), config=_CUDA)
    expected = prompts_from_maps(**image, config=_REFERENCE)
    np.testing.assert_array_equal(ours.points, expected.points)
    # A producer that is not done yet is waited for.
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = on_gpu["cross_maps"] * 1
        ours = prompts_from_maps(**(image | on_gpu | {"cross_maps": late}), config=_CUDA)
    np.testing.assert_array_equal(ours.points, expected.points)


def test_the_next_code_is_tried_where_the_driver_refuses_one(stand_in, caplog):
    caplog.set_level(logging.INFO)
    ctypes.c_int.in_dll(stand_in, "refused_images").value = 1
    CudaExecutor()
    assert "prompt kernels for sm_90: prebuilt compute_80" in caplog.messages
    ctypes.c_int.in_dll(stand_in, "refused_images").value = 100
    try:
        with pytest.raises(BackendUnavailableError, match=r"\(sm_90\): prebuilt sm_90: status 200"):
            CudaExecutor()
    finally:
        ctypes.c_int.in_dll(stand_in, "refused_images").value = 0


def test_a_gpu_that_is_not_there_is_an_error(stand_in):
    with pytest.raises(BackendUnavailableError, match="no GPU 1: status 101"):
        prompt_batch(_one_map(np.zeros((1, 1, 4, 4), np.float32)), replace(_CUDA, device=1))


def test_a_batch_that_the_memory_does_not_hold_is_an_error(stand_in):
    logits = np.zeros((300, 8, 8), np.float32)
    masks = logits, np.zeros(300, np.int32), [longest_side_frame((2600, 2600), 32)]
    with pytest.raises(InferenceError, match=r"needs \d+ bytes of GPU memory"):
        CudaExecutor().run(plan_mask_encoding(*masks, run_capacity=2**28))
