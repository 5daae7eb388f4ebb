"""What is refused before anything is launched, and how a backend is chosen."""

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from weaksam_rt.class_activation_map import PeakConfig
from weaksam_rt.errors import BackendUnavailableError
from weaksam_rt.preprocessing import longest_side_frame
from weaksam_rt.prompt_clustering import (
    ClusteringConfig,
    MapBatch,
    class_nms,
    prompt_batch,
    prompts_from_maps,
    summarize_masks,
)
from weaksam_rt.prompt_clustering._backends import (
    KernelBackend,
    ReferenceBackend,
    prompt_backend,
)

_FRAME = longest_side_frame((30, 40), 64)


def _batch(**changes):
    arguments = {
        "maps": np.zeros((1, 3, 4, 5), np.float32),
        "map_images": np.zeros(3, np.int32),
        "map_sources": np.array([1, 2, 3], np.int32),
        "map_classes": np.zeros(3, np.int32),
        "frames": (_FRAME,),
    }
    return MapBatch(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maps": np.zeros((3, 4, 5), np.float32)}, "maps must be .* got float32 with 3"),
        ({"maps": np.zeros((1, 3, 5, 4), np.float32).swapaxes(2, 3)}, "maps must be contiguous"),
        ({"maps": np.zeros((1, 3, 0, 5), np.float32)}, "at least one pixel, got 0x5"),
        ({"maps": np.zeros((33, 3, 4, 5), np.float32)}, "1 to 32 passes, got 33"),
        ({"map_images": np.zeros(2, np.int32)}, "map_images must have one entry a map: 3, got 2"),
        (
            {"map_images": np.array([0, 0, 1], np.int32)},
            r"map_images must be in \[0, 1\), got 0 to",
        ),
        ({"map_sources": np.array([1, 3, 2], np.int32)}, "coarse, fine, cross: map 2 is not"),
        ({"map_sources": np.array([0, 1, 2], np.int32)}, "map_sources must be 1, 2 or 3"),
        ({"map_sources": np.array([1, 1, 3], np.int32)}, "map_classes must differ"),
        ({"frames": ()}, "frames must have at least one image"),
        ({"frames": (replace(_FRAME, image_size=(40000, 3)),)}, r"frames\[0\].*\(40000, 3\)"),
        ({"mirrored_passes": (1,)}, r"mirrored_passes must be in \[0, 1\), got \(1,\)"),
    ],
)
def test_batches_that_do_not_fit_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        _batch(**changes)


class NeverRuns:
    """An executor that must not be asked."""

    def run(self, plan):
        raise AssertionError("launched")


def _too_large():
    return _batch(maps=np.random.default_rng(0).random((1, 3, 65, 4), dtype=np.float32))


def test_maps_too_large_for_the_kernels_are_refused_before_a_launch():
    with pytest.raises(ValueError, match="at most 64 a side for the kernels, got 65x4: use the"):
        KernelBackend(NeverRuns()).prompt_batch(_too_large(), ClusteringConfig())
    rule = PeakConfig(kernel_size=1, max_candidates=2**29)
    large = {"frames": (longest_side_frame((32000, 32000), 64),)}
    with pytest.raises(ValueError, match="points of SAM's prompts, the kernels count 1073741823"):
        KernelBackend(NeverRuns()).prompt_batch(_batch(**large), ClusteringConfig(cam_peaks=rule))
    cross = large | {
        "maps": np.zeros((1, 5, 4, 5), np.float32),
        "map_images": np.zeros(5, np.int32),
        "map_sources": np.full(5, 3, np.int32),
        "map_classes": np.zeros(5, np.int32),
    }
    config = ClusteringConfig(cross_peaks=rule, points_per_cluster=100)
    with pytest.raises(ValueError, match=r"2684354560 entries where 2147483647 can be counted"):
        KernelBackend(NeverRuns()).prompt_batch(_batch(**cross), config)


def test_auto_takes_the_reference_for_what_the_kernels_do_not_take_and_says_so_once(caplog):
    caplog.set_level(logging.INFO)
    backend = KernelBackend(NeverRuns(), fallback=ReferenceBackend())
    expected = ReferenceBackend().prompt_batch(_too_large(), ClusteringConfig())
    ours = backend.prompt_batch(_too_large(), ClusteringConfig())
    np.testing.assert_array_equal(ours.sam_points, expected.sam_points)
    points = backend.point_prompts(_too_large(), ClusteringConfig())
    np.testing.assert_array_equal(points.points, expected.prompts.points)
    assert len(points) > 0
    assert [r.getMessage()[:70] for r in caplog.records] == [
        "prompt clustering: backend reference for such batches, since maps must"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coarse_maps": (2, 4)}, r"coarse_maps must be float32 with 3 axes, got float32 with 2"),
        ({"cross_maps": (2, 4, 4)}, r"cross_maps must be float32 with 4 axes, got float32 with 3"),
        ({"fine_maps": (2, 4, 5)}, r"share one grid, got \(4, 4\), \(4, 5\) and \(4, 4\)"),
        ({"fine_maps": (1, 4, 4)}, r"one map a class: 2, got 2, 1 and 2"),
        ({"cross_maps": (3, 1, 4, 4)}, r"one map a class: 2, got 2, 2 and 1"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_maps_of_an_image_that_do_not_fit_are_refused_by_name(changes, message, backend):
    shapes = {"coarse_maps": (2, 4, 4), "fine_maps": (2, 4, 4), "cross_maps": (3, 2, 4, 4)}
    maps = {name: np.zeros(shape, np.float32) for name, shape in (shapes | changes).items()}
    rest = {"class_ids": np.zeros(2, np.int32), "image_size": (9, 9)}
    with pytest.raises(ValueError, match=message):
        prompts_from_maps(**maps, **rest, config=ClusteringConfig(backend=backend))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 4, 5), np.float32), np.zeros(2, np.int32)), "square, .* got 4x5"),
        ((np.zeros((2, 4, 4), np.float32), np.zeros(3, np.int32)), "one entry a mask: 2, got 3"),
        ((np.zeros((2, 4, 4), np.float32), np.ones(2, np.int32)), r"in \[0, 1\), got 1 to 1"),
    ],
)
def test_masks_that_do_not_fit_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        summarize_masks(*arguments, (_FRAME,), backend="reference")


