"""Every kernel, run on the CPU from the source that a GPU compiles, beside its definition."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from tests.unit.weaksam_rt.prompt_kernels.cases import random_batch, random_config
from weaksam_rt import pipeline, prompt_clustering
from weaksam_rt.class_activation_map import PeakConfig
from weaksam_rt.errors import InferenceError
from weaksam_rt.masks import decode_rle, image_logits
from weaksam_rt.pipeline import masks_of_image
from weaksam_rt.preprocessing import ModelFrame, longest_side_frame, resize_maps
from weaksam_rt.prompt_clustering import ClusteringConfig, MapBatch, _reference
from weaksam_rt.prompt_clustering._backends import KernelBackend, ReferenceBackend
from weaksam_rt.prompt_clustering._plan import (
    PromptCapacity,
    full_capacity,
    plan_mask_encoding,
    plan_prompts,
    read_mask_encoding,
)
from weaksam_rt.prompts import class_prompts, sam_prompts
from weaksam_rt.types import PointPrompts, PromptSource

seeds = st.integers(0, 2**32 - 1)
thread_counts = st.sampled_from([1, 3, 32, 64])
NUM_BATCHES = 300
"""With 15 maps on average."""
NUM_SETS = 600
"""Of boxes, or of 3 masks on average."""
BOX_TOLERANCE_PX = 1e-3
"""Boxes of masks: float32 coordinates of images up to a few thousand pixels."""


def definition(batch, config):
    """Every map upsampled in full, every peak found on all its pixels."""
    peaks = _reference.batch_peaks(
        batch, cam_peaks=config.cam_peaks, cross_peaks=config.cross_peaks
    )
    images = [
        _reference.image_prompts(batch, image, peaks, config.points_per_cluster)
        for image in range(batch.num_images)
    ]
    return _reference.pack_batch(images, batch.frames)


def assert_same_prompts(ours, expected):
    for name in ("points", "scores", "class_ids", "sources"):
        np.testing.assert_array_equal(
            getattr(ours.prompts, name), getattr(expected.prompts, name), err_msg=name
        )
    for name in ("point_offsets", "sam_points", "sam_labels", "sam_offsets", "image_index"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name), err_msg=name)


@settings(max_examples=NUM_BATCHES, deadline=None)
@given(seeds, thread_counts)
def test_prompts_of_random_batches_equal_the_definition(cpu_kernels, seed, threads):
    rng = np.random.default_rng(seed)
    batch, config = random_batch(rng), random_config(rng)
    ours = KernelBackend(cpu_kernels.with_threads(threads)).prompt_batch(batch, config)
    assert_same_prompts(ours, definition(batch, config))


@settings(deadline=None)
@given(seeds)
def test_the_default_capacity_holds_whatever_the_maps_give(seed):
    rng = np.random.default_rng(seed)
    batch, config = random_batch(rng, max_side=12), random_config(rng)
    # Every pixel a peak, or every map a plateau: the most that can come.
    config = replace(config, cam_peaks=PeakConfig(kernel_size=1, value_thresh=1e-30))
    room, needed = full_capacity(batch, config), ReferenceBackend().prompt_batch(batch, config)
    assert len(needed.prompts) <= room.points
    assert len(needed.image_index) <= room.prompts
    assert len(needed.sam_points) <= room.sam_points


def test_a_served_image_gives_the_prompts_of_the_definition(cpu_kernels):
    rng = np.random.default_rng(5)
    batch = MapBatch(
        maps=rng.random((2, 28, 14, 14), dtype=np.float32),
        map_images=np.zeros(28, np.int32),
        map_sources=np.repeat([1, 2, 3], [2, 2, 24]).astype(np.int32),
        map_classes=np.tile([4, 9], 14).astype(np.int32),
        frames=(longest_side_frame((375, 500), 1024),),
        mirrored_passes=(1,),
    )
    expected = definition(batch, ClusteringConfig())
    assert len(expected.prompts) > 10
    ours = KernelBackend(cpu_kernels.with_threads(64)).prompt_batch(batch, ClusteringConfig())
    assert_same_prompts(ours, expected)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_every_pixel_of_an_upsampled_map_has_the_bits_of_the_definition(cpu_kernels, seed):
    rng = np.random.default_rng(seed)
    size = tuple(int(s) for s in rng.integers(1, 24, 2))
    batch = _one_map(rng.random((1, 1, 5, 6), dtype=np.float32), size)
    # A window of one pixel and no threshold to speak of: every pixel is a peak.
    everything = PeakConfig(kernel_size=1, value_thresh=1e-30, max_candidates=size[0] * size[1])
    config = ClusteringConfig(cam_peaks=everything)
    ours = KernelBackend(cpu_kernels.with_threads(32)).prompt_batch(batch, config)
    expected = definition(batch, config)
    # The pixel of the minimum is 0; that of the maximum may be another one only of 1x1.
    assert len(expected.prompts) >= size[0] * size[1] / 2 or 1 in size
    assert_same_prompts(ours, expected)


@settings(deadline=None)
@given(seeds)
def test_packed_prompts_are_the_decoders_prompts_of_each_image(seed):
    rng = np.random.default_rng(seed)
    images = [_random_point_prompts(rng) for _ in range(int(rng.integers(1, 4)))]
    frames = [longest_side_frame((int(rng.integers(9, 60)), 40), 64) for _ in images]
    packed = _reference.pack_batch(images, frames)
    expected = [
        (image, prompt)
        for image, prompts in enumerate(images)
        for prompt in [
            *sam_prompts(prompts),
            *class_prompts(_of_source(prompts, PromptSource.COARSE)),
            *class_prompts(_of_source(prompts, PromptSource.FINE)),
        ]
    ]
    assert packed.image_index.tolist() == [image for image, _ in expected]
    for (image, prompt), start, stop in zip(
        expected, packed.sam_offsets[:-1], packed.sam_offsets[1:], strict=True
    ):
        np.testing.assert_array_equal(
            packed.sam_points[start:stop], frames[image].to_model(prompt.points)
        )
        np.testing.assert_array_equal(packed.sam_labels[start:stop], prompt.labels)


def test_more_visits_than_remembered_rulers_change_nothing(cpu_kernels):
    # A long slope beside a plateau: pixels of the plateau see the slope one after another.
    values = np.full((40, 60), 0.95, np.float32)
    values[:, :2] = np.linspace(1, 0.96, 80, dtype=np.float32).reshape(40, 2)
    values[-1, -1] = 0
    rule = PeakConfig(kernel_size=33, value_thresh=0.5)
    config = ClusteringConfig(cam_peaks=rule)
    batch = _one_map(values[None, None], (40, 60))
    expected = definition(batch, config)
    assert len(expected.prompts) > 1
    assert_same_prompts(KernelBackend(cpu_kernels).prompt_batch(batch, config), expected)


def test_64_maps_and_an_image_without_any(cpu_kernels):
    batch = _two_images(np.random.default_rng(8))
    ours = KernelBackend(cpu_kernels.with_threads(64)).prompt_batch(batch, ClusteringConfig())
    expected = definition(batch, ClusteringConfig())
    assert expected.point_offsets[1] == expected.point_offsets[2]
    assert_same_prompts(ours, expected)


def test_a_buffer_that_is_too_small_is_reported_not_cut(cpu_kernels):
    batch = _two_images(np.random.default_rng(9))
    needed = definition(batch, ClusteringConfig())
    exact = PromptCapacity(
        points=len(needed.prompts),
        prompts=len(needed.image_index),
        sam_points=len(needed.sam_points),
    )
    fits = KernelBackend(cpu_kernels.with_threads(32), capacity=exact)
    assert_same_prompts(fits.prompt_batch(batch, ClusteringConfig()), needed)
    for name in ("points", "prompts", "sam_points"):
        room = {n: getattr(exact, n) for n in ("points", "prompts", "sam_points")}
        short = PromptCapacity(**{**room, name: room[name] - 1})
        backend = KernelBackend(cpu_kernels.with_threads(32), capacity=short)
        with pytest.raises(InferenceError, match=rf"{room[name]} {name}.* holds {room[name] - 1}"):
            backend.prompt_batch(batch, ClusteringConfig())
        plan = plan_prompts(batch, ClusteringConfig(), capacity=short)
        outputs = cpu_kernels.with_threads(32).run(plan)
        assert outputs.pop("totals")[0].tolist() == tuple(room.values())
        # Of no image anything was written: all is as it was before.
        assert all((np.ascontiguousarray(o).view(np.uint8) == 0xA5).all() for o in outputs.values())


def _random_masks(rng, *, max_size):
    """Logits of up to 5 masks of two images, some broken."""
    side = int(rng.integers(1, 24))
    num_masks = int(rng.integers(1, 6))
    sizes = [tuple(int(s) for s in rng.integers(1, max_size, 2)) for _ in range(2)]
    frames = [longest_side_frame(size, 4 * side) for size in sizes]
    logits = rng.normal(rng.normal(), 2, (num_masks, side, side)).astype(np.float32)
    for value in (np.nan, np.inf, -np.inf, 3e38):
        logits[rng.random(logits.shape) < rng.choice([0, 0.02])] = value
    if rng.random() < 0.2:
        logits[0] = rng.choice([-1, 0, 1])
    return logits, rng.integers(0, 2, num_masks).astype(np.int32), frames


@settings(max_examples=NUM_SETS, deadline=None)
@given(seeds, thread_counts)
def test_mask_summaries_equal_the_definition(cpu_kernels, seed, threads):
    logits, images, frames = _random_masks(np.random.default_rng(seed), max_size=900)
    ours = KernelBackend(cpu_kernels.with_threads(threads)).summarize_masks(logits, images, frames)
    expected = ReferenceBackend().summarize_masks(logits, images, frames)
    np.testing.assert_allclose(ours.boxes, expected.boxes, rtol=1e-6, atol=BOX_TOLERANCE_PX)
    np.testing.assert_array_equal(ours.stability, expected.stability)
    np.testing.assert_allclose(ours.areas, expected.areas, rtol=1e-6)


@settings(max_examples=NUM_SETS, deadline=None)
@given(seeds, thread_counts)
def test_encoded_masks_equal_the_definition(cpu_kernels, seed, threads):
    masks = _random_masks(np.random.default_rng(seed), max_size=60)
    ours = KernelBackend(cpu_kernels.with_threads(threads)).encode_masks(*masks)
    expected = _reference.encode_masks(*masks)
    for name in ("bits", "word_offsets", "runs", "run_offsets"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name), err_msg=name)


@settings(deadline=None)
@given(seeds)
def test_encoded_masks_are_those_of_the_image_logits_in_cocos_form(seed):
    rng = np.random.default_rng(seed)
    frame = longest_side_frame((int(rng.integers(8, 90)), int(rng.integers(8, 90))), 64)
    logits = resize_maps(rng.normal(size=(3, 5, 5)).astype(np.float32), (16, 16))
    encoded = ReferenceBackend().encode_masks(logits, np.zeros(3, np.int32), (frame,))
    at_image = image_logits(logits, frame)
    for i in range(3):
        counts = encoded.runs[encoded.run_offsets[i] : encoded.run_offsets[i + 1]]
        rle = coco_mask.frPyObjects(
            {"counts": counts.tolist(), "size": list(frame.image_size)}, *frame.image_size
        )
        from_runs = coco_mask.decode(rle).astype(bool)
        words = encoded.bits[encoded.word_offsets[i] : encoded.word_offsets[i + 1]]
        bits = np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little")
        from_bits = bits[: from_runs.size].reshape(from_runs.shape[::-1]).T.astype(bool)
        np.testing.assert_array_equal(from_runs, from_bits)
        # The matrix products of ``image_logits`` round in another order.
        is_sure = np.abs(at_image[i]) > 1e-5
        np.testing.assert_array_equal(from_runs[is_sure], at_image[i][is_sure] > 0)


@pytest.mark.parametrize("at_a_time", [1, 3 * 60 * 90, 2**26])
def test_the_pipelines_masks_are_those_of_the_kernels(cpu_kernels, monkeypatch, at_a_time):
    rng = np.random.default_rng(0)
    frame = longest_side_frame((60, 90), 64)
    decoded = resize_maps(rng.normal(size=(7, 2, 5, 5)).astype(np.float32), (16, 16))
    logits = decoded[:, 1:].reshape(-1, 16, 16)
    assert not logits.flags.c_contiguous  # as one of SAM's masks of each prompt lies in memory
    expected = masks_of_image(logits, frame, backend="reference")
    monkeypatch.setattr(pipeline, "_MASK_PIXELS_AT_A_TIME", at_a_time)
    assert masks_of_image(logits, frame, backend="reference") == expected
    kernels = KernelBackend(cpu_kernels.with_threads(32))
    monkeypatch.setattr(prompt_clustering, "prompt_backend", lambda name, device: kernels)
    assert masks_of_image(logits, frame, backend="cuda") == expected
    assert 0 < decode_rle(expected.rle_counts, (60, 90)).mean() < 1


def test_masks_with_more_runs_than_guessed_are_encoded_all_the_same(cpu_kernels):
    # Every other pixel is inside: a run a pixel.
    logits = np.where(np.indices((20, 20)).sum(axis=0) % 2, 1, -1).astype(np.float32)[None]
    frame = ModelFrame(image_size=(20, 20), valid_size=(20, 20), model_size=20)
    masks = logits, np.zeros(1, np.int32), (frame,)
    backend = KernelBackend(cpu_kernels.with_threads(3))
    assert len(backend.encode_masks(*masks).runs) > 300
    plan = plan_mask_encoding(*masks, run_capacity=300)
    outputs = cpu_kernels.with_threads(32).run(plan)
    assert (outputs["runs"].view(np.uint8) == 0xA5).all()
    with pytest.raises(InferenceError, match=r"masks have 3\d\d runs, the buffer holds 300"):
        read_mask_encoding(plan, outputs)


@settings(max_examples=NUM_SETS, deadline=None)
@given(seeds, thread_counts, st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
def test_nms_keeps_the_boxes_of_the_definition(cpu_kernels, seed, threads, iou_thresh):
    rng = np.random.default_rng(seed)
    num_boxes = int(rng.choice([1, 2, 40, 63, 64, 65, 200]))
    corners = rng.integers(0, 30, (num_boxes, 2, 2)).astype(np.float32)
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    boxes[rng.random(boxes.shape) < 0.01] = rng.choice([np.nan, np.inf, -np.inf])
    scores = rng.integers(0, 20, num_boxes).astype(np.float32) / 20
    scores[rng.random(num_boxes) < 0.03] = np.nan
    labels = rng.integers(0, 3, num_boxes).astype(np.int32)
    ours = KernelBackend(cpu_kernels.with_threads(threads)).class_nms(
        boxes, scores, labels, iou_thresh
    )
    expected = ReferenceBackend().class_nms(boxes, scores, labels, iou_thresh)
    np.testing.assert_array_equal(ours, expected)


def _random_point_prompts(rng):
    count = int(rng.integers(0, 12))
    return PointPrompts(
        points=rng.integers(0, 40, (count, 2)).astype(np.float32),
        scores=rng.random(count, dtype=np.float32),
        class_ids=rng.integers(0, 3, count).astype(np.int32),
        sources=np.sort(rng.integers(1, 4, count)).astype(np.int32),
    )


def _of_source(prompts, source):
    members = prompts.sources == source
    return PointPrompts(
        **{n: getattr(prompts, n)[members] for n in ("points", "scores", "class_ids", "sources")}
    )


def _one_map(maps, size):
    return MapBatch(
        maps=maps,
        map_images=np.zeros(1, np.int32),
        map_sources=np.array([PromptSource.FINE], np.int32),
        map_classes=np.array([7], np.int32),
        frames=(longest_side_frame(size, 256),),
    )


def _two_images(rng):
    """32 maps each; an image without maps between the two."""
    sources = np.repeat([PromptSource.COARSE, PromptSource.FINE, PromptSource.CROSS], [3, 3, 26])
    return MapBatch(
        maps=rng.random((1, 64, 7, 9), dtype=np.float32),
        map_images=np.repeat([0, 2], 32).astype(np.int32),
        map_sources=np.tile(sources, 2).astype(np.int32),
        map_classes=np.tile(rng.permutation(32), 2).astype(np.int32),
        frames=tuple(longest_side_frame(s, 256) for s in ((60, 90), (10, 10), (81, 33))),
    )
