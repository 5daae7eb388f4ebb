"""timm's vision transformers as the blocks of ``ClassTokenVit``: any plain ViT of timm, with its
attention in sight.

Nothing is downloaded: weights come from a file, like all weights here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from training.data.augment import IMAGENET_MEAN, IMAGENET_STD
from training.models.vit import VitConfig, VitParts


class AttentiveBlock(Block):
    """timm's block that also gives its attention."""

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "b t d"]
    ) -> tuple[Tensor, Tensor]:
        """The new tokens [b, t, d] and the post-softmax attention [b, n, t, t]."""
        change, attention = _attend(self.attn, self.norm1(x))
        x = x + self.drop_path1(self.ls1(change))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), attention


def _attend(layer: Any, x: Float[Tensor, "b t d"]) -> tuple[Tensor, Tensor]:
    """``timm.layers.Attention`` step by step: fused kernels do not show their weights."""
    query, key, value = (
        part.unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
        for part in layer.qkv(x).chunk(3, dim=2)
    )
    query, key = layer.q_norm(query), layer.k_norm(key)
    attention = ((query * layer.scale) @ key.transpose(-2, -1)).softmax(dim=-1)
    context = (layer.attn_drop(attention).to(value.dtype) @ value).transpose(1, 2).flatten(2)
    return layer.proj_drop(layer.proj(layer.norm(context))), attention


def timm_vit_config(name: str, *, image_size: int | None = None, **settings: Any) -> VitConfig:
    """The sizes of the timm model ``name``, for example ``deit_small_patch16_224``.

    Args:
        name: A name that ``timm.create_model`` knows; its model must be a plain ViT.
        image_size: Side of the square input; None: that of the model.
        settings: Fields of ``VitConfig`` that are not sizes.

    Raises:
        ValueError: timm has no such model, or it is no plain ViT (what differs is named).
    """
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    model = _create(name, **size)
    _check_is_plain(name, model)
    embed = model.patch_embed
    return VitConfig(
        image_size=embed.img_size[0],
        patch_size=embed.patch_size[0],
        dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=model.blocks[0].attn.num_heads,
        mlp_ratio=model.blocks[0].mlp.fc1.out_features // model.embed_dim,
        timm_model=name,
        **settings,
    )


def timm_parts(config: VitConfig) -> VitParts:
    """The modules of the timm model that ``config`` names, freshly initialised.

    Raises:
        ValueError: The sizes in ``config`` are not the model's; make it with ``timm_vit_config``.
    """
    settings = ("drop_path", "final_norm", "position_margin")
    kept = {name: getattr(config, name) for name in settings}
    expected = timm_vit_config(config.timm_model, image_size=config.image_size, **kept)
    if expected != config:
        wrong = {
            field.name: (getattr(config, field.name), getattr(expected, field.name))
            for field in dataclasses.fields(VitConfig)
            if getattr(config, field.name) != getattr(expected, field.name)
        }
        raise ValueError(
            f"these are not the sizes of {config.timm_model}: {wrong} (got, expected); make the "
            "config with timm_vit_config"
        )
    model = _create(
        config.timm_model,
        device="cpu",
        img_size=config.image_size,
        drop_path_rate=config.drop_path,
        block_fn=AttentiveBlock,
    )
    return VitParts(
        projection=model.patch_embed.proj,
        norm_pre=model.norm_pre,
        blocks=nn.ModuleList(model.blocks),
        norm=model.norm,
    )


def with_imagenet_input(name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the timm model ``name`` for input normalised as here, whatever it was trained on.

    Some of timm's ViTs want pixels of mean and deviation 0.5; the difference is linear and goes
    into the patch projection, which has no padding.

    Raises:
        ValueError: The difference cannot be taken in because the projection has no bias.
    """
    expected = timm.get_pretrained_cfg(name)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD)
    if expected is None or (tuple(expected.mean), tuple(expected.std)) == (mean, std):
        return dict(weights)
    if "patch_embed.proj.bias" not in weights:
        raise ValueError(
            f"{name} wants input of mean {expected.mean} and deviation {expected.std}, and its "
            "patch projection has no bias to take in the difference; choose another backbone"
        )
    weight = weights["patch_embed.proj.weight"].float()
    scale = torch.tensor(std) / torch.tensor(expected.std)
    shift = (torch.tensor(mean) - torch.tensor(expected.mean)) / torch.tensor(expected.std)
    return {
        **weights,
        "patch_embed.proj.weight": weight * scale[:, None, None],
        "patch_embed.proj.bias": weights["patch_embed.proj.bias"].float()
        + (weight.sum(dim=(2, 3)) * shift).sum(dim=1),
    }


def _create(name: str, device: str = "meta", **settings: Any) -> Any:
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:8])
        raise ValueError(f"timm has no model {name!r}; similar names: {close or 'none'}")
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, device=device, **settings)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{name} is no plain ViT: {error}; choose another backbone") from error


def _check_is_plain(name: str, model: nn.Module) -> None:
    """Raise ``ValueError`` unless ``ClassTokenVit`` computes what ``model`` does."""
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"{name} is a {type(model).__name__}, not timm's VisionTransformer")
    unlike = [
        what
        for what, is_so in (
            ("no class token", not model.has_class_token),
            ("register tokens", model.num_reg_tokens > 0),
            ("a class token without position", model.no_embed_class),
            ("no learnt positions", model.pos_embed is None),
            ("a pooled norm instead of a final one", isinstance(model.norm, nn.Identity)),
            ("a norm of its patches", not isinstance(model.patch_embed.norm, nn.Identity)),
            ("a patch embedding of its own", not isinstance(model.patch_embed.proj, nn.Conv2d)),
            ("blocks of its own", any(type(block) is not Block for block in model.blocks)),
            ("attention of its own", not all(_is_plain_attention(b) for b in model.blocks)),
        )
        if is_so
    ]
    if unlike:
        raise ValueError(f"{name} is no plain ViT: it has {', '.join(unlike)}")


def _is_plain_attention(block: Any) -> bool:
    layer = block.attn
    return type(layer) is Attention and getattr(layer, "gate", None) is None
