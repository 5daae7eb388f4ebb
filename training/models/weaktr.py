"""WeakTr: a ViT whose class tokens, attention and patch tokens all say where a class is.

It knows how logits and maps arise and the loss on image-level tags; it knows no data. MCTformer's
maps, which stand on the same tokens, are an option of the same network.

Source:
    WeakTr (arXiv:2304.01184) as WeakSAM (arXiv:2402.14812) uses it; ``published_config`` is exactly
    that. The gate's reduction and pooling are options, since WeakTr's own differ; which layers'
    attention gives peaks is ``attention_layers``. MCTformer: arXiv:2203.02891.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from training.models.vit import ActivationRanges, ClassTokenVit, VitConfig

_MCTFORMER_LAYERS = 3
"""Last layers whose class attention MCTformer reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeakTrConfig:
    """Sizes of the classifier; the number of classes comes with the data."""

    vit: VitConfig = field(default_factory=VitConfig)
    gate_reduction: int = 4
    """The gate's hidden layer is (layers x heads) / this wide; WeakTr alone trains with 8."""
    gate_pool: Literal["avg", "max"] = "avg"
    """How an attention map becomes one number for the gate. The mean of a map whose rows sum to
    one is the same for every map, so ``avg`` weighs heads independently of the image."""
    class_readout: Literal["mean", "linear"] = "mean"
    """How a class token becomes its logit: the mean of its channels as published, or a learned
    weighing that starts as the mean. On a thousand images ``mean`` is still undecided when
    ``linear`` is done: the mean of a normed token hardly moves."""
    coarse_pool: Literal["mean", "attention", "rank"] = "mean"
    """How the coarse maps become logits in training: their mean as published, or their mean where
    the class token looks, while where it does not look no class may answer. Patch tokens know the
    whole image, so with ``mean`` and little data any patch may answer for the class; ``attention``
    pins the answer to the object. ``rank``: a mean in which each patch weighs ``rank_decay`` times
    the next better one, as MCTformer+."""
    rank_decay: float = 0.996
    """For ``coarse_pool="rank"``, in (0, 1]."""
    maps: Literal["weaktr", "mctformer", "mctformer_plus"] = "weaktr"
    """How attention turns coarse maps into fine ones. ``weaktr``: the gate weighs all attention
    maps. ``mctformer``: class attention is the mean of the last three layers, patch attention the
    sum of all; nothing is learnt, so there is no fine loss. ``mctformer_plus``: with the square
    root of coarse map times class attention."""

    def __post_init__(self) -> None:
        if not 0 < self.rank_decay <= 1:
            raise ValueError(f"rank_decay must be in (0, 1], got {self.rank_decay}")
        if not 1 <= self.gate_reduction <= self.vit.depth * self.vit.num_heads:
            raise ValueError(
                f"gate_reduction {self.gate_reduction} leaves nothing of "
                f"{self.vit.depth * self.vit.num_heads} attention maps"
            )


def published_config(
    vit: VitConfig | None = None, *, map_source: Literal["weaktr", "mctformer"] = "weaktr"
) -> WeakTrConfig:
    """WeakTr as published (or MCTformer on the same network): logits are plain means and no norm
    follows the last block.

    Args:
        vit: The backbone; None: DeiT-Small. Norm and interpolation of positions are set here.
        map_source: Whose maps.
    """
    vit = VitConfig(dim=384, num_heads=6) if vit is None else vit
    return WeakTrConfig(
        vit=replace(vit, final_norm=False, position_margin=0.1),
        class_readout="mean",
        coarse_pool="mean",
        maps=map_source,
    )


@dataclass(frozen=True, kw_only=True)
class WeakTrOutput:
    """Three opinions on the tags, and the maps behind them."""

    class_logits: Float[Tensor, "b c"]
    """From the class tokens: the tags' best estimate."""
    coarse_logits: Float[Tensor, "b c"]
    background_logits: Float[Tensor, "b c"] | None
    """The coarse maps' mean where class attention is low; None with ``coarse_pool="mean"``."""
    fine_logits: Float[Tensor, "b c"] | None
    """The fine maps' mean; None where nothing behind it learns."""
    coarse_maps: Float[Tensor, "b c h w"]
    """Class activation of the patch tokens, at least 0."""
    fine_maps: Float[Tensor, "b c h w"]
    """Coarse maps weighed by class attention and spread by patch attention, at least 0."""
    cross_maps: Float[Tensor, "b k n c h w"]
    """Ungated attention of each class token to the patches, of every layer and head, in [0, 1]."""


