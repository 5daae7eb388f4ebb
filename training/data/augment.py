"""Augmentation of image batches in one go, on tensors; tags stay as they are.

It knows square batches of pixels; it knows no boxes.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Of red, green, blue in [0, 1]."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of red, green, blue in [0, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """How far a training image may differ from its original."""

    min_crop: float = 0.6
    """Least side of the random crop as a share of the image's, in (0, 1]."""
    flip: float = 0.5
    """Chance to mirror, in [0, 1]."""
    colour: float = 0.3
    """Greatest relative change of brightness, contrast and saturation, in [0, 1)."""
    erase: float = 0.25
    """Chance to grey out a random rectangle, in [0, 1]; the model must find other parts."""
    rand_augment: str = ""
    """RandAugment in timm's words, for example ``rand-m9-mstd0.5-inc1``: images then come from
    their files, and timm varies them one by one (``training.data.rand_augment``), ``min_crop``
    being the root of the least area. Empty: whole batches of scaled images are varied at once."""

    def __post_init__(self) -> None:
        if not 0 < self.min_crop <= 1:
            raise ValueError(f"min_crop must lie in (0, 1]; got {self.min_crop}")
        if not 0 <= self.colour < 1:
            raise ValueError(f"colour must lie in [0, 1); got {self.colour}")
        if not (0 <= self.flip <= 1 and 0 <= self.erase <= 1):
            raise ValueError(f"flip and erase are chances in [0, 1]; got {self.flip}, {self.erase}")
        if self.rand_augment and not self.rand_augment.startswith("rand-"):
            raise ValueError(
                "rand_augment must be like rand-m9-mstd0.5-inc1, or empty; got "
                f"{self.rand_augment!r}"
            )


def published_augment() -> AugmentConfig:
    """As WeakTr and DeiT train: crops of 8 to 100 % of the area, RandAugment, erasing.

    Source:
        WeakTr's defaults: RandAugment m9-std0.5-inc1, colour jitter 0.4, random erasing 0.25.
    """
    return AugmentConfig(
        min_crop=0.08**0.5, colour=0.4, erase=0.25, rand_augment="rand-m9-mstd0.5-inc1"
    )


def normalize_images(images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    """RGB pixels to the frame of ImageNet models: float32, zero mean and unit variance."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device)
    std = torch.tensor(IMAGENET_STD, device=images.device)
    return ((images.to(torch.float32) / 255 - mean) / std).permute(0, 3, 1, 2)


def augment_images(
    images: UInt8[Tensor, "b h w 3"],
    image_size: int,
    config: AugmentConfig,
    generator: torch.Generator,
    *,
    rows: slice | None = None,
    batch_size: int | None = None,
) -> Float[Tensor, "b 3 s s"]:
    """Random crops, mirrored and recoloured, normalised.

    Args:
        images: RGB, all of one size.
        image_size: Side s of the result, pixels.
        config: How far to go.
        generator: The only source of chance, on the CPU.
        rows: Which rows of a larger batch ``images`` are; they come out as they would in the whole
            batch. None: all.
        batch_size: Of the larger batch.
    """
    whole = len(images) if batch_size is None else batch_size
    chance = _Chance(generator, whole, slice(None) if rows is None else rows, images.device)
    x = images.permute(0, 3, 1, 2).to(torch.float32) / 255
    x = _random_crops(x, image_size, config, chance)
    x = _random_colours(x, config.colour, chance)
    mean = torch.tensor(IMAGENET_MEAN, device=x.device)
    std = torch.tensor(IMAGENET_STD, device=x.device)
    x = (x - mean[:, None, None]) / std[:, None, None]
    return _random_erasing(x, config.erase, chance)


@dataclass(frozen=True)
class _Chance:
    """Random numbers for some rows of a batch: drawn for the whole batch, so that they do not
    depend on who has which rows.
    """

    generator: torch.Generator
    batch_size: int
    rows: slice
    device: torch.device

    def uniform(self, low: float, high: float, *size: int) -> Tensor:
        """[rows, *size]."""
        drawn = torch.rand(self.batch_size, *size, generator=self.generator)
        return low + (high - low) * drawn[self.rows].to(self.device)

    def uniform_pairs(self, low: float, high: float) -> Tensor:
        """[2, rows]."""
        drawn = torch.rand(2, self.batch_size, generator=self.generator)
        return low + (high - low) * drawn[:, self.rows].to(self.device)


def _random_crops(
    x: Float[Tensor, "b 3 h w"], image_size: int, config: AugmentConfig, chance: _Chance
) -> Float[Tensor, "b 3 s s"]:
    num = len(x)
    shares = chance.uniform(config.min_crop, 1.0, 2)
    offsets = chance.uniform(-1.0, 1.0, 2) * (1 - shares)
    mirror = 1 - 2 * (chance.uniform(0.0, 1.0) < config.flip).float()
    transform = torch.zeros(num, 2, 3, device=x.device)
    transform[:, 0, 0] = shares[:, 0] * mirror
    transform[:, 1, 1] = shares[:, 1]
    transform[:, :, 2] = offsets
    grid = functional.affine_grid(transform, [num, 3, image_size, image_size], align_corners=False)
    return functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _random_colours(
    x: Float[Tensor, "b 3 h w"], strength: float, chance: _Chance
) -> Float[Tensor, "b 3 h w"]:
    brightness, contrast, saturation = (
        chance.uniform(1 - strength, 1 + strength, 1, 1, 1) for _ in range(3)
    )
    x = x * brightness
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * saturation
    middle = grey.mean(dim=(2, 3), keepdim=True)
    return (middle + (x - middle) * contrast).clamp(0, 1)


def _random_erasing(
    x: Float[Tensor, "b 3 h w"], erase: float, chance: _Chance
) -> Float[Tensor, "b 3 h w"]:
    """Set one rectangle of 2 to 20 % of the area to the mean colour, in some images."""
    side = x.shape[-1]
    area = chance.uniform(0.02, 0.2)
    aspect = torch.exp(chance.uniform(-math.log(2), math.log(2)))
    half = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()]) * side / 2
    centre = chance.uniform_pairs(0.0, float(side))
    is_erased = chance.uniform(0.0, 1.0) < erase
    position = torch.arange(side, device=x.device)
    rows, columns = (
        (position - centre[axis, :, None]).abs() < half[axis, :, None] for axis in (0, 1)
    )
    inside = rows[:, :, None] & columns[:, None, :] & is_erased[:, None, None]
    return x.masked_fill(inside[:, None], 0.0)
