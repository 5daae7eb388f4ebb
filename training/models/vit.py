"""A vision transformer with one class token per class, which shows its attention.

It knows tokens, positions and attention; it knows no losses and no activation maps
(``weaktr.py``). Module names are timm's, so ImageNet weights of a DeiT load as they are. Its blocks
are this project's own or timm's (``timm_vit.py``).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationRanges:
    """Where one block clamps its activations, each (low, high): the levels of a quantised network,
    without which its weights are meaningless.
    """

    norm1: tuple[float, float]
    """The attention's normed input."""
    query_key: tuple[float, float]
    value: tuple[float, float]
    attention: tuple[float, float]
    """The map after the softmax; its rows need no longer sum to one."""
    context: tuple[float, float]
    """Attention times value."""
    norm2: tuple[float, float]
    """The MLP's normed input."""
    hidden: tuple[float, float]
    """The MLP's hidden layer after the GELU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VitConfig:
    """Sizes of the transformer; the defaults are DeiT-Tiny."""

    image_size: int = 224
    """Side of the square image that the position embedding is made for, pixels."""
    patch_size: int = 16
    """Side of a patch, pixels; divides ``image_size``."""
    dim: int = 192
    """Channels of a token; a multiple of ``num_heads``."""
    depth: int = 12
    """Blocks."""
    num_heads: int = 3
    """Attention heads of each block."""
    mlp_ratio: int = 4
    """Hidden channels of the MLP, as a multiple of ``dim``."""
    drop_path: float = 0.1
    """Chance to skip a residual branch of the last block in training, in [0, 1); earlier blocks
    less, the first never."""
    activation_ranges: tuple[ActivationRanges, ...] | None = None
    """Of each block; None: activations are not clamped."""
    final_norm: bool = True
    """Norm the tokens after the last block. WeakTr and MCTformer do not: the mean of a normed
    token hardly depends on the image."""
    position_margin: float = 0.0
    """Patches added to the map's sides in the *scale* at which the position embedding is
    interpolated; the released WeakTr and MCTformer add 0.1."""
    timm_model: str = ""
    """Take embedding, blocks and norms from this timm model, whose sizes the other fields then
    are (``timm_vit_config``); empty: this project's own."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}"
            )
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is no multiple of num_heads {self.num_heads}")
        if self.activation_ranges is not None and len(self.activation_ranges) != self.depth:
            raise ValueError(
                f"activation_ranges has {len(self.activation_ranges)} entries for {self.depth} "
                "blocks"
            )
        if self.timm_model and self.activation_ranges is not None:
            raise ValueError("activation_ranges belong to this project's own blocks, not to timm's")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1); got {self.drop_path}")

    @property
    def map_size(self) -> int:
        """Patches along a side at ``image_size``."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class VitFeatures:
    """What comes out of the last block, after the final norm if there is one."""

    class_tokens: Float[Tensor, "b c d"]
    patch_tokens: Float[Tensor, "b d h w"]
    attentions: Float[Tensor, "b k n t t"]
    """Post-softmax attention of all k layers and n heads; t = c class tokens, then h * w patches
    row by row. ``[..., i, j]`` is what token i takes from token j."""


@dataclass(frozen=True, kw_only=True)
class VitParts:
    """What differs between this project's blocks and timm's; parameters have timm's names."""

    projection: nn.Module | None
    """Image [b, 3, h, w] to patches [b, d, h', w']; None: a plain convolution."""
    norm_pre: nn.Module
    """Between positions and the first block."""
    blocks: nn.ModuleList
    """Each gives the new tokens [b, t, d] and its attention [b, n, t, t]."""
    norm: nn.Module


