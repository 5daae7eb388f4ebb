import io

import numpy as np
import pytest
from PIL import Image

from weaksam_rt.errors import ImageError
from weaksam_rt.images import ImageLimits, decode_image, decode_reduced


def _encode(image, fmt="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def _photo(height=24, width=32):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("fmt", ["PNG", "WEBP"])
def test_lossless_formats_come_back_exactly(fmt):
    options = {"lossless": True} if fmt == "WEBP" else {}
    np.testing.assert_array_equal(decode_image(_encode(_photo(), fmt, **options)), _photo())


def test_jpeg_is_decoded():
    assert decode_image(_encode(_photo(), "JPEG")).shape == (24, 32, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode_image(_encode(_photo(), "PNG", exif=exif))
    assert upright.shape == ((24, 32, 3) if orientation <= 4 else (32, 24, 3))
    if orientation == 6:  # stored turned 90 degrees counter-clockwise
        np.testing.assert_array_equal(upright, np.rot90(np.asarray(_photo()), -1))


@pytest.mark.parametrize(
    ("size", "longest_side", "expected"),
    [
        ((480, 640), 320, (240, 320)),
        ((480, 640), 321, (480, 640)),  # half of it would be too small
        ((641, 333), 320, (321, 167)),  # odd sides are rounded up
        ((900, 1300), 160, (113, 163)),  # an eighth
        ((48, 64), 320, (48, 64)),
    ],
)
def test_a_jpeg_is_decoded_no_larger_than_the_model_sees(size, longest_side, expected):
    image = decode_reduced(_encode(_photo(*size), "JPEG"), longest_side)
    assert image.pixels.shape == (*expected, 3)
    assert image.image_size == size


def test_a_reduced_jpeg_is_the_mean_of_its_blocks():
    blocks = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    whole = Image.fromarray(blocks).resize((160, 128), Image.Resampling.BICUBIC)
    data = _encode(whole, "JPEG", quality=95, subsampling=0)
    reduced = decode_reduced(data, 80).pixels.astype(int)
    means = decode_image(data).reshape(64, 2, 80, 2, 3).mean(axis=(1, 3))
    assert np.abs(reduced - means).max() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_jpeg_knows_its_upright_size(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_reduced(_encode(_photo(480, 640), "JPEG", exif=exif), 320)
    assert image.image_size == ((480, 640) if orientation <= 4 else (640, 480))
    assert image.pixels.shape[:2] == ((240, 320) if orientation <= 4 else (320, 240))


@pytest.mark.parametrize("fmt", ["PNG", "WEBP"])
def test_other_formats_are_decoded_whole(fmt):
    image = decode_reduced(_encode(_photo(480, 640), fmt), 32)
    assert image.pixels.shape == (480, 640, 3)


def test_cmyk_and_grey_jpegs_are_reduced_too():
    for mode in ("CMYK", "L"):
        data = _encode(Image.new("RGB", (640, 480), (90, 90, 90)).convert(mode), "JPEG")
        image = decode_reduced(data, 320)
        assert image.pixels.shape == (240, 320, 3)
        assert np.abs(image.pixels.astype(int) - 90).max() < 4


def test_cmyk_becomes_rgb():
    red = Image.new("RGB", (16, 16), (200, 30, 40)).convert("CMYK")
    pixel = decode_image(_encode(red, "JPEG", quality=95))[8, 8].astype(int)
    assert np.abs(pixel - [200, 30, 40]).max() < 12


def test_sixteen_bit_samples_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 16 * 16).astype(np.uint16).reshape(16, 16)
    decoded = decode_image(_encode(Image.fromarray(ramp)))
    np.testing.assert_array_equal(decoded[..., 0], ramp >> 8)


def test_transparent_pixels_are_white():
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert decode_image(_encode(clear)).min() == 255


def test_grey_and_palette_images_become_rgb():
    assert decode_image(_encode(_photo().convert("L"))).shape == (24, 32, 3)
    assert decode_image(_encode(_photo().convert("P"))).shape == (24, 32, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"hello world, not an image", "not an image"),
        (_encode(_photo(), "JPEG")[:200], "damaged or incomplete|not an image"),
        (_encode(_photo(200, 200), "JPEG")[:3000], "damaged or incomplete"),
        (_encode(Image.new("RGB", (1, 1))), "at least 8"),
        (_encode(Image.new("L", (20_000, 20_000))), "far too large"),
        (_encode(Image.new("1", (9_000, 9_000))), "9000x9000"),
        (_encode(Image.new("L", (12_000, 12_000))), "12000x12000"),
        (_encode(_photo(), "GIF"), "not an image we know"),
        (_encode(_photo(), "PNG", save_all=True, append_images=[_photo(), _photo()]), "animated"),
        (_encode(_photo(), "WEBP", save_all=True, append_images=[Image.new("RGB", (32, 24))]),
        "animated"),
    ],
    ids=["empty", "text", "header only", "truncated", "1x1", "bomb", "large", "bomb warning",
    "gif", "apng", "awebp"],
)  # fmt: skip
def test_bad_bytes_are_refused_with_what_is_wrong(data, message):
    with pytest.raises(ImageError, match=message):
        decode_image(data)


def test_too_many_bytes_are_refused_before_decoding():
    with pytest.raises(ImageError, match="at most 100"):
        decode_image(_encode(_photo()), ImageLimits(max_bytes=100))
