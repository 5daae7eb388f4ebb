"""Segment Anything at every size from one builder: our compact SAM and the official ViTs.

Prompt encoder, two-way transformer and mask decoder are always those of the ``segment-anything``
package, so checkpoints keep their names and shapes. What this module adds: a small convolutional
image encoder and loading by file content; ``sam_decoder`` calls the decoder.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional

from training.engine.checkpoint import load_metadata, load_weights, save_weights
from training.models.squeezenet import PIXEL_MEAN, PIXEL_STD, SqueezeNetFeatures
from weaksam_rt.errors import ArtifactError

_METADATA_KEY = "sam_config"
_MULTIMASK_OUTPUTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VitEncoderConfig:
    """The official image encoder: a plain ViT with windowed and a few global attention blocks."""

    depth: int
    """Number of transformer blocks."""
    width: int
    """Channels inside the blocks."""
    num_heads: int
    """Attention heads per block."""
    global_blocks: tuple[int, ...]
    """0-based blocks that attend over the whole image."""
    patch_size: int = 16
    """Side of a patch in pixels; the embedding's stride."""
    window_size: int = 14
    """Side of an attention window in patches."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CompactEncoderConfig:
    """SqueezeNet with a top-down neck; the embedding has stride 8."""

    width: int = 128
    """Channels of the neck; a multiple of 8."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamConfig:
    """Everything that decides the shapes of a SAM."""

    encoder: VitEncoderConfig | CompactEncoderConfig
    """The image encoder."""
    image_size: int = 1024
    """Side of the square model frame in pixels; a multiple of the embedding's stride."""
    embed_dim: int = 256
    """Channels of image and prompt embeddings; a multiple of 8."""
    num_heads: int = 8
    """Heads of the two-way transformer."""
    mlp_dim: int = 2048
    """Hidden channels of the two-way transformer."""
    decoder_depth: int = 2
    """Blocks of the two-way transformer."""

    def __post_init__(self) -> None:
        if self.image_size % self.embedding_stride:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of the stride {self.embedding_stride}"
            )

    @property
    def embedding_stride(self) -> int:
        """Pixels of the model frame per cell of the image embedding."""
        if isinstance(self.encoder, VitEncoderConfig):
            return self.encoder.patch_size
        return CompactImageEncoder.stride

    @property
    def embedding_size(self) -> int:
        """Cells along a side of the image embedding; low-resolution masks have 4 times as many."""
        return self.image_size // self.embedding_stride


def compact() -> SamConfig:
    """This project's SAM for CPUs: frame of 256 pixels, 32 x 32 cells, masks of 128 x 128."""
    return SamConfig(
        encoder=CompactEncoderConfig(), image_size=256, embed_dim=128, num_heads=4, mlp_dim=512
    )


def vit_b() -> SamConfig:
    """The official ViT-B (``sam_vit_b_01ec64.pth``)."""
    return SamConfig(
        encoder=VitEncoderConfig(depth=12, width=768, num_heads=12, global_blocks=(2, 5, 8, 11))
    )


def vit_l() -> SamConfig:
    """The official ViT-L (``sam_vit_l_0b3195.pth``)."""
    return SamConfig(
        encoder=VitEncoderConfig(depth=24, width=1024, num_heads=16, global_blocks=(5, 11, 17, 23))
    )


def vit_h() -> SamConfig:
    """The official ViT-H (``sam_vit_h_4b8939.pth``), the one of the WeakSAM paper."""
    return SamConfig(
        encoder=VitEncoderConfig(depth=32, width=1280, num_heads=16, global_blocks=(7, 15, 23, 31))
    )


SAM_CONFIGS: Mapping[str, Callable[[], SamConfig]] = {
    f.__name__: f for f in (compact, vit_b, vit_l, vit_h)
}


def sam_config(name: str) -> SamConfig:
    """The configuration called ``name``; raises ``ValueError`` that lists the names."""
    if name not in SAM_CONFIGS:
        raise ValueError(f"no SAM is called {name!r}; choose one of {', '.join(SAM_CONFIGS)}")
    return SAM_CONFIGS[name]()


class ContextBlock(nn.Module):
    """A residual bottleneck whose 3x3 convolution skips ``dilation - 1`` cells."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 2, 1)
        self.spread = nn.Conv2d(
            channels // 2, channels // 2, 3, padding=dilation, dilation=dilation
        )
        self.norm = nn.GroupNorm(8, channels // 2)
        self.expand = nn.Conv2d(channels // 2, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The same shape."""
        hidden = functional.gelu(self.reduce(x))
        hidden = functional.gelu(self.norm(self.spread(hidden)))
        return x + self.expand(hidden)


class FusionBlock(nn.Module):
    """A residual pair of 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The same shape."""
        hidden = self.conv1(functional.gelu(self.norm1(x)))
        return x + self.conv2(functional.gelu(self.norm2(hidden)))


class GlobalContext(nn.Module):
    """Adds to every cell a projection of the mean over all cells."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The same shape."""
        return x + self.project(functional.gelu(x.mean(dim=(2, 3), keepdim=True)))


