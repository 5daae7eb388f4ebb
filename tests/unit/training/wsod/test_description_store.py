import re
import shutil

import pytest
import torch

from training.models.wsod_detector import RoiDescriptions
from training.wsod.description_store import (
    as_descriptions,
    open_store,
    row_width,
    write_descriptions,
)


def _descriptions(num, d, *, with_cells):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.rand(num, d, generator=generator).bfloat16() for _ in range(3)]
    cells = torch.rand(num, 5, 5, d, generator=generator).bfloat16() if with_cells else None
    return RoiDescriptions(
        mean_inside=parts[0], max_inside=parts[1], mean_around=parts[2], cells=cells
    )


@pytest.mark.parametrize("with_cells", [False, True])
def test_what_is_written_is_read_from_the_file(tmp_path, with_cells):
    expected = _descriptions(4, 6, with_cells=with_cells)
    width = row_width(6, with_cells=with_cells)
    path = tmp_path / "d.bin"

    def fill(rows):
        write_descriptions(rows[1:5], expected)

    rows = open_store(path, 5, width, fill)
    assert path.stat().st_size == 5 * width * 2
    found = as_descriptions(rows[1:5], (2, 4))
    for name in ("mean_inside", "max_inside", "mean_around", "cells"):
        got, want = getattr(found, name), getattr(expected, name)
        assert (got is None) == (want is None)
        assert want is None or torch.equal(got, want)
    start, end = rows.data_ptr(), rows.data_ptr() + path.stat().st_size
    assert start <= found.mean_around.data_ptr() < end, "a view of the file, no copy"


def test_a_whole_file_is_not_written_again_and_another_size_is(tmp_path):
    calls = []

    def fill(rows):
        calls.append(len(rows))
        rows.fill_(len(calls))

    for num_rows, expected in ((3, 1.0), (3, 1.0), (4, 2.0)):
        assert (open_store(tmp_path / "d.bin", num_rows, 2, fill) == expected).all()
    assert calls == [3, 4]


def test_a_kill_while_writing_leaves_no_file(tmp_path):
    def fill(_rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store(tmp_path / "d.bin", 3, 2, fill)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_an_error_before_anything_is_written(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    message = f"descriptions of proposals need .* GB in {re.escape(str(tmp_path))}"
    with pytest.raises(OSError, match=message):
        open_store(tmp_path / "d.bin", free, 3072, lambda rows: rows.fill_(0))
    assert list(tmp_path.iterdir()) == []
