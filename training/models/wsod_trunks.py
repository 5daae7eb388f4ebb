"""Frozen trunks that describe proposals, behind one interface: normalised RGB to maps.

It knows published layouts of ImageNet weights; it knows no proposals. All maps are outputs of a
ReLU, so no value is negative, and all trunks read RGB normalised by ``PIXEL_MEAN`` and
``PIXEL_STD``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vgg import cfgs, make_layers

from training.engine.checkpoint import load_weights
from training.models.squeezenet import SqueezeNetFeatures, load_imagenet_squeezenet

TrunkName = Literal["squeezenet", "resnet18", "vgg16"]
"""``squeezenet``: 0.7 M parameters. ``resnet18``: 2.8 M (up to its third stage). ``vgg16``: 14.7 M,
the paper's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkMaps:
    """The maps of a trunk, fine ones first."""

    strides: tuple[int, ...]
    """Pixels per cell."""
    channels: tuple[int, ...]


TRUNK_MAPS: Mapping[TrunkName, TrunkMaps] = {
    "squeezenet": TrunkMaps(strides=(8, 16), channels=SqueezeNetFeatures.out_channels[1:]),
    "resnet18": TrunkMaps(strides=(8, 16), channels=(128, 256)),
    "vgg16": TrunkMaps(strides=(8,), channels=(512,)),
}


class WsodTrunk(nn.Module):
    """A trunk by its name; in evaluation mode always, and never trained.

    Args:
        name: Which.
        network: Gives the maps of ``TRUNK_MAPS``; None: freshly initialised.
    """

    def __init__(self, name: TrunkName, network: nn.Module | None = None) -> None:
        super().__init__()
        self.maps = TRUNK_MAPS[name]
        self.network = (_NETWORKS[name]() if network is None else network).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "WsodTrunk":
        """Stay in evaluation mode: statistics of batch normalisation are frozen too."""
        return super().train(False)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, ...]:
        """One map [b, c, h / stride, w / stride] for each stride; sides are multiples of 16."""
        maps: tuple[Tensor, ...] = self.network(image)
        return maps


class _SqueezeNetMaps(nn.Module):
    def __init__(self, features: SqueezeNetFeatures | None = None) -> None:
        super().__init__()
        self.features = SqueezeNetFeatures() if features is None else features

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        pyramid = self.features(image)
        return pyramid.stride8, pyramid.stride16


class _ResNetMaps(nn.Module):
    """ResNet-18 up to its third stage, in torchvision's names."""

    def __init__(self) -> None:
        super().__init__()
        whole = ResNet(BasicBlock, [2, 2, 2, 2])
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
            self.add_module(name, getattr(whole, name))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = image
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2"):
            x = self.get_submodule(name)(x)
        return x, self.get_submodule("layer3")(x)


class _VggMaps(nn.Module):
    """VGG16's convolutions, in torchvision's names, with the fourth pool removed and the fifth
    block dilated instead, so that its stride stays 8.

    Source:
        WSDDN's and OICR's later implementations, and WeakSAM's released MIST; MIST also removes the
        last ReLU, which is kept here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = make_layers(cfgs["D"], batch_norm=False)[:_VGG_LAYERS]
        self.features[_VGG_POOL4] = nn.Identity()
        for layer in self.features[_VGG_POOL4:]:
            if isinstance(layer, nn.Conv2d):
                layer.dilation = layer.padding = (2, 2)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return (self.features(image),)


_VGG_POOL4, _VGG_LAYERS = 23, 30
"""Position of the fourth pool; layers without the fifth."""
_NETWORKS: Mapping[TrunkName, Callable[[], nn.Module]] = {
    "squeezenet": _SqueezeNetMaps,
    "resnet18": _ResNetMaps,
    "vgg16": _VggMaps,
}
_UNUSED = {"resnet18": ("layer4.", "fc."), "vgg16": ("classifier.",)}
"""Prefixes of published tensors that no map needs."""


def load_trunk(name: TrunkName, path: Path) -> WsodTrunk:
    """The trunk with ImageNet weights.

    Args:
        name: Which.
        path: For ``squeezenet`` a state dict in the names of the Caffe model, for the others in
            torchvision's.

    Raises:
        ArtifactError: The file cannot be read.
        ValueError: A tensor is missing, left over, or has another shape; all are named.
    """
    if name == "squeezenet":
        return WsodTrunk(name, _SqueezeNetMaps(load_imagenet_squeezenet(path)))
    trunk = WsodTrunk(name)
    published = load_weights(path)
    used = {key: value for key, value in published.items() if not key.startswith(_UNUSED[name])}
    own = trunk.network.state_dict()
    missing = sorted(key for key in own if key not in used and not _is_counter(key))
    unknown = sorted(set(used) - set(own))
    shapes = sorted(
        f"{key} is {list(value.shape)}, expected {list(own[key].shape)}"
        for key, value in used.items()
        if key in own and value.shape != own[key].shape
    )
    if missing or unknown or shapes:
        raise ValueError(
            f"{path} is not torchvision's {name}: missing {missing}, unknown {unknown}, of another "
            f"shape {shapes}"
        )
    trunk.network.load_state_dict({**own, **{key: value.float() for key, value in used.items()}})
    return trunk


def _is_counter(key: str) -> bool:
    """Older files lack them, and nothing reads them in evaluation."""
    return key.endswith("num_batches_tracked")
