"""The ways that the benchmark puts side by side do the same work."""

import numpy as np
import torch

from benchmarks.machine import Peaks
from benchmarks.prompt_kernels import (
    BATCH,
    NMS,
    NUMPY,
    TORCHVISION,
    PromptKernelsConfig,
    bandwidth_table,
    cpu_nms_metrics,
    map_batch,
    torch_peaks,
)
from benchmarks.results import Metric
from weaksam_rt.class_activation_map import CAM_PEAKS, CROSS_PEAKS
from weaksam_rt.prompt_clustering._low_res_peaks import low_res_peaks
from weaksam_rt.prompt_clustering._reference import batch_peaks


def test_pytorchs_steps_find_our_peaks():
    batch = map_batch(2)
    ours = batch_peaks(
        batch, cam_peaks=CAM_PEAKS, cross_peaks=CROSS_PEAKS, find_peaks=low_res_peaks
    )
    maps = torch.from_numpy(np.asarray(batch.maps)[0])
    coarse_and_fine = [*range(4), *range(28, 32)]
    theirs = torch_peaks(maps[coarse_and_fine], CAM_PEAKS)
    for i, points in zip(coarse_and_fine, theirs, strict=True):
        np.testing.assert_array_equal(points, ours[i].points)


def test_suppression_has_a_figure_beside_torchvisions_and_a_floor():
    peaks = Peaks(flops=1e9, bytes=1e9)
    metrics = cpu_nms_metrics(PromptKernelsConfig(repeats=2, samples=1), peaks)
    assert [m.name for m in metrics] == [f"{NMS}: {NUMPY}", f"{NMS}: {TORCHVISION}"]
    assert all(0 < m.percent_of_floor < 100 for m in metrics)


def test_bandwidth_is_what_the_floor_is_measured_with():
    half = Metric(name=BATCH, unit="ms", repeats=((2.0,),), floor=1.0)
    table = bandwidth_table("paper", [half], Peaks(flops=1.0, bytes=8e9))
    assert table.rows == ((BATCH, "4", "8"),)