class CompactImageEncoder(nn.Module):
    """Features of strides 4, 8 and 16 merged top-down into one embedding of stride 8."""

    stride = 8

    def __init__(self, config: SamConfig, width: int) -> None:
        super().__init__()
        self.img_size = config.image_size
        """Side of the model frame; ``segment_anything.modeling.Sam`` reads it."""
        self.trunk = SqueezeNetFeatures()
        stride4, stride8, stride16 = SqueezeNetFeatures.out_channels
        self.context = nn.Sequential(
            nn.Conv2d(stride16, 2 * width, 1),
            *(ContextBlock(2 * width, dilation) for dilation in (1, 2, 4)),
            GlobalContext(2 * width),
            nn.Conv2d(2 * width, width, 1),
        )
        self.lateral8 = nn.Conv2d(stride8, width, 1)
        self.lateral4 = nn.Conv2d(stride4, width, 3, stride=2, padding=1)
        self.fusion = nn.Sequential(FusionBlock(width), FusionBlock(width))
        self.neck = nn.Sequential(
            nn.Conv2d(width, config.embed_dim, 1, bias=False),
            LayerNorm2d(config.embed_dim),
            nn.Conv2d(config.embed_dim, config.embed_dim, 3, padding=1, bias=False),
            LayerNorm2d(config.embed_dim),
        )

    def forward(self, image: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d h w"]:
        """Image embeddings.

        Args:
            image: RGB as ``Sam.preprocess`` gives it: normalised, zero beyond the picture.
        """
        features = self.trunk(image)
        context = functional.interpolate(
            self.context(features.stride16), scale_factor=2.0, mode="bilinear", align_corners=False
        )
        merged = context + self.lateral8(features.stride8) + self.lateral4(features.stride4)
        return self.neck(self.fusion(merged))


def build_sam(config: SamConfig) -> Sam:
    """An untrained SAM in evaluation mode."""
    cells = config.embedding_size
    sam = Sam(
        image_encoder=_build_image_encoder(config),
        prompt_encoder=PromptEncoder(
            embed_dim=config.embed_dim,
            image_embedding_size=(cells, cells),
            input_image_size=(config.image_size, config.image_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=_MULTIMASK_OUTPUTS,
            transformer=TwoWayTransformer(
                depth=config.decoder_depth,
                embedding_dim=config.embed_dim,
                mlp_dim=config.mlp_dim,
                num_heads=config.num_heads,
            ),
            transformer_dim=config.embed_dim,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
    )
    return sam.eval()


def save_sam(
    path: Path,
    sam: Sam,
    config: SamConfig,
    *,
    dtype: torch.dtype = torch.float32,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write one ``.safetensors`` file that ``load_sam`` reads without being told the size.

    Args:
        path: Replaced atomically.
        sam: Built from ``config``.
        config: Stored beside the tensors.
        dtype: Of the stored tensors; float16 halves the file.
        provenance: JSON values to keep with the weights (data, recipe, metrics).
    """
    tensors = {name: tensor.to(dtype) for name, tensor in sam.state_dict().items()}
    metadata = {_METADATA_KEY: dataclasses.asdict(config), "provenance": dict(provenance or {})}
    save_weights(path, tensors, metadata)


def load_sam(path: Path, config: SamConfig | None = None) -> Sam:
    """A SAM with the weights of ``path``, in evaluation mode, float32.

    Args:
        path: A ``.safetensors`` file of ``save_sam``, or an official ``.pth`` checkpoint.
        config: What the file holds, where neither its metadata nor its shapes tell.

    Raises:
        ArtifactError: The file is damaged, of unknown size, or does not fit exactly.
    """
    tensors = load_weights(path)
    if config is None:
        config = _stored_config(path) if path.suffix == ".safetensors" else None
        config = config or _official_config(path, tensors)
    sam = build_sam(config)
    try:
        sam.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(f"{path} does not fit {config}: {error}") from error
    return sam


def _build_image_encoder(config: SamConfig) -> nn.Module:
    encoder = config.encoder
    if isinstance(encoder, CompactEncoderConfig):
        return CompactImageEncoder(config, encoder.width)
    return ImageEncoderViT(
        depth=encoder.depth,
        embed_dim=encoder.width,
        img_size=config.image_size,
        mlp_ratio=4,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        num_heads=encoder.num_heads,
        patch_size=encoder.patch_size,
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=encoder.global_blocks,
        window_size=encoder.window_size,
        out_chans=config.embed_dim,
    )


def _stored_config(path: Path) -> SamConfig | None:
    stored = load_metadata(path).get(_METADATA_KEY)
    if stored is None:
        return None
    encoder = dict(stored["encoder"])
    if "depth" in encoder:
        encoder["global_blocks"] = tuple(encoder["global_blocks"])
        return SamConfig(**{**stored, "encoder": VitEncoderConfig(**encoder)})
    return SamConfig(**{**stored, "encoder": CompactEncoderConfig(**encoder)})


def _official_config(path: Path, tensors: Mapping[str, Tensor]) -> SamConfig:
    """The official size with this patch embedding."""
    weight = tensors.get("image_encoder.patch_embed.proj.weight")
    for config in (vit_b(), vit_l(), vit_h()):
        width = config.encoder.width
        if weight is not None and weight.shape[0] == width:
            return config
    raise ArtifactError(
        f"{path} is neither a SAM of this project nor an official sam_vit_b, _l or _h checkpoint; "
        "pass the configuration it was made with"
    )