class _SelfAttention(nn.Module):
    def __init__(self, config: VitConfig, ranges: ActivationRanges | None) -> None:
        super().__init__()
        self.ranges = ranges
        self.num_heads = config.num_heads
        self.scale = (config.dim // config.num_heads) ** -0.5
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Float[Tensor, "b t d"]) -> tuple[Tensor, Tensor]:
        """The new tokens [b, t, d] and the attention [b, n, t, t]."""
        ranges = self.ranges
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=2)
        )
        if ranges is not None:
            query, key = _clamp(query, ranges.query_key), _clamp(key, ranges.query_key)
            value = _clamp(value, ranges.value)
        attention = ((query * self.scale) @ key.transpose(-2, -1)).softmax(dim=-1)
        if ranges is not None:
            attention = _clamp(attention, ranges.attention)
        context = (attention.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        return self.proj(_clamp(context, ranges.context if ranges else None)), attention


class _Mlp(nn.Module):
    def __init__(self, config: VitConfig, ranges: ActivationRanges | None) -> None:
        super().__init__()
        self.ranges = ranges
        self.fc1 = nn.Linear(config.dim, config.mlp_ratio * config.dim)
        self.fc2 = nn.Linear(config.mlp_ratio * config.dim, config.dim)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        hidden = functional.gelu(self.fc1(x))
        return self.fc2(_clamp(hidden, self.ranges.hidden if self.ranges else None))


class _Block(nn.Module):
    def __init__(
        self, config: VitConfig, drop_path: float, ranges: ActivationRanges | None
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.ranges = ranges
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = _SelfAttention(config, ranges)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = _Mlp(config, ranges)

    def forward(self, x: Float[Tensor, "b t d"]) -> tuple[Tensor, Tensor]:
        ranges = self.ranges
        change, attention = self.attn(_clamp(self.norm1(x), ranges.norm1 if ranges else None))
        x = x + self._drop(change)
        change = self.mlp(_clamp(self.norm2(x), ranges.norm2 if ranges else None))
        return x + self._drop(change), attention

    def _drop(self, change: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return change
        keep = torch.rand(change.shape[0], 1, 1, device=change.device) >= self.drop_path
        return change * (keep / (1 - self.drop_path)).to(change.dtype)


def _clamp(x: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    # hardtanh is a clamp whose gradient costs one pass instead of five.
    return x if bounds is None else functional.hardtanh(x, bounds[0], bounds[1])


class PatchEmbedding(nn.Module):
    """Non-overlapping patches of normalised RGB to tokens."""

    def __init__(self, config: VitConfig, projection: nn.Module | None = None) -> None:
        super().__init__()
        self.proj = projection or nn.Conv2d(
            3, config.dim, config.patch_size, stride=config.patch_size
        )

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d h16 w16"]:
        """Tokens as a map; rows and columns that fill no patch are left out."""
        return self.proj(image)


def _own_parts(config: VitConfig) -> VitParts:
    rates = torch.linspace(0, config.drop_path, config.depth).tolist()
    ranges = config.activation_ranges or (None,) * config.depth
    return VitParts(
        projection=None,
        norm_pre=nn.Identity(),
        blocks=nn.ModuleList(
            _Block(config, rate, bounds) for rate, bounds in zip(rates, ranges, strict=True)
        ),
        norm=nn.LayerNorm(config.dim, eps=1e-6),
    )


def _timm_parts(config: VitConfig) -> VitParts:
    from training.models.timm_vit import timm_parts  # timm takes a second to import

    return timm_parts(config)


class ClassTokenVit(nn.Module):
    """The transformer: an embedding of the image, class tokens, positions, blocks.

    Args:
        config: Sizes.
        num_classes: Class tokens.
        patch_embed: Image [b, 3, h, w] to tokens [b, dim, h', w']; None means plain patches.
    """

    def __init__(
        self, config: VitConfig, num_classes: int, patch_embed: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        parts = _timm_parts(config) if config.timm_model else _own_parts(config)
        self.patch_embed = patch_embed or PatchEmbedding(config, parts.projection)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, num_classes, config.dim))
        positions = num_classes + config.map_size**2
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, positions, config.dim))
        self.norm_pre = parts.norm_pre
        self.blocks = parts.blocks
        self.norm = parts.norm if config.final_norm else nn.Identity()
        if not config.timm_model:  # timm has its own start
            self.apply(_init_linear_)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> VitFeatures:
        """Tokens and attention of normalised RGB images of any size of at least one patch."""
        patches = self.patch_embed(image)
        height, width = patches.shape[-2:]
        tokens = patches.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        x = self.norm_pre(x + self._positions(height, width))
        attentions = []
        for block in self.blocks:
            x, attention = block(x)
            attentions.append(attention)
        x = self.norm(x)
        return VitFeatures(
            class_tokens=x[:, : self.num_classes],
            patch_tokens=x[:, self.num_classes :].transpose(1, 2).unflatten(2, (height, width)),
            attentions=torch.stack(attentions, dim=1),
        )

    def _positions(self, height: int, width: int) -> Tensor:
        side = self.config.map_size
        if (height, width) == (side, side):
            return self.pos_embed
        classes, patches = self.pos_embed.split([self.num_classes, side * side], dim=1)
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        margin = self.config.position_margin
        if margin:
            scale = ((height + margin) / side, (width + margin) / side)
            resized = functional.interpolate(
                grid, scale_factor=scale, mode="bicubic", align_corners=False
            )
        else:
            resized = functional.interpolate(
                grid, size=(height, width), mode="bicubic", align_corners=False
            )
        return torch.cat([classes, resized.flatten(2).transpose(1, 2)], dim=1)


def load_deit_(vit: ClassTokenVit, weights: Mapping[str, Tensor]) -> None:
    """Start from a single-class-token DeiT in timm's names; each class token and its position
    become copies of the one.

    Args:
        vit: Plain patches, and the sizes of the DeiT; its image size may differ.
        weights: Float32, other names are left out. Those of a quantised network need its
            activation ranges in the vit's config (``activation_ranges_from_scales``).

    Raises:
        ValueError: A tensor is missing or has another shape.
    """
    own = vit.state_dict()
    values = {}
    for name in own:
        if name not in weights:
            raise ValueError(f"the weights are not a DeiT's: {name} is missing")
        values[name] = weights[name].float()
    values["cls_token"] = values["cls_token"].expand(-1, vit.num_classes, -1)
    values["pos_embed"] = _spread_positions(values["pos_embed"], vit)
    wrong = {
        f"{name} is {list(value.shape)}, expected {list(own[name].shape)}"
        for name, value in values.items()
        if value.shape != own[name].shape
    }
    if wrong:
        raise ValueError(f"the weights are of another size: {'; '.join(sorted(wrong))}")
    vit.load_state_dict(own | values)


def activation_ranges_from_scales(
    scales: Float[Tensor, "k 5"],
) -> tuple[ActivationRanges, ...]:
    """Activation bounds of the published 3-bit DeiT-Tiny.

    Args:
        scales: Per block: scale of query and key, inverse scale of the attention, scale of the
            value, inverse scale and zero point of the hidden layer. Levels are -4..3 or 0..7.
    """
    return tuple(
        ActivationRanges(
            norm1=(-4.0, 3.0),
            query_key=(-4 * query_key, 3 * query_key),
            value=(-4 * value, 3 * value),
            attention=(0.0, 7 / attention),
            context=(-4.0, 3.0),
            norm2=(-4.0, 3.0),
            hidden=((0 - zero) / hidden, (7 - zero) / hidden),
        )
        for query_key, attention, value, hidden, zero in scales.tolist()
    )


def _spread_positions(positions: Float[Tensor, "1 t d"], vit: ClassTokenVit) -> Tensor:
    token, patches = positions[:, :1], positions[:, 1:]
    side, wanted = round(patches.shape[1] ** 0.5), vit.config.map_size
    if side != wanted:
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        grid = functional.interpolate(
            grid, size=(wanted, wanted), mode="bicubic", align_corners=False
        )
        patches = grid.flatten(2).transpose(1, 2)
    return torch.cat([token.expand(-1, vit.num_classes, -1), patches], dim=1)


def _init_linear_(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
