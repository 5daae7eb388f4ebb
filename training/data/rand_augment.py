"""The published augmentation of classification ViTs: timm's transforms on images from their files.

Slower than ``augment_images`` (a few milliseconds an image on one core), so worker processes can do
it. What is drawn for an image depends on the seed, the epoch and its place there, not on who does
it.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.data.augment import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig
from training.data.coco import ImageRecord

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class VariedImages(Dataset[Tensor]):
    """The images of one epoch, each varied by chance of its own, [3, s, s]."""

    records: Sequence[ImageRecord]
    """In the order of the epoch."""
    transform: Transform
    seed: int
    epoch: int

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: int) -> Tensor:
        image = Image.fromarray(self.records[place].image())
        with chance_of(self.seed, self.epoch, place):
            return self.transform(image)


def make_transform(image_size: int, config: AugmentConfig) -> Transform:
    """Random crop, bicubic, mirrored, RandAugment, normalised, erased.

    Source:
        timm's ``create_transform`` as DeiT and WeakTr call it: ``colour`` is passed on, and timm
        leaves it out where RandAugment recolours; what is erased is filled with noise.
    """
    from timm.data.transforms_factory import create_transform  # timm takes a second

    made: Transform = create_transform(
        image_size,
        is_training=True,
        scale=(config.min_crop**2, 1.0),
        hflip=config.flip,
        color_jitter=config.colour,
        auto_augment=config.rand_augment,
        interpolation="bicubic",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        re_prob=config.erase,
        re_mode="pixel",
        re_count=1,
    )
    return made


def varied_batches(
    images: VariedImages, batches: Sequence[Sequence[int]], *, num_workers: int
) -> Iterator[Tensor]:
    """Batches [b, 3, s, s] of images at these places, in their order.

    Args:
        images: Of the epoch.
        batches: Places.
        num_workers: Processes that read and vary images; 0: this one does.
    """
    return iter(
        DataLoader(
            images,
            batch_sampler=list(map(list, batches)),
            num_workers=num_workers,
            # Not forked: this process has threads.
            multiprocessing_context="forkserver" if num_workers else None,
            # Its own: else every epoch would draw once from torch's.
            generator=torch.Generator(),
        )
    )


@contextlib.contextmanager
def chance_of(*seeds: int) -> Iterator[None]:
    """Python's, NumPy's and torch's random numbers by these seeds; afterwards as before."""
    drawn = np.random.SeedSequence(seeds).generate_state(1)
    seed = int(drawn[0])
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - timm draws there
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