class AttentionGate(nn.Module):
    """One weight in (0, 1) for each attention map ("adaptive attention fusion")."""

    def __init__(self, num_maps: int, reduction: int, pool: Literal["avg", "max"]) -> None:
        super().__init__()
        hidden = max(1, num_maps // reduction)
        self.pool = pool
        self.squeeze = nn.Linear(num_maps, hidden, bias=False)
        self.excite = nn.Linear(hidden, num_maps, bias=False)

    def forward(self, attentions: Float[Tensor, "b m t t"]) -> Float[Tensor, "b m"]:
        """The weights of m maps."""
        flat = attentions.flatten(2)
        pooled = flat.mean(dim=2) if self.pool == "avg" else flat.amax(dim=2)
        return self.excite(self.squeeze(pooled).relu()).sigmoid()


class _ClassReadout(nn.Module):
    def __init__(self, num_classes: int, dim: int, kind: Literal["mean", "linear"]) -> None:
        super().__init__()
        self.is_learned = kind == "linear"
        if self.is_learned:
            self.weight = nn.Parameter(torch.full((num_classes, dim), 1 / dim))
            self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, tokens: Float[Tensor, "b c d"]) -> Float[Tensor, "b c"]:
        if not self.is_learned:
            return tokens.mean(dim=2)
        return (tokens * self.weight).sum(dim=2) + self.bias


