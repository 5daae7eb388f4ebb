"""SqueezeNet 1.0 as a convolutional trunk: a small ImageNet-pretrained start for every task.

It knows the published layer layout and the input convention of the published weights; it knows no
task and no head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from training.engine.checkpoint import load_weights

PIXEL_MEAN = (123.675, 116.28, 103.53)
"""ImageNet mean of red, green, blue on the scale 0..255, as SAM uses it."""
PIXEL_STD = (58.395, 57.12, 57.375)
"""ImageNet standard deviation of red, green, blue on the scale 0..255, as SAM uses it."""
_PUBLISHED_MEAN_RGB = (123.0, 117.0, 104.0)
_FIRES = {
    "fire2": (96, 16, 64),
    "fire3": (128, 16, 64),
    "fire4": (128, 32, 128),
    "fire5": (256, 32, 128),
    "fire6": (256, 48, 192),
    "fire7": (384, 48, 192),
    "fire8": (384, 64, 256),
    "fire9": (512, 64, 256),
}
_PUBLISHED_LAYERS = {
    "squeeze": "conv1x1_1",
    "expand_1x1": "conv1x1_2",
    "expand_3x3": "conv3x3_2",
}
_HEAD_PREFIX = "conv_final."


class Fire(nn.Module):
    """Squeeze by a 1x1 convolution, then expand by 1x1 and 3x3 ones side by side."""

    def __init__(self, in_channels: int, squeeze_channels: int, expand_channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze_channels, 1)
        self.expand_1x1 = nn.Conv2d(squeeze_channels, expand_channels, 1)
        self.expand_3x3 = nn.Conv2d(squeeze_channels, expand_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """Features of ``2 * expand_channels`` channels at the same size."""
        squeezed = functional.relu(self.squeeze(x))
        return functional.relu(
            torch.cat([self.expand_1x1(squeezed), self.expand_3x3(squeezed)], dim=1)
        )


@dataclass(frozen=True, kw_only=True)
class PyramidFeatures:
    """What the trunk sees, from fine to coarse; all are outputs of a ReLU and so at least 0."""

    stride4: Float[Tensor, "b 256 h4 w4"]
    """Output of fire4."""
    stride8: Float[Tensor, "b 512 h8 w8"]
    """Output of fire8."""
    stride16: Float[Tensor, "b 512 h16 w16"]
    """Output of fire9."""


class SqueezeNetFeatures(nn.Module):
    """SqueezeNet 1.0 without its classifier, on RGB normalised by ``PIXEL_MEAN`` and ``PIXEL_STD``.

    The paddings differ from the published ones so that sides that are multiples of 16 halve
    exactly, and so that the receptive fields stay centred on the cells: the pools look alternately
    right and left of the centre, which keeps a cell's offset under a quarter of its side.

    Source:
        SqueezeNet (arXiv:1602.07360), table 1, version 1.0.
    """

    out_channels: tuple[int, int, int] = (256, 512, 512)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 7, stride=2, padding=3)
        for name, channels in _FIRES.items():
            self.add_module(name, Fire(*channels))
        # Without pretrained weights: the variance must survive 17 layers without normalisation.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> PyramidFeatures:
        """Features at strides 4, 8 and 16.

        Args:
            image: Normalised RGB; both sides multiples of 16 (others give the sizes rounded up).
        """
        x = functional.relu(self.conv1(image))  # stride 2
        x = _pool_right(x)
        stride4 = self._fires(x, "fire2", "fire3", "fire4")
        x = _pool_left(stride4)
        stride8 = self._fires(x, "fire5", "fire6", "fire7", "fire8")
        x = _pool_right(stride8)
        return PyramidFeatures(stride4=stride4, stride8=stride8, stride16=self._fires(x, "fire9"))

    def _fires(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = self.get_submodule(name)(x)
        return x


def load_imagenet_squeezenet(path: Path) -> SqueezeNetFeatures:
    """The trunk with the published ImageNet weights.

    The published network reads BGR minus a mean; this convention is folded into the first
    convolution, so the trunk takes normalised RGB like every other model here. Its classifier is
    left out.

    Args:
        path: State dict with the names of the Caffe model (``fire2.conv1x1_1.weight``, ...).

    Raises:
        ValueError: A tensor is missing, left over, or has another shape.
    """
    trunk = SqueezeNetFeatures()
    published = load_weights(path)
    expected = {_published_name(name) for name in trunk.state_dict()}
    found = {name for name in published if not name.startswith(_HEAD_PREFIX)}
    if found != expected:
        raise ValueError(
            f"{path} is not SqueezeNet 1.0 in Caffe names: missing {sorted(expected - found)}, "
            f"unknown {sorted(found - expected)}"
        )
    weights = {name: published[_published_name(name)] for name in trunk.state_dict()}
    trunk.load_state_dict(weights | _fold_input_convention(weights))
    return trunk


def _published_name(name: str) -> str:
    for ours, theirs in _PUBLISHED_LAYERS.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def _fold_input_convention(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first layer for normalised RGB, from that for BGR in 0..255 minus the published mean."""
    weight_rgb = weights["conv1.weight"].flip(1)
    std = torch.tensor(PIXEL_STD)
    shift = torch.tensor(PIXEL_MEAN) - torch.tensor(_PUBLISHED_MEAN_RGB)
    return {
        "conv1.weight": weight_rgb * std[:, None, None],
        "conv1.bias": weights["conv1.bias"] + (weight_rgb.sum(dim=(2, 3)) * shift).sum(dim=1),
    }


def _pool_right(x: Tensor) -> Tensor:
    """Maximum over columns 2i to 2i + 2 (rows alike); beyond the border 0, a ReLU's least."""
    return functional.max_pool2d(functional.pad(x, (0, 1, 0, 1)), 3, stride=2)


def _pool_left(x: Tensor) -> Tensor:
    """Maximum over columns 2i - 1, 2i, 2i + 1 (and rows alike)."""
    return functional.max_pool2d(x, 3, stride=2, padding=1)
