import numpy as np
import pytest

from weaksam_rt.serving.batching import split_batch, stack_batch


def part(*rows):
    return {"x": np.array(rows, np.float32)[:, None], "y": np.array(rows, np.int32)}


def test_requests_are_joined_and_taken_apart_again():
    parts = [part(1), part(2, 3), part(4)]
    joined = stack_batch(parts)
    np.testing.assert_array_equal(joined["y"], [1, 2, 3, 4])
    for got, put in zip(split_batch(joined, [1, 2, 1]), parts, strict=True):
        np.testing.assert_array_equal(got["x"], put["x"])
        np.testing.assert_array_equal(got["y"], put["y"])


def test_a_lone_request_is_not_copied():
    alone = part(1, 2)
    assert stack_batch([alone])["x"] is alone["x"]


def test_an_engine_that_returns_another_batch_size_is_found_out():
    with pytest.raises(ValueError, match="3 rows for a batch of 2"):
        split_batch({"x": np.zeros((3, 1))}, [1, 1])