def test_boxes_that_do_not_fit_are_refused_by_name():
    boxes, scores, labels = np.zeros((3, 4), np.float32), np.zeros(3, np.float32), np.zeros(3, "i4")
    with pytest.raises(ValueError, match=r"iou_thresh must be in \[0, 1\], got -0.1"):
        class_nms(boxes, scores, labels, iou_thresh=-0.1, backend="reference")
    with pytest.raises(ValueError, match=r"got \(3, 4\), \(2,\) and \(3,\)"):
        class_nms(boxes, scores[:2], labels, iou_thresh=0.5, backend="reference")


_WRONG_TYPES = """
import numpy as np
from tests.unit.weaksam_rt.prompt_kernels.test_backends import _batch, _FRAME
from weaksam_rt.prompt_clustering import (
    ClusteringConfig, class_nms, prompts_from_maps, summarize_masks,
)

f4, i4 = np.float32, np.int32
for refused in (
    lambda: _batch(maps=np.zeros((1, 3, 4, 5))),
    lambda: _batch(maps=[[0.0]]),
    lambda: _batch(map_classes=np.zeros(3)),
    lambda: summarize_masks(np.zeros((2, 4, 4), np.float16), np.zeros(2, i4), (_FRAME,),
                            backend="reference"),
    lambda: class_nms(np.zeros((3, 4), f4), np.zeros(3, f4), np.zeros(3, f4), iou_thresh=0.5,
                      backend="reference"),
    lambda: prompts_from_maps(coarse_maps=np.zeros((1, 4, 4), np.float16),
                              fine_maps=np.zeros((1, 4, 4), f4),
                              cross_maps=np.zeros((1, 1, 4, 4), f4), class_ids=np.zeros(1, i4),
                              image_size=(9, 9), config=ClusteringConfig()),
    lambda: ClusteringConfig(backend="numpy"),
):
    try:
        refused()
    except ValueError as error:
        print(error)
"""


def test_wrong_types_are_refused_by_name():
    # In an interpreter of its own: here, the type checker of the tests would be faster.
    ran = subprocess.run(
        [sys.executable, "-c", _WRONG_TYPES],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[4],
    )  # fmt: skip
    assert ran.stdout.splitlines() == [
        "maps must be float32 with 4 axes, got float64 with 4",
        "maps must be float32 with 4 axes, got list",
        "map_classes must be int32 with 1 axes, got float64 with 1",
        "logits must be float32 with 3 axes, got float16 with 3",
        "labels must be int32 with 1 axes, got float32 with 1",
        "coarse_maps must be float32 with 3 axes, got float16 with 3",
        "backend must be one of reference, cuda, auto, got 'numpy'",
    ]


def test_nothing_in_gives_nothing_out():
    batch = _batch(
        maps=np.zeros((1, 0, 4, 5), np.float32),
        **{name: np.zeros(0, np.int32) for name in ("map_images", "map_sources", "map_classes")},
    )
    no_boxes = np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)
    no_masks = np.zeros((0, 5, 5), np.float32), np.zeros(0, np.int32)
    for backend in (ReferenceBackend(), KernelBackend(NeverRuns())):
        prompts = backend.prompt_batch(batch, ClusteringConfig())
        assert len(prompts.prompts) == len(prompts.image_index) == 0
        assert prompts.point_offsets.tolist() == [0, 0]
        assert len(backend.point_prompts(batch, ClusteringConfig())) == 0
        assert len(backend.class_nms(*no_boxes, 0.5)) == 0
        assert backend.summarize_masks(*no_masks, (_FRAME,)).boxes.shape == (0, 4)


@pytest.fixture
def without_driver(monkeypatch, fresh_backends):
    def no_driver():
        raise BackendUnavailableError("no NVIDIA driver: not found")

    monkeypatch.setattr("weaksam_rt.cuda_driver.open_driver", no_driver)


def test_cuda_without_a_driver_is_an_error_and_auto_says_what_it_chose(without_driver, caplog):
    config = ClusteringConfig(backend="cuda")
    with pytest.raises(BackendUnavailableError, match="no NVIDIA driver"):
        prompt_batch(_batch(), config)
    caplog.set_level(logging.INFO)
    for _ in range(2):
        prompt_batch(_batch(), replace(config, backend="auto"))
    assert prompt_backend("auto") is prompt_backend("auto", 0)
    assert [r.getMessage() for r in caplog.records] == [
        "prompt clustering: backend reference, since no NVIDIA driver: not found"
    ]
