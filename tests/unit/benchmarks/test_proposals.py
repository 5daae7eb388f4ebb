"""Our pipeline and segment_anything's generator on the same weights."""

from pathlib import Path

import numpy as np
import pytest
import skimage

from benchmarks.proposals import ProposalsConfig, match, our_way, peer_way, torch_models
from training.models.sam import load_sam


def test_boxes_are_matched_one_to_one():
    peer = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60]], np.float32)
    ours = np.array([[0, 0, 10, 10.5], [90, 90, 99, 99]], np.float32)
    found = match(peer, ours)
    assert (found.num_peer, found.num_ours, found.num_matched) == (3, 2, 1)
    assert match(peer, peer).share == 1
    assert match(peer[:0], ours).share == 1
    assert match(peer, ours[:0]).share == 0


@pytest.fixture(scope="module")
def sam():
    return load_sam(Path(__file__).parents[3] / "assets" / "weights" / "sam_compact.safetensors")


@pytest.mark.parametrize(
    ("picture", "step", "nms_thresh"),
    [
        ("astronaut", 3, 1.0),
        # Suppression by boxes that end after their last pixel loses some of these,
        ("coffee", 5, 0.7),
        ("rocket", 5, 0.5),
        # stability of low-resolution masks another.
        ("rocket", 3, 0.5),
    ],
)
def test_our_pipeline_finds_the_generators_boxes(sam, picture, step, nms_thresh):
    config = ProposalsConfig(points_per_side=10, nms_thresh=nms_thresh)
    image = np.ascontiguousarray(getattr(skimage.data, picture)()[::step, ::step])
    peer = peer_way(sam, config, prompts_per_call=7)(image)
    ours = our_way(*torch_models(sam, config), config)(image)
    # Where nothing is suppressed the generator repeats equal boxes, ours are unique.
    unique = np.unique(peer, axis=0)
    assert len(unique) > 5
    assert match(unique, ours).share == 1
