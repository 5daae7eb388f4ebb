import pytest
import torch
import torchvision
from torch.nn import functional

from training.models.squeezenet import PIXEL_MEAN, PIXEL_STD
from training.models.wsod_detector import RoiDescriber, WsodDetectorConfig, WsodHead
from training.models.wsod_trunks import TRUNK_MAPS, WsodTrunk, load_trunk
from weaksam_rt.errors import ArtifactError


def _image(side=64):
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TRUNK_MAPS)
def test_a_trunk_keeps_its_interface(name):
    torch.manual_seed(0)
    trunk = WsodTrunk(name).train()
    assert not any(module.training for module in trunk.modules()), "statistics stay as they are"
    assert not any(parameter.requires_grad for parameter in trunk.parameters())
    maps = trunk(_image())
    for found, stride, channels in zip(maps, trunk.maps.strides, trunk.maps.channels, strict=True):
        assert found.shape == (1, channels, 64 // stride, 64 // stride)
        assert found.min() >= 0
        assert found.max() > 0


@pytest.mark.parametrize("name", TRUNK_MAPS)
def test_the_head_has_the_size_of_the_trunk(name):
    torch.manual_seed(0)
    describer = RoiDescriber(WsodTrunk(name), keep_cells=True)
    rois = describer(torch.rand(1, 3, 64, 64) * 255, torch.tensor([[8.0, 8.0, 40.0, 56.0]]))
    head = WsodHead(WsodDetectorConfig(trunk=name, image_size=64), num_classes=2).eval()
    assert head(rois).mil_scores.shape == (1, 2)


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """Torchvision's layout; its classifier, which no map needs, shortened."""
    torch.manual_seed(0)
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    state |= {"classifier.0.weight": torch.zeros(2, 2)}
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(state, path)
    return path, features


def test_vgg16_is_torchvisions_up_to_the_fourth_pool_and_dilated_after_it(vgg_file):
    path, features = vgg_file
    found = load_trunk("vgg16", path)(_image())[0]
    x = features[:23](_image())  # torchvision's own layers, up to conv4_3
    for layer in (24, 26, 28):
        weights = features[layer]
        x = functional.relu(
            functional.conv2d(x, weights.weight, weights.bias, padding=2, dilation=2)
        )
    torch.testing.assert_close(found, x)


def test_resnet18_is_torchvisions(tmp_path):
    torch.manual_seed(0)
    whole = torchvision.models.resnet18(weights=None).eval()
    torch.save(whole.state_dict(), tmp_path / "resnet18.pth")
    expected, outputs = {}, ("layer2", "layer3")
    for name in outputs:
        whole.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: expected.update({name: output})
        )
    whole(_image())
    found = load_trunk("resnet18", tmp_path / "resnet18.pth")(_image())
    for name, one in zip(outputs, found, strict=True):
        torch.testing.assert_close(one, expected[name])


def test_another_layout_is_refused_and_its_tensors_are_named(vgg_file, tmp_path):
    path, _ = vgg_file
    state = torch.load(path, weights_only=True)  # noqa: TID251
    del state["features.0.bias"]
    state |= {"features.2.weight": torch.zeros(1), "extra": torch.zeros(1)}
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"missing \['features.0.bias'\], unknown \['extra'\]"
    ) as e:
        load_trunk("vgg16", tmp_path / "other.pth")
    assert "features.2.weight is [1], expected [64, 64, 3, 3]" in str(e.value)
    with pytest.raises(ArtifactError, match="cannot read weights"):
        load_trunk("resnet18", tmp_path / "none.pth")


def test_torchvisions_normalisation_is_the_trunks():
    """Published weights of both want RGB in [0, 1] minus a mean, by a deviation."""
    transform = torchvision.models.VGG16_Weights.IMAGENET1K_V1.transforms()
    assert tuple(255 * m for m in transform.mean) == pytest.approx(PIXEL_MEAN)
    assert tuple(255 * s for s in transform.std) == pytest.approx(PIXEL_STD)
