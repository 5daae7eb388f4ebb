"""Masks at image resolution from a part of their pixels: the definition's, bit for bit."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weaksam_rt.masks import (
    boxes_from_logits,
    compress_runs,
    decode_rle,
    encode_rle,
    mask_to_box,
    rle_boxes,
)
from weaksam_rt.preprocessing import ModelFrame, longest_side_frame, resize_maps
from weaksam_rt.prompt_clustering import _low_res_masks, _reference, encode_masks, summarize_masks
from weaksam_rt.types import InstanceMasks

sizes = st.tuples(st.integers(1, 120), st.integers(1, 120))
sides = st.integers(1, 24)


def _smooth(rng, side):
    coarse = rng.normal(rng.normal(), 2, (1, 3, 3)).astype(np.float32)
    return np.ascontiguousarray(resize_maps(coarse, (side, side))[0])


def _logits(rng, side, kind):
    if kind == "smooth":
        return _smooth(rng, side)
    if kind == "noise":
        return rng.normal(-1, 1, (side, side)).astype(np.float32)
    if kind == "plateaus":
        return rng.choice([-1.0, 0.0, 1.0, 1e-6, -1e-6], (side, side)).astype(np.float32)
    if kind == "tiny":
        return (1e-41 * rng.normal(size=(side, side))).astype(np.float32)
    return rng.choice([-1e30, -1.0, 1.0, 1e30], (side, side)).astype(np.float32)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**32 - 1), sizes, sides,
    st.sampled_from([1, 2, 4, 7]),
    st.sampled_from(["smooth", "noise", "plateaus", "tiny", "huge"]),
)  # fmt: skip
@example(0, (1, 1), 1, 1, "plateaus")
@example(0, (1, 120), 24, 4, "smooth")
def test_pixels_are_those_of_the_definition(seed, size, side, stride, kind):
    logits = _logits(np.random.default_rng(seed), side, kind)
    frame = longest_side_frame(size, stride * side)
    np.testing.assert_array_equal(
        _low_res_masks.inside_down_columns(logits, frame),
        _reference.inside_down_columns(logits, frame),
    )


def test_a_mask_that_is_unclear_everywhere_is_computed_in_parts(monkeypatch):
    monkeypatch.setattr(_low_res_masks, "_PIXELS_AT_ONCE", 1000)
    logits = np.random.default_rng(0).choice([0, 1e-7], (16, 16)).astype(np.float32)
    logits[0, 0] = 1
    frame = longest_side_frame((90, 70), 64)
    found = _low_res_masks.inside_down_columns(logits, frame)
    expected = _reference.inside_down_columns(logits, frame)
    np.testing.assert_array_equal(found, expected)
    assert 0 < expected.sum() < expected.size


def test_few_pixels_of_a_smooth_mask_are_computed(monkeypatch):
    computed = []
    values = _low_res_masks._values

    def _counted(logits, rows, columns):
        computed.append(len(rows.weight))
        return values(logits, rows, columns)

    monkeypatch.setattr(_low_res_masks, "_values", _counted)
    ys, xs = np.mgrid[:256, :256]
    disc = (60 - np.hypot(xs - 100, ys - 90)).astype(np.float32)
    frame = longest_side_frame((480, 640), 1024)
    assert _low_res_masks.inside_down_columns(disc, frame).sum() > 3000
    assert 0 < sum(computed) < 0.03 * 480 * 640


@given(st.integers(0, 2**32 - 1), sizes, st.sampled_from(["smooth", "noise", "huge"]))
@example(1, (1, 1), "noise")
def test_compressed_runs_and_their_boxes_are_those_of_the_masks(seed, size, kind):
    rng = np.random.default_rng(seed)
    frame = longest_side_frame(size, 64)
    logits = np.stack([_logits(rng, 16, kind), np.full((16, 16), -1), np.full((16, 16), 1)])
    logits = logits.astype(np.float32)
    encoded = encode_masks(logits, np.zeros(3, np.int32), (frame,), backend="reference")
    runs = np.split(encoded.runs, encoded.run_offsets[1:-1])
    counts = tuple(compress_runs(of_mask, size) for of_mask in runs)
    masks = np.stack(
        [_reference.inside_down_columns(m, frame).reshape(size[::-1]).T for m in logits]
    )
    assert counts == encode_rle(masks)
    np.testing.assert_array_equal(decode_rle(counts, size), masks)
    boxes = rle_boxes(InstanceMasks(rle_counts=counts, image_size=size))
    np.testing.assert_array_equal(boxes, mask_to_box(masks))


def test_no_masks_have_no_boxes():
    assert rle_boxes(InstanceMasks(rle_counts=(), image_size=(4, 5))).shape == (0, 4)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf, 3e38])
def test_a_broken_logit_is_outside_or_the_largest_and_harms_no_other_mask(broken):
    frame = ModelFrame(image_size=(64, 64), valid_size=(64, 64), model_size=64)
    logits = np.full((2, 16, 16), -4, np.float32)
    logits[:, 4:8, 4:8] = 4
    repaired = logits.copy()
    logits[0, 5, 5] = logits[0, 12, 12] = broken
    with np.errstate(all="raise"):
        boxes = boxes_from_logits(logits, frame)
        summary = summarize_masks(logits, np.zeros(2, np.int32), (frame,), backend="reference")
    np.testing.assert_array_equal(boxes, summary.boxes)
    np.testing.assert_array_equal(boxes[1], boxes_from_logits(repaired, frame)[1])
    assert np.isfinite(boxes).all()
    if not broken > 0:
        np.testing.assert_array_equal(boxes[0], boxes[1])
