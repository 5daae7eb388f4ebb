import re
import shutil

import numpy as np
import pytest

from training.data.pixel_store import open_pixels
from training.engine.disk_room import check_room


def test_a_whole_file_is_not_written_again_and_another_shape_is(tmp_path):
    calls = []

    def fill(pixels):
        calls.append(len(pixels))
        pixels[:] = len(calls)

    for num_images, expected in ((3, 1), (3, 1), (4, 2)):
        pixels = open_pixels(tmp_path / "p.npy", (num_images, 2, 2, 3), fill)
        assert pixels.shape == (num_images, 2, 2, 3)
        assert (pixels == expected).all()
    assert calls == [3, 4]


def test_writing_into_the_result_leaves_the_file_alone(tmp_path):
    path, shape = tmp_path / "p.npy", (1, 2, 2, 3)
    open_pixels(path, shape, lambda pixels: pixels.fill(7), copy_on_write=True)[:] = 9
    pixels = open_pixels(path, shape, lambda pixels: pixels.fill(8))
    np.testing.assert_array_equal(pixels, 7)
    assert not pixels.flags.writeable


def test_a_kill_while_writing_leaves_no_file(tmp_path):
    def fill(_pixels):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_pixels(tmp_path / "p.npy", (1, 2, 2, 3), fill)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_an_error_before_anything_is_written(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path, 100, what="bytes", advice="")
    message = f"scaled images need .* GB in {re.escape(str(tmp_path))}"
    with pytest.raises(OSError, match=message):
        open_pixels(tmp_path / "p.npy", (free, 2, 2, 3), lambda pixels: pixels.fill(0))
    assert list(tmp_path.iterdir()) == []