class WeakTr(nn.Module):
    """The classifier.

    Args:
        config: Sizes.
        num_classes: Classes, at least 1.
        patch_embed: Another embedding of the image than plain patches.
    """

    def __init__(
        self, config: WeakTrConfig, num_classes: int, patch_embed: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.vit = ClassTokenVit(config.vit, num_classes, patch_embed)
        self.class_readout = _ClassReadout(num_classes, config.vit.dim, config.class_readout)
        self.head = nn.Conv2d(config.vit.dim, num_classes, 3, padding=1)
        num_maps = config.vit.depth * config.vit.num_heads
        self.gate = (
            AttentionGate(num_maps, config.gate_reduction, config.gate_pool)
            if config.maps == "weaktr"
            else None
        )

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> WeakTrOutput:
        """Logits and maps of normalised RGB images."""
        features = self.vit(image)
        activation = self.head(features.patch_tokens)
        coarse_maps = activation.detach().relu()
        class_to_patch, patch_to_patch = self._fused_attention(features.attentions.detach())
        weighed = class_to_patch * coarse_maps.flatten(2)
        if self.config.maps == "mctformer_plus":
            weighed = weighed.sqrt()
        spread = torch.einsum("bij,bcj->bci", patch_to_patch, weighed)
        fine_maps = spread.unflatten(2, coarse_maps.shape[2:])
        cross_maps = self._class_to_patch(features.attentions, coarse_maps.shape[2])
        background_logits = None
        coarse_logits = activation.mean(dim=(2, 3))
        if self.config.coarse_pool == "attention":
            layers = attention_layers(self.config.vit.depth)
            attention = torch.stack([cross_maps[:, layer] for layer in layers]).mean(dim=(0, 2))
            coarse_logits, background_logits = _pool_by_attention(activation, attention.detach())
        elif self.config.coarse_pool == "rank":
            coarse_logits = _pool_by_rank(activation, self.config.rank_decay)
        return WeakTrOutput(
            class_logits=self.class_readout(features.class_tokens),
            coarse_logits=coarse_logits,
            background_logits=background_logits,
            fine_logits=None if self.gate is None else fine_maps.mean(dim=(2, 3)),
            coarse_maps=coarse_maps,
            fine_maps=fine_maps,
            cross_maps=cross_maps,
        )

    def _fused_attention(self, attentions: Float[Tensor, "b k n t t"]) -> tuple[Tensor, Tensor]:
        """What class tokens [b, c, p] and patches [b, p, p] take from the patches, over all layers
        and heads.
        """
        classes = self.num_classes
        if self.gate is not None:
            maps = attentions.flatten(1, 2)
            weights = self.gate(maps) / maps.shape[1]
            fused = torch.einsum("bm,bmij->bij", weights, maps)
            return fused[:, :classes, classes:], fused[:, classes:, classes:]
        by_layer = attentions.mean(dim=2)  # [b, k, t, t]
        class_to_patch = by_layer[:, -_MCTFORMER_LAYERS:, :classes, classes:].mean(dim=1)
        return class_to_patch, by_layer[:, :, classes:, classes:].sum(dim=1)

    def _class_to_patch(
        self, attentions: Float[Tensor, "b k n t t"], height: int
    ) -> Float[Tensor, "b k n c h w"]:
        classes = self.num_classes
        return attentions[..., :classes, classes:].unflatten(-1, (height, -1))


def _pool_by_attention(
    activation: Float[Tensor, "b c h w"], attention: Float[Tensor, "b c h w"]
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c"]]:
    """Means of ``activation`` where ``attention`` is high and where it is low."""
    low, high = attention.amin(dim=(2, 3), keepdim=True), attention.amax(dim=(2, 3), keepdim=True)
    unattended = 1 - (attention - low) / (high - low + 1e-8)
    return _weighted_mean(activation, attention), _weighted_mean(activation, unattended.square())


def _pool_by_rank(activation: Float[Tensor, "b c h w"], decay: float) -> Float[Tensor, "b c"]:
    """Mean over patches, each weighing ``decay`` times the next better one."""
    ranked = activation.flatten(2).sort(dim=2, descending=True).values
    weights = decay ** torch.arange(ranked.shape[2], device=ranked.device, dtype=torch.float32)
    return (ranked * weights).sum(dim=2) / weights.sum()


def _weighted_mean(
    values: Float[Tensor, "b c h w"], weights: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c"]:
    return (values * weights).sum(dim=(2, 3)) / (weights.sum(dim=(2, 3)) + 1e-8)


def weaktr_loss(
    output: WeakTrOutput, tags: Float[Tensor, "b c"], *, background_weight: float = 0.5
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Sum of the multilabel losses of the logits, and each by name.

    Args:
        output: Of the same images.
        tags: 1 where the image has the class, else 0.
        background_weight: Of the loss that no class answers where none looks; that of the three
            published losses is 1.
    """
    losses = {
        name: functional.multilabel_soft_margin_loss(logits.float(), tags)
        for name, logits in (
            ("class", output.class_logits),
            ("coarse", output.coarse_logits),
            ("fine", output.fine_logits),
        )
        if logits is not None
    }
    if output.background_logits is not None:
        losses["background"] = background_weight * functional.multilabel_soft_margin_loss(
            output.background_logits.float(), torch.zeros_like(tags)
        )
    total = torch.stack([*losses.values()]).sum()
    return total, {name: loss.item() for name, loss in losses.items()}


def config_from_json(content: Mapping[str, Any]) -> WeakTrConfig:
    """The config of ``dataclasses.asdict``; fields of later versions keep their defaults.

    Raises:
        KeyError: It has no ``vit``.
        TypeError: A field is unknown.
    """
    vit = dict(content["vit"])
    if vit["activation_ranges"] is not None:
        vit["activation_ranges"] = tuple(
            ActivationRanges(**{name: tuple(bounds) for name, bounds in ranges.items()})
            for ranges in vit["activation_ranges"]
        )
    return WeakTrConfig(**{**content, "vit": VitConfig(**vit)})


def attention_layers(depth: int) -> tuple[int, ...]:
    """The layers whose class attention gives peaks: 8 and 9 (from 0) of 12, the like share of
    others; at least one.

    Source:
        The released code reads layers 8 and 9; the paper writes of all layers.
    """
    first, stop = 8 * depth // 12, 10 * depth // 12
    return tuple(range(min(first, depth - 1), max(stop, min(first, depth - 1) + 1)))
