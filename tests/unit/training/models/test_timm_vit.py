import dataclasses

import pytest
import timm
import torch

from training.models.timm_vit import timm_vit_config, with_imagenet_input
from training.models.vit import ClassTokenVit, VitConfig, load_deit_
from training.models.weaktr import WeakTr, WeakTrConfig, weaktr_loss


def _timm_model(name, seed=0, **settings):
    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False, num_classes=0, **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # timm starts near zero, where much looks alike
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def _images(num=2, side=64):
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "is_ours"),
    [
        ("deit_tiny_patch16_224", True),
        ("deit_tiny_patch16_224", False),
        ("vit_xsmall_patch16_clip_224", False),
    ],
    ids=["deit in our blocks", "deit in timm's blocks", "a ViT with a norm before its blocks"],
)
def test_one_class_token_computes_what_timm_computes(name, is_ours):
    model = _timm_model(name, img_size=64)
    config = timm_vit_config(name, image_size=64)
    if is_ours:
        config = dataclasses.replace(config, timm_model="")
    vit = ClassTokenVit(config, 1).eval()
    load_deit_(vit, model.state_dict())
    with torch.inference_mode():
        features, expected = vit(_images()), model.forward_features(_images())
    torch.testing.assert_close(features.class_tokens[:, 0], expected[:, 0], atol=1e-4, rtol=1e-4)
    patches = features.patch_tokens.flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches, expected[:, 1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        features.attentions.sum(dim=-1), torch.ones(2, config.depth, config.num_heads, 17)
    )


@pytest.mark.parametrize(
    ("size", "dim", "heads"), [("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12)]
)
def test_the_sizes_of_every_deit_are_read_from_timm(size, dim, heads):
    config = timm_vit_config(f"deit_{size}_patch16_224", final_norm=False)
    assert config == VitConfig(
        dim=dim,
        num_heads=heads,
        final_norm=False,
        timm_model=f"deit_{size}_patch16_224",
    )


def test_a_classifier_on_timms_blocks_gives_maps_and_learns():
    vit = timm_vit_config("vit_tiny_patch16_224", image_size=32, final_norm=False)
    torch.manual_seed(0)
    model = WeakTr(WeakTrConfig(vit=vit), 3).train()
    output = model(_images(side=32))
    assert output.fine_maps.shape == (2, 3, 2, 2)
    assert output.cross_maps.shape == (2, 12, 3, 3, 2, 2)
    loss, _ = weaktr_loss(output, torch.tensor([[1.0, 0, 0], [0, 1, 1]]))
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", "a ResNet, not timm's"),
        ("deit3_small_patch16_224", "a class token without position"),
        ("vit_small_patch16_dinov3", "not timm's VisionTransformer"),
        ("vit_base_patch16_rpn_224", "no class token"),
        ("no_such_vit", "timm has no model 'no_such_vit'"),
    ],
)
def test_what_is_no_plain_vit_is_refused_with_the_reason(name, reason):
    with pytest.raises(ValueError, match=reason):
        timm_vit_config(name)


def test_sizes_that_are_not_the_models_are_refused():
    config = dataclasses.replace(timm_vit_config("deit_tiny_patch16_224"), num_heads=6)
    with pytest.raises(ValueError, match=r"'num_heads': \(6, 3\)"):
        ClassTokenVit(config, 1)


def test_weights_for_other_input_are_converted():
    """vit_tiny_patch16_224 wants mean and deviation 0.5."""
    name = "vit_tiny_patch16_224"
    weights = _timm_model(name, img_size=32).state_dict()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    vit = ClassTokenVit(timm_vit_config(name, image_size=32), 1).eval()
    load_deit_(vit, weights)
    expected = vit((pixels - 0.5) / 0.5).class_tokens
    load_deit_(vit, with_imagenet_input(name, weights))
    torch.testing.assert_close(
        vit((pixels - mean) / std).class_tokens, expected, atol=1e-4, rtol=1e-4
    )
    same = with_imagenet_input("deit_tiny_patch16_224", weights)
    assert same["patch_embed.proj.bias"] is weights["patch_embed.proj.bias"]
