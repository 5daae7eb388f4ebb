import numpy as np
import pytest

from weaksam_rt.bytes_tensors import bytes_array, bytes_from_raw, raw_from_bytes

ITEMS = [b"", b"a\x00", b"\xff\xd8\xff", "grün".encode(), b"x" * 300]


def test_elements_survive_with_trailing_zeros():
    array = bytes_array(ITEMS)
    assert array.dtype == np.object_
    assert list(bytes_from_raw(raw_from_bytes(array))) == ITEMS


def test_an_element_is_its_length_and_its_bytes():
    assert raw_from_bytes(bytes_array([b"ab", b""])) == b"\x02\x00\x00\x00ab\x00\x00\x00\x00"


def test_any_shape_is_written_in_c_order():
    array = bytes_array([b"1", b"2", b"3", b"4"]).reshape(2, 2)
    assert list(bytes_from_raw(raw_from_bytes(array))) == [b"1", b"2", b"3", b"4"]


def test_nothing_is_nothing():
    assert raw_from_bytes(bytes_array([])) == b""
    assert bytes_from_raw(b"").shape == (0,)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_cut_tensor_is_refused(cut):
    raw = raw_from_bytes(bytes_array([b"ab"]))
    with pytest.raises(ValueError, match="ends inside an element"):
        bytes_from_raw(raw[:cut])
