"""Encoded image bytes to pixels, with every limit checked before memory is spent."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from weaksam_rt.errors import ImageError
from weaksam_rt.types import ImageSize

_FORMATS = ("JPEG", "PNG", "WEBP")
_QUARTER_TURNS = (5, 6, 7, 8)
"""Values of EXIF's orientation that exchange width and height."""
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What is refused, so that one request cannot take the server's memory."""

    max_bytes: int = 32 * 2**20
    """Largest encoded size."""
    max_pixels: int = 50_000_000
    """Largest width times height; 50 million pixels are 150 MB once decoded."""
    min_side: int = 8
    """Smallest width and height in pixels; below it nothing can be seen."""


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedImage:
    """Pixels of an image, perhaps fewer than it has."""

    pixels: NDArray[np.uint8]
    """RGB in [0, 255], [h, w, 3]."""
    image_size: ImageSize
    """(height, width) of the upright original."""


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """Decode one still JPEG, PNG or WebP image.

    EXIF orientation is applied, CMYK and palettes become RGB, 16-bit samples are scaled to 8 bits,
    transparent pixels are laid on white.

    Returns:
        RGB pixels in [0, 255], uint8 [h, w, 3].

    Raises:
        ImageError: The bytes are no such image, are incomplete, or exceed ``limits``.
    """
    return _decode(data, limits, longest_side=None).pixels


def decode_reduced(
    data: bytes, longest_side: int, limits: ImageLimits = DEFAULT_LIMITS
) -> DecodedImage:
    """``decode_image`` for a model that sees no more than ``longest_side`` pixels.

    A JPEG at least twice as large is decoded at a half, a quarter or an eighth of its size, never
    below ``longest_side``: the larger the photograph, the more of the work is never done.
    """
    return _decode(data, limits, longest_side)


def _decode(data: bytes, limits: ImageLimits, longest_side: int | None) -> DecodedImage:
    if not data:
        raise ImageError("the image is empty (0 bytes); send a JPEG, PNG or WebP file's bytes")
    if len(data) > limits.max_bytes:
        raise ImageError(
            f"the file has {len(data):,} bytes, at most {limits.max_bytes:,} are accepted; "
            "send it smaller or compressed more"
        )
    try:
        with warnings.catch_warnings():
            # Pillow only warns about what our own limit refuses with a size in the message.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_header(image, limits)
                image_size = _upright_size(image)
                if longest_side is not None:
                    longest = max(image.size)
                    wanted = [max(1, side * longest_side // longest) for side in image.size]
                    image.draft(None, (wanted[0], wanted[1]))  # only JPEG can fulfil it
                ImageOps.exif_transpose(image, in_place=True)
                return DecodedImage(pixels=np.asarray(_to_rgb(image)), image_size=image_size)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"not an image we know: {len(data):,} bytes starting with {data[:8]!r}; "
            f"send {', '.join(_FORMATS)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"the image is far too large ({error}); at most {limits.max_pixels:,} pixels"
        ) from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ImageError(f"the image is damaged or incomplete: {error}") from error


def _check_header(image: Image.Image, limits: ImageLimits) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageError(
            f"the image is {width}x{height} = {width * height:,} pixels, at most "
            f"{limits.max_pixels:,} are accepted; scale it down"
        )
    if min(width, height) < limits.min_side:
        raise ImageError(
            f"the image is {width}x{height} pixels; both sides must be at least {limits.min_side}"
        )
    num_frames = getattr(image, "n_frames", 1)
    if num_frames > 1:
        raise ImageError(f"the image is animated ({num_frames} frames); send one frame")


def _upright_size(image: Image.Image) -> ImageSize:
    width, height = image.size
    is_turned = image.getexif().get(ExifTags.Base.Orientation) in _QUARTER_TURNS
    return (width, height) if is_turned else (height, width)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES:
        samples = np.asarray(image).astype(np.int64)
        return Image.fromarray((samples.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    # Converting RGB to RGB would copy.
    return image if image.mode == "RGB" else image.convert("RGB")
